"""Measures what passes over the weights cost, by their number of rows.

Each token that a pass reads is a row, such as the last token of a sequence, or a draft (a guess of
a later token). The costs tell `drafts` and `model_guesses` how many guesses are worth their time.
"""

from __future__ import annotations

# The most rows of a pass with guesses. Up to this many rows, a pass on the CPU gives each row the
# same bits as a pass of one row (see `ops.linear`). So guesses change no text there.
MOST_ROWS = 8

# More guesses are made only if they raise the expected tokens per second by at least this factor.
LEAST_ADVANTAGE = 1.02

# The cost of one more row, as a share of the cost of a pass. It is used for numbers of rows that
# were not measured.
_COST_OF_A_ROW = 0.15
_NEWEST = 0.2  # the weight of the last measurement in the average of all

# A measurement that is not renewed for this many passes of the engine is forgotten. Otherwise a
# number of rows that once seemed slow might never be chosen, and so never be measured again.
_MEMORY = 512


class PassCosts:
    """Remembers how many seconds decode passes took, by their number of rows."""

    def __init__(self) -> None:
        self._passes = 0
        # Number of rows -> (average seconds, the value of _passes at the last measurement).
        self._seconds: dict[int, tuple[float, int]] = {}

    def note(self, rows: int, seconds: float) -> None:
        """Notes how many seconds a pass took."""
        before = self._seconds.get(rows)
        if before is not None:
            # A measurement is too long if the machine was busy with something else for a moment. So
            # it counts as at most twice the average.
            seconds = before[0] + _NEWEST * (min(seconds, 2 * before[0]) - before[0])
        self._seconds[rows] = seconds, self._passes

    def forget(self) -> None:
        """Counts a pass of the engine, and forgets old measurements."""
        self._passes += 1
        for rows, (_, told) in list(self._seconds.items()):
            if self._passes - told > _MEMORY:
                del self._seconds[rows]

    def seconds(self, rows: int) -> float | None:
        """Returns the expected seconds of a pass, or None if no measurement is remembered."""
        if not self._seconds:
            return None
        nearest = min(self._seconds, key=lambda known: abs(known - rows))
        grown = 1 + _COST_OF_A_ROW * abs(rows - nearest)
        seconds = self._seconds[nearest][0]
        return seconds * grown if rows >= nearest else seconds / grown
