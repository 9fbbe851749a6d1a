"""Guesses the next token from the state of a grammar: what was written in such a state before.

Most grammars leave open how white space is written and where a value ends, and a text mostly keeps
to the way in which it began.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List

STATES = 3  # the present one and those before it, that are compared at most
_MOST_RUN = 3  # longer runs are not told apart


class StateGuesses:
    """What a completion wrote in the states of its grammar.

    Args:
        ids: the tokens of the sequence, a list that grows.
        states: `Matcher.states` of its completion, a list that grows with it.
    """

    def __init__(self, ids: List[int], states: List[int]) -> None:
        self._ids = ids
        self._states = states
        self._begin = len(ids) - len(states) + 1  # of what has to match
        self._noted = 0
        # Last states -> the token that followed the last time, and how many times in a row it did;
        # 0 times if it was another one before. What changes is content rather than form.
        self._after: dict[tuple[int, ...], tuple[int, int]] = {}

    def update(self) -> None:
        """Takes the tokens that have been added to the sequence."""
        for i in range(self._noted, len(self._states) - 1):
            token_id = self._ids[self._begin + i]
            for n in range(1, min(STATES, i + 1) + 1):
                states = tuple(self._states[i + 1 - n : i + 1])
                before, run = self._after.get(states, (token_id, 0))
                self._after[states] = token_id, (run + 1 if before == token_id else 0)
        self._noted = len(self._states) - 1

    def guesses(self, states: List[int]) -> Iterator[tuple[int, int]]:
        """Tokens that may follow, each behind its kind: for as many states as are the same, from
        `STATES` down to 1, a kind for each length of run.

        Args:
            states: the last `STATES` or fewer, the present one included.
        """
        for n in range(len(states), 0, -1):
            found = self._after.get(tuple(states[-n:]))
            if found is not None:
                token_id, run = found
                yield (STATES - n) * (_MOST_RUN + 1) + min(run, _MOST_RUN), token_id
