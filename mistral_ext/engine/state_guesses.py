"""Guesses the next token from the state of a grammar, as a draft (engine/proposer.py). The guess is
the token that the same text had when it was in this state before.

Most grammars allow several ways to write white space and to end a value. A text mostly keeps to the
way that it chose first.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List

STATES = 3  # the most states that are compared: the current state and the two before it
# A run is the number of times in a row that the same states were followed by the same token. Runs
# above _MOST_RUN count as _MOST_RUN.
_MOST_RUN = 3


class StateGuesses:
    """Remembers what a completion wrote in each state of its grammar.

    Args:
        ids: the tokens of the sequence, a list that grows.
        states: the list `Matcher.states` of the completion. It grows with the completion.
    """

    def __init__(self, ids: List[int], states: List[int]) -> None:
        self._ids = ids
        self._states = states
        # The index of the first token that has to match the grammar.
        self._begin = len(ids) - len(states) + 1
        self._noted = 0
        # For the last states, 1 to STATES of them: the token that followed them the last time, and
        # its run. A run begins at 1. But it begins at 0 if another token followed the time before,
        # because a token that changes is probably content, not form.
        self._after: dict[tuple[int, ...], tuple[int, int]] = {}

    def update(self) -> None:
        """Notes the tokens that have been added to the sequence."""
        for i in range(self._noted, len(self._states) - 1):
            token_id = self._ids[self._begin + i]
            for n in range(1, min(STATES, i + 1) + 1):
                states = tuple(self._states[i + 1 - n : i + 1])
                before, run = self._after.get(states, (token_id, 0))
                self._after[states] = token_id, (run + 1 if before == token_id else 0)
        self._noted = len(self._states) - 1

    def guesses(self, states: List[int]) -> Iterator[tuple[int, int]]:
        """Yields (kind, token) for tokens that may follow. Looks up all of the given states first,
        then the last ones of them, down to the current state alone. There is a kind for each number
        of states and each run, because `Proposer` counts for each kind how often its guesses are
        right.

        Args:
            states: the last states, at most `STATES`. The current state is the last of them.
        """
        for n in range(len(states), 0, -1):
            found = self._after.get(tuple(states[-n:]))
            if found is not None:
                token_id, run = found
                yield (STATES - n) * (_MOST_RUN + 1) + min(run, _MOST_RUN), token_id
