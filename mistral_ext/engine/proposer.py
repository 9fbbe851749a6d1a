"""Proposes the next tokens of a sequence, from its earlier text or its grammar.

Text repeats itself: if the last tokens occur earlier in the sequence, the tokens that followed
there often follow again. A grammar often allows only one next token. If it allows several, the
token that followed earlier in the same state of the grammar is likely.

Source: Saxena 2023, prompt lookup decoding.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as List
from typing import TYPE_CHECKING

from mistral_ext.engine.repeats import Repeats
from mistral_ext.engine.state_guesses import STATES, StateGuesses

if TYPE_CHECKING:
    from mistral_ext.text.grammar import Matcher

# The last tokens of a text may match earlier ones. A match of more tokens counts as this many.
_MOST_MATCHING = 8

# Guesses have kinds. For each kind, this is the share of right guesses that is expected before any
# guess was checked. The expected share counts as much as _EXPECTED_WEIGHT checks.
_EXPECTED = (
    # The guess repeats earlier text. There is a kind for each length of the match before the guess,
    # 0 to _MOST_MATCHING.
    *(0.0, 0.35, 0.35, 0.6, 0.7, 0.8, 0.8, 0.85, 0.9),
    # The grammar forces the token.
    0.95,
    # A draft model guesses. There is a kind for each quarter in which its probability may lie.
    *(0.3, 0.5, 0.7, 0.9),
    # `StateGuesses` guesses by the last 3, 2 or 1 states of the grammar. For each of these numbers
    # there are four kinds: the runs 0, 1, 2, and 3 or more (see `StateGuesses`).
    *(0.2, 0.4, 0.7, 0.9, 0.2, 0.4, 0.7, 0.9, 0.1, 0.2, 0.4, 0.5),
)
_EXPECTED_WEIGHT = 4.0
_FORCED = _MOST_MATCHING + 1
_BY_MODEL = _FORCED + 1  # the first of four kinds
_BY_STATE = _BY_MODEL + 4  # the first kind of `StateGuesses`
_FORGETTING = 0.95  # each check multiplies the weights of earlier checks of its kind by this

# With a grammar, a guess is made only if the chance that all guesses before it are right is at
# least this. Later guesses would hardly ever be right, and it takes time to look them up.
_LEAST_CHANCE = 0.1

# The number of tokens that a GPU could have generated while it waits for the host.
_COST_OF_A_WAIT = 0.1

# The gain is at most this many tokens. A sequence whose gain is too low gets no more drafts (see
# `drafts`). With this limit wrong drafts end soon, however much earlier drafts have gained.
_MOST_GAIN = 4.0


class Proposer:
    """Proposes tokens that may follow in one sequence, and counts which proposals were right.

    Args:
        ids: the tokens of the sequence, a list that grows.
        ends: the tokens that end the sequence. They are never proposed: no pass would read them, so
            a right guess would save no pass.

    Attributes:
        gain: the number of tokens that drafts have gained so far, at most `_MOST_GAIN`. It is
            negative if drafts have cost more than they gained.
    """

    def __init__(self, ids: List[int], ends: Collection[int] = ()) -> None:
        self.gain = 0.0
        self._ids = ids
        self._ends = ends
        self._repeats = Repeats(ids)
        self._states: StateGuesses | None = None
        # The last proposed tokens, each with its kind, which is an index into _EXPECTED.
        self._proposed: list[tuple[int, int]] = []
        self._begin = 0  # the position for which the first of them was proposed
        self._right = [share * _EXPECTED_WEIGHT for share in _EXPECTED]
        self._checked = [_EXPECTED_WEIGHT] * len(_EXPECTED)

    def propose(self, most: int, matcher: Matcher | None) -> list[tuple[int, float]]:
        """Proposes tokens that may follow. Each comes with the chance that it is right if all
        tokens before it are right.

        Args:
            most: the most tokens to propose.
            matcher: knows which tokens the grammar allows next. None: there is no grammar.
        """
        self._check()
        guesses = self._matching(most, matcher) if matcher else self._repeated(most)
        ends = (i for i, (token, _) in enumerate(guesses) if token in self._ends)
        self._proposed, self._begin = guesses[: next(ends, most)], len(self._ids)
        return [(token, self._chance(kind)) for token, kind in self._proposed]

    @property
    def hope(self) -> float:
        """The chance that the next guess of a draft model is right, before it is known which token
        the model guesses."""
        of_model = slice(_BY_MODEL, _BY_STATE)
        return sum(self._right[of_model]) / sum(self._checked[of_model])

    def prefers_model(self, guesses: List[tuple[int, float]]) -> bool:
        """Whether the first guess of a draft model is likelier to be right than the first of
        `guesses`, the result of `propose`. True if there are no `guesses`."""
        return not guesses or guesses[0][1] < self.hope

    def chance_by_model(self, index: int, token: int, probability: float) -> float:
        """Returns the chance that a guess of a draft model is right, if the model gives the token
        this probability. The guess replaces the proposed token `index` and all later ones."""
        kind = _BY_MODEL + min(int(4 * probability), 3)
        self._proposed[index:] = [(token, kind)]
        return self._chance(kind)

    def note(self, accepted: int, cost: float) -> None:
        """Changes the gain after drafts were checked.

        Args:
            accepted: the number of right drafts.
            cost: the cost of the drafts, in tokens that could have been generated instead.
        """
        self.gain = min(self.gain + accepted - cost, _MOST_GAIN)

    def note_wait(self) -> None:
        """Subtracts `_COST_OF_A_WAIT` from the gain, because the next step waits until the tokens
        of the steps under way are known."""
        self.gain -= _COST_OF_A_WAIT

    def _check(self) -> None:
        """Counts right and wrong proposed tokens by their kind, up to the first wrong one. Tokens
        count if the text has reached their positions, even if no pass has checked them."""
        for (token, kind), came in zip(self._proposed, self._ids[self._begin :], strict=False):
            self._right[kind] = _FORGETTING * self._right[kind] + (token == came)
            self._checked[kind] = _FORGETTING * self._checked[kind] + 1
            if token != came:
                break
        self._proposed = []

    def _chance(self, kind: int) -> float:
        return self._right[kind] / self._checked[kind]

    def _repeated(self, most: int) -> list[tuple[int, int]]:
        """Returns the tokens that followed where the last tokens occurred earlier in the text, each
        with its kind. The list is empty if the last tokens did not occur before."""
        place = self._repeats.place()
        tokens: list[int] = []
        guesses: list[tuple[int, int]] = []
        while len(tokens) < most and (token := self._repeats.token(place, tokens)) is not None:
            guesses.append((token, min(place.matching, _MOST_MATCHING)))
            tokens.append(token)
            place = place.next()
        return guesses

    def _matching(self, most: int, matcher: Matcher) -> list[tuple[int, int]]:
        """Guesses the next tokens of a text with a grammar, each with its kind (see `_EXPECTED`). A
        guess is the token that the grammar forces. If it forces none, the guess is the likeliest
        allowed token of those that followed earlier, in the same state or after the same tokens.
        The guesses end where there is no such token."""
        if self._states is None:
            self._states = StateGuesses(self._ids, matcher.states)
        self._states.update()
        ahead, states = matcher.ahead(), matcher.states[-STATES:]
        place = self._repeats.place()
        guesses: list[tuple[int, int]] = []
        tokens: list[int] = []
        forced: list[int] = []
        chance = 1.0
        while len(guesses) < most and chance >= _LEAST_CHANCE:
            forced = forced or ahead.forced()
            if forced:
                token, kind = forced.pop(0), _FORCED
            else:
                likely = self._states.guesses(states)
                by_kind = [(_BY_STATE + kind, token) for kind, token in likely]
                repeated = self._repeats.token(place, tokens)
                if repeated is not None:
                    by_kind.append((min(place.matching, _MOST_MATCHING), repeated))
                by_kind.sort(key=lambda guess: -self._chance(guess[0]))
                allowed = (guess for guess in by_kind if ahead.may_take(guess[1]))
                kind, token = next(allowed, (0, -1))
                if token < 0:
                    break
            guesses.append((token, kind))
            tokens.append(token)
            chance *= self._chance(kind)
            place = self._repeats.moved(place, tokens)
            state = ahead.take(token)
            if state is None:
                break
            states = [*states, state][-STATES:]
        return guesses
