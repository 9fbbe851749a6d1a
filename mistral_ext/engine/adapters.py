"""The adapters of a running model, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from mistral_ext.model.adapters import Adapters
from mistral_ext.ops import LowRank

_log = logging.getLogger("mistral_ext")


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter that a running model has.

    Attributes:
        name: the name by which requests ask for it.
        slot: its index in the stacks of `model.adapters`.
        free: the method `AdapterTable.free`. It is called between steps, after a request with this
            adapter has ended, because memory of removed adapters may have been kept for that
            request.
        is_loaded: False once the adapter was removed. Sequences that run go on with it.
    """

    name: str
    slot: int
    free: Callable[[Collection[LoadedAdapter]], None]
    is_loaded: bool = True


class UnknownAdapterError(ValueError):
    """No adapter has the name that is asked for."""


class AdapterTable:
    """The names of a model's adapters. While an engine runs the model, call methods that change the
    table by `Engine.between_steps`.

    Args:
        adapters: the adapters of the model, which have no names.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._by_name: dict[str, LoadedAdapter] = {}

    def reserve(self, count: int) -> None:
        """Has the first adapter that is loaded take memory for `count` adapters. Loading the others
        then copies no adapter."""
        self._adapters.reserve(count)

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str | None) -> LoadedAdapter | None:
        """The adapter with a name, or None if the name is None. Raises UnknownAdapterError if no
        adapter has the name."""
        return None if name is None else self._loaded(name)

    def _loaded(self, name: str) -> LoadedAdapter:
        found = self._by_name.get(name)
        if found is None:
            expected = f"one of {', '.join(self._by_name)}" if self._by_name else "none"
            text = f"adapter is {name!r}, expected {expected}: load_adapter adds others"
            raise UnknownAdapterError(text)
        return found

    def expect_new(self, name: str) -> None:
        """Raises ValueError unless an adapter may get that name."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"adapter name is {name!r}, expected some text")
        if name in self._by_name:
            raise ValueError(f"adapter {name!r} is loaded already: unload it first")

    def load(
        self, name: str, weights: Mapping[str, LowRank], in_use: Collection[LoadedAdapter]
    ) -> None:
        """Adds an adapter.

        Args:
            name: a new name.
            weights: what the adapter adds to each weight, as `model.adapters.Adapters.put` takes
                it.
            in_use: adapters of requests that have not ended, whose slots must stay as they are.
        """
        self.expect_new(name)
        taken = {adapter.slot for adapter in (*self._by_name.values(), *in_use)}
        slot = _first_free(taken)
        self._adapters.put(slot, weights)
        self._by_name[name] = LoadedAdapter(name, slot, self.free)

    def unload(self, name: str, in_use: Collection[LoadedAdapter]) -> None:
        """Removes an adapter. Its memory is freed at once, or when no request uses it or an adapter
        in a later slot any more.

        Args:
            name: the name of the adapter.
            in_use: adapters of requests that have not ended.
        """
        removed = self._loaded(name)
        removed.is_loaded = False
        del self._by_name[name]
        self.free(in_use)

    def free(self, in_use: Collection[LoadedAdapter]) -> None:
        """Frees the memory of removed adapters as far as no request needs it.

        A failure is only logged, because the requests of the step before have nothing to do with
        it. The next call tries again.

        Args:
            in_use: adapters of requests that have not ended.
        """
        try:
            self._close_gaps(in_use)
        except Exception:
            _log.exception("the memory of a removed adapter was not freed")

    def _close_gaps(self, in_use: Collection[LoadedAdapter]) -> None:
        """Moves adapters that no request uses into free slots, and frees the slots after the last.

        A step that is under way may still name the slots of adapters that requests use.
        """
        idle = set(self._by_name.values()) - set(in_use)
        taken = {adapter.slot for adapter in (*idle, *in_use)}
        for adapter in sorted(idle, key=lambda adapter: adapter.slot, reverse=True):
            free = _first_free(taken)
            if free < adapter.slot:
                self._adapters.move(adapter.slot, free)
                taken.remove(adapter.slot)
                taken.add(free)
                adapter.slot = free
        self._adapters.shrink(max(taken, default=-1) + 1)


def _first_free(taken: Collection[int]) -> int:
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
