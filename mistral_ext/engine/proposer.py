"""Proposes the next tokens of a sequence, from its earlier text or its grammar.

Text repeats itself, so the tokens that followed the last tokens earlier in the same sequence often
follow again. A grammar often leaves one text only.

Source: Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mistral_ext.text.grammar import Matcher

_NGRAMS = (2, 3)  # tokens that have to match
_MOST_MATCHING = 8  # longer matches are not told apart
_FORCED = _MOST_MATCHING + 1

_BY_MODEL = _FORCED + 1  # the first of four kinds, by the probability that a draft model gives

# The share of drafts that are right before any was checked, by the number of tokens that match;
# then for what a grammar forces, and by a draft model's probability. It counts as much as so many
# checks.
_EXPECTED = (0.0, 0.0, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.3, 0.5, 0.7, 0.9)
_EXPECTED_WEIGHT = 4.0
_FORGETTING = 0.95  # weight of an earlier check at each later check

_COST_OF_A_WAIT = 0.1  # tokens that a GPU could have generated while it waits for the host
_MOST_GAIN = 4.0  # tokens that a sequence may lose again


class Proposer:
    """Proposes tokens that may follow in one sequence, and counts which were right.

    Args:
        ids: the tokens of the sequence, a list that grows.

    Attributes:
        gain: tokens that drafts have gained so far; negative: lost.
    """

    def __init__(self, ids: List[int]) -> None:
        self.gain = 0.0
        self._ids = ids
        self._indexed = 0
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the position that followed it
        self._source = self._matching = 0  # where the guess begins, and the tokens equal before it
        self._first: int | None = None  # of the proposed tokens
        self._kinds: list[int] = []  # of the proposed tokens, indices of the two lists below
        self._right = [share * _EXPECTED_WEIGHT for share in _EXPECTED]
        self._checked = [_EXPECTED_WEIGHT] * len(_EXPECTED)

    def propose(self, most: int, matcher: Matcher | None) -> list[tuple[int, float]]:
        """Tokens that may follow, each with the chance that it is right if all before it are.

        Args:
            most: tokens to propose at most.
            matcher: what the sequence has to match; None: nothing.
        """
        tokens = matcher.forced(most) if matcher else []
        self._kinds = [_FORCED] * len(tokens)
        if not tokens:
            tokens = self._repeated(most)
            if matcher:
                tokens = tokens[: matcher.count_allowed(tokens)]
            matching = range(self._matching, self._matching + len(tokens))
            self._kinds = [min(count, _MOST_MATCHING) for count in matching]
        self._first = tokens[0] if tokens else None
        chances = [self._right[kind] / self._checked[kind] for kind in self._kinds]
        return list(zip(tokens, chances, strict=True))

    @property
    def hope(self) -> float:
        """The chance that a guess of a draft model is right, before it is made."""
        return sum(self._right[_BY_MODEL:]) / sum(self._checked[_BY_MODEL:])

    def prefers_model(self, guesses: List[tuple[int, float]]) -> bool:
        """Whether a draft model's guesses are more likely than these, which `propose` gave."""
        return not guesses or guesses[0][1] < self.hope

    def chance_by_model(self, index: int, probability: float) -> float:
        """The chance of a guess of a draft model, which gives it this probability. It takes the
        place of proposed token `index` and of those behind it."""
        kind = _BY_MODEL + min(int(4 * probability), 3)
        self._kinds[index:] = [kind]
        return self._right[kind] / self._checked[kind]

    def note(self, drafts: int, accepted: int, cost: float) -> None:
        """Counts drafts that were checked.

        Args:
            drafts: the number of proposed tokens, from the first on, that were checked.
            accepted: how many were right, from the first on.
            cost: of the drafts, in tokens that could have been generated instead.
        """
        self.gain = min(self.gain + accepted - cost, _MOST_GAIN)
        for index in range(min(accepted + 1, drafts)):
            self._check(index, index < accepted)

    def note_wait(self) -> None:
        """Counts a wait for the token of which the first proposed token was a guess, and which the
        sequence has now: a step is read before the next one is launched."""
        self.gain -= _COST_OF_A_WAIT
        if self._first is not None:
            self._check(0, self._first == self._ids[-1])

    def _check(self, index: int, is_right: bool) -> None:
        kind = self._kinds[index]
        self._right[kind] = _FORGETTING * self._right[kind] + is_right
        self._checked[kind] = _FORGETTING * self._checked[kind] + 1

    def _repeated(self, most: int) -> list[int]:
        """The tokens that followed the last tokens earlier in the text; none if they are new."""
        self._index()
        tokens: list[int] = []
        if self._matching:
            for at in range(self._source, self._source + most):
                past = at - len(self._ids)
                tokens.append(self._ids[at] if past < 0 else tokens[past])
        return tokens

    def _index(self) -> None:
        ids = self._ids
        for i in range(self._indexed, len(ids)):
            if self._matching and ids[self._source] == ids[i]:
                self._source += 1
                self._matching += 1
            else:
                self._matching = 0
            for n in _NGRAMS:
                if i + 1 < n:
                    continue
                ngram = tuple(ids[i + 1 - n : i + 1])
                found = self._after.get(ngram)
                if found is not None and self._matching < n:
                    self._source, self._matching = found, n
                self._after[ngram] = i + 1
        self._indexed = len(ids)
