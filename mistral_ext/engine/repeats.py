"""Finds the last tokens of a text earlier in the text. The tokens that followed there may follow
again.

Source: Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import NamedTuple

_NGRAMS = (2, 3)  # the numbers of tokens that are looked up
_NEAR = 4  # a match that has ended may go on at any of this many tokens after its end


class Place(NamedTuple):
    """A place in the earlier text.

    Attributes:
        source: the position of the token that may follow.
        matching: the number of tokens before it that are the same as the last tokens of the text.
            0: there is no such place.
        left: the position where the last match of at least two tokens ended. -1: there was no such
            match.
    """

    source: int = 0
    matching: int = 0
    left: int = -1

    def next(self) -> Place:
        """The next place, if the expected token has followed."""
        return Place(self.source + 1, self.matching + 1, self.left)


class Repeats:
    """Finds the last tokens of a text earlier in it.

    Args:
        ids: the tokens of the text, a list that grows.
    """

    def __init__(self, ids: List[int]) -> None:
        self._ids = ids
        self._indexed = 0
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the position after it
        self._place = Place()

    def place(self) -> Place:
        """The place after an earlier occurrence of the last tokens of the text.

        A match that has come to 3 or more tokens, the last token among them, goes on. Otherwise the
        first that exists is taken: the latest occurrence of the last 3 tokens; a match that has
        come to 2 tokens; the latest occurrence of the last 2 tokens; the last token alone, shortly
        after the end of the last match, because a few words may have been changed. If there is none
        of them, `matching` is 0.
        """
        ids = self._ids
        for i in range(self._indexed, len(ids)):
            last = ids[max(0, i - 2) : i + 1]
            self._place = self._moved(self._place, last, ids[self._place.source], i)
            for n in _NGRAMS:
                if i + 1 >= n:
                    self._after[tuple(ids[i + 1 - n : i + 1])] = i + 1
        self._indexed = len(ids)
        return self._place

    def token(self, place: Place, guesses: List[int]) -> int | None:
        """The token that may follow the text and some guesses. Returns None if `place`, the place
        after them, has no match."""
        if not place.matching:
            return None
        past = place.source - len(self._ids)
        return self._ids[place.source] if past < 0 else guesses[past]

    def moved(self, place: Place, guesses: List[int]) -> Place:
        """The place behind the last guess, given the place before it."""
        last = [*self._ids[-2:], *guesses][-3:]
        before = self.token(place, guesses)
        return self._moved(place, last, -1 if before is None else before, len(self._ids))

    def _moved(self, place: Place, last: List[int], expected: int, end: int) -> Place:
        """The place after a new token, given the place before it.

        Args:
            place: the place before the new token.
            last: the last tokens, up to three. The new token is last[-1].
            expected: the token that `place` points to. The new token may be another.
            end: a position. Tokens before it are earlier text, in which a repetition may go on.
        """
        source, matching, left = place
        if matching and expected == last[-1]:
            source, matching = source + 1, matching + 1
        else:
            if matching > 1:
                left = source
            matching = 0
        for n in _NGRAMS:
            if n <= len(last) and matching < n:
                found = self._after.get(tuple(last[-n:]))
                if found is not None:
                    source, matching = found, n
        if not matching and left >= 0:
            # Perhaps a few words were replaced, inserted or left out.
            for near in range(left, min(left + _NEAR, end)):
                if self._ids[near] == last[-1]:
                    source, matching = near + 1, 1
                    break
        return Place(source, matching, left)
