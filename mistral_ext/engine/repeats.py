"""Finds earlier occurrences of the last tokens of a text. The tokens that followed there may follow
again.

Source: Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import NamedTuple

_NGRAMS = (2, 3)  # how many of the last tokens are looked up

# When a match has ended, the new text may have replaced or left out a few words of the earlier
# text. So the last token is also looked for among this many tokens after the end of the match.
_NEAR = 4


class Place(NamedTuple):
    """A place in the earlier text where the text's last tokens occur (a match).

    Attributes:
        source: the position of the token after the match. This token may follow next.
        matching: the number of tokens before `source` that are the same as the last tokens of the
            text. 0: there is no match.
        left: where the latest match of two or more tokens ended: the position after its last
            token in the earlier text. -1: no such match has ended.
    """

    source: int = 0
    matching: int = 0
    left: int = -1

    def next(self) -> Place:
        """The place after this one, if the token at `source` has followed."""
        return Place(self.source + 1, self.matching + 1, self.left)


class Repeats:
    """Finds earlier occurrences of the last tokens of a text.

    Args:
        ids: the tokens of the text, a list that grows.
    """

    def __init__(self, ids: List[int]) -> None:
        self._ids = ids
        self._indexed = 0
        # 2 or 3 tokens in a row -> the position after the latest place where they occur.
        self._after: dict[tuple[int, ...], int] = {}
        self._place = Place()

    def place(self) -> Place:
        """Returns the place after an earlier occurrence of the last tokens of the text.

        The first of these that exists is taken:
        1. The match so far, if the last token continues it and it now has 3 or more tokens.
        2. The latest occurrence of the last 3 tokens.
        3. The match so far, if the last token continues it and it now has 2 tokens.
        4. The latest occurrence of the last 2 tokens.
        5. The last token alone, if it occurs shortly after the end of an earlier match. The text
           may have changed a few words there.

        If none of them exists, `matching` is 0.
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
        """Returns the token that may follow the text and some guesses. `place` is the place of the
        text with these guesses. Returns None if the place has no match."""
        if not place.matching:
            return None
        past = place.source - len(self._ids)
        return self._ids[place.source] if past < 0 else guesses[past]

    def moved(self, place: Place, guesses: List[int]) -> Place:
        """Returns the place of the text with some guesses. `place` is the place of the text without
        the last guess."""
        last = [*self._ids[-2:], *guesses][-3:]
        before = self.token(place, guesses)
        return self._moved(place, last, -1 if before is None else before, len(self._ids))

    def _moved(self, place: Place, last: List[int], expected: int, end: int) -> Place:
        """Returns the place after a new token.

        Args:
            place: the place before the new token.
            last: the last tokens, up to three. The new token is last[-1].
            expected: the token at `place.source`. The match goes on if the new token is the same.
                -1: there is no match.
            end: the number of tokens of the text before the new token, without guesses.
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
