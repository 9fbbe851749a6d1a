"""Keeps the keys and values of ended requests, for requests that begin with the same tokens.

If two prompts begin with the same tokens, these tokens have the same keys and values (on the CPU to
the bit), however the prompts are cut into pieces (see `scheduler`). So the longest beginning that a
prompt shares with an earlier one need not be read again.

Generated tokens get their keys and values from other kernels, which round differently. So a request
reuses generated tokens only if it asks for that (`Request.reuse_completions`).

Requests share keys and values only if they have the same adapter, and the same salt, a text that
keeps the clients of a server apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mistral_ext.engine.sequence import Sequence
from mistral_ext.engine.slots import Extent, SlotPool

# The least number of tokens in a piece of a prompt, unless the whole prompt is shorter. So the same
# kernels compute all pieces. Smaller ones could get the kernels of decode steps, which round
# differently. On the CPU, gemv takes up to 8 tokens, and the kernel of attention up to 16 rows. (A
# row is one token in one query head.)
LEAST_PIECE = 32


@dataclass(frozen=True)
class Match:
    """The beginning of a prompt that was found in the cache.

    Attributes:
        extent: the extent that holds the beginning, perhaps with more tokens after it.
        length: the number of tokens of the beginning, which need not be read.
        exact: how many of these tokens are exact: their keys and values are exactly those that
            every prompt with this beginning has (see `Sequence.exact`).
        is_kept: whether the extent belongs to the prefix cache, and not to a running sequence.
        is_all: whether the prompt begins with all tokens of the extent that the request may reuse.
            Then the request gets the extent itself, if it is a kept one. Otherwise it gets a copy
            if there is room, and the extent stays for others.
    """

    extent: Extent
    length: int
    exact: int
    is_kept: bool
    is_all: bool


@dataclass(frozen=True, eq=False)
class _Entry:
    extent: Extent
    # Tokens of the sequence. The extent stores the keys and values of the first extent.length.
    ids: list[int]
    exact: int  # as `Sequence.exact`
    owner: object  # `Request.prefix_owner`


class PrefixCache:
    """Keeps the extents of ended requests, the least recently used first.

    Args:
        pool: the cache memory that holds the extents.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, sequence: Sequence) -> None:
        """Takes over the extent of a sequence that has ended. Releases the extent instead if the
        request asked for results of its prompt, and a request like it would reuse fewer than
        `LEAST_PIECE` tokens (see `shareable_length`)."""
        extent, request = sequence.place, sequence.request
        is_of_use = shareable_length(sequence) >= LEAST_PIECE or not request.reports_prompt
        if is_of_use:
            self.add(extent, sequence, sequence.exact)
        else:
            self._pool.release(extent)

    def add(self, extent: Extent, sequence: Sequence, exact: int) -> None:
        """Takes over an extent that holds the beginning of a sequence, or releases the extent if it
        is too short. The keys and values of its first `exact` tokens are exact (see
        `Sequence.exact`)."""
        if extent.length < LEAST_PIECE:
            self._pool.release(extent)
            return
        ids = sequence.ids[: extent.length]
        self._entries.append(_Entry(extent, ids, exact, sequence.request.prefix_owner))

    def extent(self, match: Match | None, length: int, most: int) -> Extent | None:
        """Makes an extent for a sequence, with the beginning that `find` has found. Releases kept
        extents until there is room. Returns None if there is no room even then.

        Args:
            match: the result of `find`. None: the extent is empty.
            length: the number of tokens for which the extent must have slots from the start.
            most: the number of slots to which the extent may grow.
        """
        if match is None:
            return self._allocate(length, most)
        if not (match.is_kept and match.is_all):
            extent = self._allocate(length, most, spare=match.extent)
            if extent is not None:
                self._pool.copy(match.extent, extent, match.length)
            if extent is not None or not match.is_kept:
                return extent
        extent = match.extent
        self._entries = [entry for entry in self._entries if entry.extent is not extent]
        self._pool.rewind(extent, match.length)
        extent.most = max(most, extent.capacity)
        if self.grow(extent, length - match.length):
            return extent
        self._pool.release(extent)
        return None

    def grow(self, extent: Extent, count: int) -> bool:
        """Gives an extent room for `count` more tokens. Releases kept extents until there is room.
        Returns False if there is no room even then."""
        while not self._pool.has_room(extent, count) and not self._pool.grow(extent, count):
            if not self.drop_oldest():
                return False
        return True

    def _allocate(self, length: int, most: int, spare: Extent | None = None) -> Extent | None:
        """Allocates an extent. Releases kept extents except `spare` until there is room. Returns
        None if there is no room even then."""
        while (extent := self._pool.allocate(length, most)) is None:
            if not self.drop_oldest(spare):
                return None
        return extent

    def drop_oldest(self, spare: Extent | None = None) -> bool:
        """Releases the least recently used kept extent, or the next one if that is `spare`. Returns
        False if there is no such extent."""
        for entry in self._entries:
            if entry.extent is not spare:
                self._entries.remove(entry)
                self._pool.release(entry.extent)
                return True
        return False

    def find(self, sequence: Sequence, running: Iterable[Sequence]) -> Match | None:
        """Finds the longest beginning of a sequence's prompt in the kept extents and in those of
        `running` sequences. A kept extent that is found counts as used. Returns None if no
        beginning of at least `LEAST_PIECE` tokens is found."""
        request = sequence.request
        most = shareable_length(sequence)
        if most < LEAST_PIECE:
            return None
        entries = [*self._entries]
        for other in running:
            owner = other.request.prefix_owner
            entries.append(_Entry(other.place, other.ids, other.exact, owner))
        best, used = None, None
        for entry in entries:
            if entry.owner != request.prefix_owner:
                continue
            reusable = entry.extent.length if request.reuse_completions else entry.exact
            common = common_length(entry.ids, sequence.ids, min(reusable, sequence.prompt_length))
            length = min(common, most)
            if length < LEAST_PIECE or (best and length <= best.length):
                continue  # fewer than LEAST_PIECE tokens are read as fast as they are copied
            if self._pool.can_rewind(entry.extent, length):
                best = Match(
                    entry.extent,
                    length,
                    exact=min(entry.exact, length),
                    is_kept=entry in self._entries,
                    is_all=common == reusable,
                )
                used = entry
        if used in self._entries:
            self._entries.remove(used)
            self._entries.append(used)
        return best


def shareable_length(sequence: Sequence) -> int:
    """The most tokens at the beginning of a prompt that need not be read if the cache has them.

    At least the last `LEAST_PIECE` tokens are read, because other kernels would compute fewer.
    Tokens whose results are requested are read too. If a request sets `chunk`, its whole prompt is
    read, in passes of so many tokens.
    """
    request = sequence.request
    if request.chunk is not None:
        return 0
    most = max(0, sequence.prompt_length - LEAST_PIECE)
    return min(most, request.logits_from) if request.reports_prompt else most


def common_length(a: list[int], b: list[int], most: int) -> int:
    """The number of tokens that two lists have in common at their beginning, at most `most`."""
    most = min(most, len(a), len(b))
    if a[:most] == b[:most]:
        return most
    same, different = 0, most
    # Bisection. In each round a[:same] == b[:same], and a[:different] != b[:different].
    while different - same > 1:
        middle = (same + different) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            different = middle
    return same
