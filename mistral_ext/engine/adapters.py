"""The adapters of a running model, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mistral_ext.model.adapters import Adapters
from mistral_ext.ops import LowRank


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter of the model.

    Attributes:
        name: by which requests ask for it.
        slot: its index in the stacks of `model.adapters`.
        is_loaded: False once it was removed. Sequences that run go on with it.
    """

    name: str
    slot: int
    is_loaded: bool = True


class AdapterTable:
    """The names of a model's adapters. `Engine.between_steps` guards what changes it.

    Args:
        adapters: where the model has them.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._by_name: dict[str, LoadedAdapter] = {}

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of that name; ValueError if there is none."""
        found = self._by_name.get(name)
        if found is None:
            expected = f"one of {', '.join(self._by_name)}" if self._by_name else "none"
            raise ValueError(f"adapter is {name!r}, expected {expected}: load_adapter adds others")
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
            weights: as `model.adapters.Adapters.put` takes them.
            in_use: adapters of requests that have not ended, whose slots must stay as they are.
        """
        self.expect_new(name)
        taken = {adapter.slot for adapter in (*self._by_name.values(), *in_use)}
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        self._adapters.put(slot, weights)
        self._by_name[name] = LoadedAdapter(name, slot)

    def unload(self, name: str, in_use: Collection[LoadedAdapter]) -> None:
        """Removes an adapter. Requests that use it go on, and a later adapter may take its memory
        after them. The memory of all is freed when the last is removed and no request uses any."""
        self.find(name).is_loaded = False
        del self._by_name[name]
        if not self._by_name and not in_use:
            self._adapters.clear()
