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
    """An adapter that is loaded into a running model.

    Attributes:
        name: the name by which requests ask for the adapter.
        slot: the adapter's index in the stacks of `model.adapters`, which are tensors that hold the
            weights of all adapters.
        free: the method `AdapterTable.free`. The engine calls it between steps, after a request
            with this adapter has ended. The memory of removed adapters may have waited for that.
        is_loaded: False once the adapter was removed. Requests that have begun continue to use it.
    """

    name: str
    slot: int
    free: Callable[[Collection[LoadedAdapter]], None]
    is_loaded: bool = True


class UnknownAdapterError(ValueError):
    """No adapter has the requested name."""


class AdapterTable:
    """The names of a model's adapters. While an engine runs the model, change the table only within
    `Engine.between_steps`.

    Args:
        adapters: the adapters of the model, which have no names.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._by_name: dict[str, LoadedAdapter] = {}

    def reserve(self, count: int) -> None:
        """Makes the next `load` allocate memory for `count` adapters at once. Otherwise each `load`
        copies the adapters that are already loaded to larger memory. It may still do so for an
        adapter with a larger rank, or after an adapter was removed."""
        self._adapters.reserve(count)

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str | None) -> LoadedAdapter | None:
        """Finds an adapter by its name. Returns None if the name is None. Raises
        UnknownAdapterError if no adapter has the name."""
        return None if name is None else self._loaded(name)

    def _loaded(self, name: str) -> LoadedAdapter:
        found = self._by_name.get(name)
        if found is None:
            expected = f"one of {', '.join(self._by_name)}" if self._by_name else "none"
            text = f"adapter is {name!r}, expected {expected}: load_adapter adds others"
            raise UnknownAdapterError(text)
        return found

    def expect_new(self, name: str) -> None:
        """Raises ValueError if `name` cannot be the name of a new adapter."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"adapter name is {name!r}, expected some text")
        if name in self._by_name:
            raise ValueError(f"adapter {name!r} is loaded already: unload it first")

    def load(
        self, name: str, weights: Mapping[str, LowRank], in_use: Collection[LoadedAdapter]
    ) -> None:
        """Adds an adapter.

        Args:
            name: a name that no loaded adapter has.
            weights: the updates of weights, as in `model.adapters.Adapters.put`.
            in_use: the adapters of requests that have not ended, also those that were removed. The
                new adapter gets another slot than they have.

        Raises:
            ValueError: `name` cannot be the name of a new adapter.
        """
        self.expect_new(name)
        taken = {adapter.slot for adapter in (*self._by_name.values(), *in_use)}
        slot = _first_free(taken)
        self._adapters.put(slot, weights)
        self._by_name[name] = LoadedAdapter(name, slot, self.free)

    def unload(self, name: str, in_use: Collection[LoadedAdapter]) -> None:
        """Removes an adapter. Its memory is freed at once if no request uses it or the adapter in
        the last slot (see `_close_gaps`). Otherwise it is freed when such requests have ended.

        Args:
            name: the name of the adapter.
            in_use: adapters of requests that have not ended.

        Raises:
            UnknownAdapterError: no adapter has the name.
        """
        removed = self._loaded(name)
        removed.is_loaded = False
        del self._by_name[name]
        self.free(in_use)

    def free(self, in_use: Collection[LoadedAdapter]) -> None:
        """Frees the memory of removed adapters that no request needs.

        A failure is only logged, because the requests of the last step did not cause it. The next
        call tries again.

        Args:
            in_use: adapters of requests that have not ended.
        """
        try:
            self._close_gaps(in_use)
        except Exception:
            _log.exception("the memory of a removed adapter was not freed")

    def _close_gaps(self, in_use: Collection[LoadedAdapter]) -> None:
        """Moves adapters that no request uses into free slots before them, and frees the slots
        after the last adapter. Memory can be freed only at the end of a stack.

        Adapters that requests use are not moved, because a step under way may still use their slot
        numbers.
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
