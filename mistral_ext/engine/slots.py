"""The cache's memory: one pool of slots per layer, for the keys and values of all sequences.

A sequence owns an *extent*: C consecutive slots of the pool, in every layer. The token at position
p lives in slot p mod C of its extent. With a window, a query sees itself and the W - 1 tokens
before it, so C never needs to be more than W, and the extent is a *ring*. With W = C = 4, after 6
tokens (positions 0 to 5):

    slot       0  1  2  3
    position   4  5  2  3        4 and 5 took the slots of 0 and 1, which no later query sees

The next token, position 6, sees 3, 4, 5 and itself. It takes slot 2 from position 2. A prompt is
read in chunks. A chunk of two tokens, 6 and 7, takes slots 2 and 3. But query 6 still sees position
3, so token 7 is stored only when attention is done (csrc/ring.h has the rule). If a chunk is longer
than the ring, only its last C tokens are stored.

A ring of this pool has more slots than the window needs. The additional slots are its *slack*. If
the slack is n slots, the last n tokens can be taken back (`rewind`), and the next query still finds
all keys that it sees. So a later prompt that shares only the beginning of the tokens can reuse the
extent (engine/prefix_cache.py). Drafts, which are guesses of the next tokens (engine/drafts.py),
are stored in the slack too, so a wrong draft replaces no key that is still seen.

An extent begins small. When it is full, it gets twice as many slots, and its tokens are copied to
them. It grows up to the most slots that its sequence can need. With a window these are the window
and the slack, or fewer if the sequence cannot become as long (`slots_needed`).

A token of Mistral 7B takes 131,072 bytes in bfloat16, in all 32 layers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_ext.model.config import MistralConfig

# The slack of a ring is 1/8 of the window, but not less than _LEAST_SLACK slots and not more than
# _MOST_SLACK. A larger slack lets more tokens be taken back, but takes more memory.
_LEAST_SLACK, _MOST_SLACK = 64, 512

# The size of an extent is rounded up to a multiple of this many slots, but not past the most that
# the extent may have. Otherwise an extent might have to grow for every token.
_STEP = 256


def slots_needed(window: int | None, max_length: int) -> int:
    """The most slots that a sequence of at most `max_length` tokens needs. If `window` is None, the
    model has no window."""
    if window is None:
        return max_length
    return min(max_length, window + min(max(window // 8, _LEAST_SLACK), _MOST_SLACK))


@dataclass(eq=False)
class Extent:
    """The slots of one sequence.

    Attributes:
        first: the index of the extent's first slot in the pool.
        capacity: C, the number of slots of the extent.
        most: the number of slots to which the extent may grow.
        length: the number of tokens of the sequence that were stored, including those whose slots
            later tokens have taken.
        oldest: the first position whose slot no later token has taken.
    """

    first: int
    capacity: int
    most: int
    length: int = 0
    oldest: int = 0


class SlotPool:
    """Gives out extents of the cache.

    Args:
        config: the configuration of the model. It gives layers, key/value heads, head dimension and
            window.
        slots: the number of slots of the pool.
        dtype, device: the dtype and device of the keys and values.

    Attributes:
        k, v: the keys and the values, a tensor [R, D] per layer. R = Hkv * slots, Hkv is the number
            of key/value heads, and D the head dimension.
        slots: the number of slots.
        window: W, the window of the model. None: the model has no window.
    """

    def __init__(
        self,
        config: MistralConfig,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}, expected 1 or more")
        self.slots = slots
        self.window = config.sliding_window
        self._heads = config.n_kv_heads
        self._free = [(0, slots)]  # (first slot, number of slots) of each free range, in order
        shape = (self._heads * slots, config.head_dim)
        # Tensors that are made in inference mode cannot be changed outside of it.
        with torch.inference_mode(False):
            # The pools are not zeroed: on the CPU untouched pages cost no memory until a token is
            # stored in them.
            self.k, self.v = (
                [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
                for _ in range(2)
            )

    @property
    def nbytes(self) -> int:
        """The bytes of all layers."""
        return sum(pool.nbytes for pool in (*self.k, *self.v))

    @property
    def free_slots(self) -> int:
        """The number of slots that no extent owns. These slots need not be consecutive."""
        return sum(count for _, count in self._free)

    def allocate(self, length: int, most: int) -> Extent | None:
        """Allocates an empty extent.

        Args:
            length: the number of tokens for which the extent must have slots from the start.
            most: the number of slots to which the extent may grow.

        Returns:
            The extent, or None if there are not enough consecutive free slots.
        """
        capacity = min(most, -(-length // _STEP) * _STEP)
        first, free = _take(self._free, capacity)
        if first is None:
            return None
        self._free = free
        return Extent(first, capacity, most)

    def release(self, extent: Extent) -> None:
        """Frees the slots of an extent."""
        self._free = _give_back(self._free, extent)

    def has_room(self, extent: Extent, count: int) -> bool:
        """Whether an extent can take `count` more tokens without growing."""
        return extent.capacity == extent.most or extent.length + count <= extent.capacity

    def grow(self, extent: Extent, count: int) -> bool:
        """Moves an extent and its tokens so that `count` more tokens have room. Its number of slots
        doubles, or grows only as needed if there is no room for more.

        Returns:
            Whether there was room. If not, nothing has changed.
        """
        least = min(extent.most, -(-(extent.length + count) // _STEP) * _STEP)
        available = _give_back(self._free, extent)
        for capacity in (min(extent.most, max(2 * extent.capacity, least)), least):
            first, free = _take(available, capacity)
            if first is not None:
                self._copy(extent, Extent(first, capacity, extent.most), extent.length)
                self._free = free
                extent.first, extent.capacity = first, capacity
                return True
        return False

    def copy(self, source: Extent, target: Extent, length: int) -> None:
        """Copies the first `length` tokens of an extent to an empty extent. Tokens that no later
        query sees may be left out. The target must have room for the others, and
        `can_rewind(source, length)` must be true."""
        target.oldest = self._copy(source, target, length)
        target.length = length

    def table(self, counts: Mapping[Extent, int]) -> Tensor:
        """The sequence table of a call that stores new tokens: see `mistral_ext.ops`.

        Args:
            counts: the number of new tokens of each extent, in the order in which the tokens are
                packed. Every extent has room for its new tokens.

        Returns:
            [S, 5] int64 on the CPU, for S sequences.
        """
        rows, first_token = [], 0
        for extent, count in counts.items():
            ring_row = self._heads * extent.first
            rows.append((first_token, count, extent.length, ring_row, extent.capacity))
            first_token += count
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def draft_table(self, extents: Sequence[Extent], counts: Sequence[int]) -> Tensor:
        """The sequence table of a decode step with drafts. It has a row for each token, not for
        each sequence, so that attention on the CPU gives each token the same bits as a step with
        one token.

        Args:
            extents: the extents of the sequences.
            counts: for each sequence the number of its tokens (the next token and its drafts), at
                most 1 + `room_for_drafts`.

        Returns:
            [T, 5] int64 on the CPU, for T tokens of all sequences together.
        """
        rows: list[tuple[int, ...]] = []
        for extent, count in zip(extents, counts, strict=True):
            ring_row = self._heads * extent.first
            for position in range(extent.length, extent.length + count):
                rows.append((len(rows), 1, position, ring_row, extent.capacity))
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def append(self, counts: Mapping[Extent, int]) -> Tensor:
        """Returns the result of `table`, and counts the new tokens as stored. The caller must then
        call the op that stores them."""
        table = self.table(counts)
        for extent, count in counts.items():
            self.advance(extent, count)
        return table

    def advance(self, extent: Extent, count: int) -> None:
        """Notes that `count` more tokens of the sequence are stored."""
        extent.length += count
        extent.oldest = max(extent.oldest, extent.length - extent.capacity)

    def room_for_drafts(self, extent: Extent) -> int:
        """The most drafts that a step may read after the next token. The step stores all of these
        tokens before attention, so no draft may take a slot that the next token sees. The extent
        does not grow for drafts."""
        unused = extent.capacity - extent.length - 1
        unseen = 0 if self.window is None else extent.capacity - self.window
        return max(0, unused, unseen)

    def note_drafts(self, extent: Extent, count: int) -> None:
        """Notes that `count` drafts are stored after the next token. A draft counts as a token of
        the sequence only after `advance`. Until then another token may be stored in its place."""
        stored = extent.length + 1 + count
        extent.oldest = max(extent.oldest, stored - extent.capacity)

    def can_rewind(self, extent: Extent, length: int) -> bool:
        """Whether an extent still holds everything that a token at position `length` sees.

        That token sees the positions from length - W + 1 on. If a later token has taken the slot of
        one of these positions, the extent cannot be rewound to this length.
        """
        oldest_seen = max(0, length - self.window + 1) if self.window else 0
        return length <= extent.length and oldest_seen >= min(length, extent.oldest)

    def rewind(self, extent: Extent, length: int) -> None:
        """Forgets all but the first `length` tokens. `can_rewind(extent, length)` must be true."""
        extent.length = length
        extent.oldest = min(extent.oldest, length)

    def _copy(self, source: Extent, target: Extent, length: int) -> int:
        """Copies tokens before position `length`: the last tokens that the source still has and
        that fit the target. Returns the position of the first copied token."""
        begin = max(source.oldest, length - target.capacity)
        overlap = (
            source.first < target.first + target.capacity
            and target.first < source.first + source.capacity
        )
        runs = _runs(begin, length, source.capacity, target.capacity)
        for pool in (*self.k, *self.v):
            old, new = self._view(pool, source), self._view(pool, target)
            if overlap:
                old = old.clone()
            for source_slot, target_slot, count in runs:
                kept = old[:, source_slot : source_slot + count]
                new[:, target_slot : target_slot + count] = kept
        return begin

    def _view(self, pool: Tensor, extent: Extent) -> Tensor:
        """The slots of an extent, [Hkv, C, D]."""
        first = self._heads * extent.first
        rows = pool[first : first + self._heads * extent.capacity]
        return rows.view(self._heads, extent.capacity, -1)


def _take(free: Sequence[tuple[int, int]], count: int) -> tuple[int | None, list[tuple[int, int]]]:
    """Takes the lowest `count` consecutive free slots. Returns the index of the first of them, and
    the free ranges that are left. The index is None if no range has so many slots."""
    for i, (first, available) in enumerate(free):
        if available >= count:
            rest = [(first + count, available - count)] if available > count else []
            return first, [*free[:i], *rest, *free[i + 1 :]]
    return None, list(free)


def _give_back(free: Sequence[tuple[int, int]], extent: Extent) -> list[tuple[int, int]]:
    """The free ranges after an extent is released. Neighbouring ranges are merged."""
    merged: list[tuple[int, int]] = []
    for first, count in sorted([*free, (extent.first, extent.capacity)]):
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return merged


def _runs(begin: int, end: int, source: int, target: int) -> list[tuple[int, int, int]]:
    """Divides the positions [begin, end) into runs (slot in the source, slot in the target, count),
    which are consecutive in both rings. The rings have `source` and `target` slots."""
    runs = []
    while begin < end:
        from_slot, to_slot = begin % source, begin % target
        count = min(end - begin, source - from_slot, target - to_slot)
        runs.append((from_slot, to_slot, count))
        begin += count
    return runs
