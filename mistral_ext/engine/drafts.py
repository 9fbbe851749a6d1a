"""Drafts: guesses of sequences' next tokens, which one pass checks beside the next tokens.

A draft is accepted only if it is the token that would have been chosen without it, so drafts change
the speed of a text and nothing else. `Drafter` decides which of the tokens that a `Proposer`
proposes are worth their rows in a pass.

Source: Leviathan et al. 2022, arXiv:2211.17192.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from collections.abc import Sequence as List

from mistral_ext.engine.sequence import Sequence

_log = logging.getLogger("mistral_ext")

# Up to this many rows a pass computes each with the bits that it has alone (`ops.linear`).
_MOST_ROWS = 8

# The tokens that wrong drafts may cost a sequence: so many, and this share of its completion.
_ALLOWANCE, _ALLOWED_SHARE = 0.5, 0.01

_LEAST_ADVANTAGE = 1.02  # expected tokens per second, relative to no drafts
_COST_OF_A_ROW = 0.15  # relative to a pass, as long as it was not measured
_NEWEST = 0.2  # weight of the last measurement
_MEMORY = 512  # passes after which a measurement is forgotten


class PassCosts:
    """The seconds of decode passes, by their number of rows."""

    def __init__(self) -> None:
        self._passes = 0
        self._seconds: dict[int, tuple[float, int]] = {}  # rows -> (seconds, pass that told)

    def note(self, rows: int, seconds: float) -> None:
        """Counts a pass."""
        self._passes += 1
        before = self._seconds.get(rows)
        if before is not None:
            # A machine that is busy for a moment tells nothing.
            seconds = before[0] + _NEWEST * (min(seconds, 2 * before[0]) - before[0])
        self._seconds[rows] = seconds, self._passes
        for other, (_, told) in list(self._seconds.items()):
            if self._passes - told > _MEMORY:
                del self._seconds[other]

    def seconds(self, rows: int) -> float | None:
        """An estimate; None: no pass was measured."""
        if not self._seconds:
            return None
        nearest = min(self._seconds, key=lambda known: abs(known - rows))
        grown = 1 + _COST_OF_A_ROW * abs(rows - nearest)
        seconds = self._seconds[nearest][0]
        return seconds * grown if rows >= nearest else seconds / grown


def _proposed(sequence: Sequence, most: int) -> List[tuple[int, float]]:
    """`Proposer.propose`; nothing, from now on, for a sequence for which it fails."""
    try:
        return sequence.proposer.propose(most, sequence.matcher)
    except Exception as error:
        sequence.proposer.gain = -math.inf
        _log.warning("a completion goes on without drafts: %s", error, exc_info=error)
        return []


class Drafter:
    """Decides which drafts the sequences of a pass get."""

    def __init__(self) -> None:
        self._costs = PassCosts()

    def choose(self, sequences: List[Sequence], room: List[int]) -> dict[Sequence, list[int]]:
        """The drafts that make a pass worth more than it costs.

        Args:
            sequences: of the pass, all of them, with a row each.
            room: how many drafts each of them may have.
        """
        plain = len(sequences)
        cost = self._costs.seconds(plain)
        if cost is None or plain >= _MOST_ROWS:
            return {}
        rows: list[tuple[float, Sequence, int]] = []  # chance, sequence, token
        for sequence, most in zip(sequences, room, strict=True):
            generated = len(sequence.ids) - sequence.prompt_length
            proposer = sequence.proposer
            if not most or proposer.gain < -_ALLOWANCE - _ALLOWED_SHARE * generated:
                continue
            chance = 1.0
            for token, of_token in _proposed(sequence, most):
                chance *= of_token
                rows.append((chance, sequence, token))
        rows.sort(key=lambda row: -row[0])  # stable: drafts of a sequence stay in their order
        best, count, expected = _LEAST_ADVANTAGE * plain / cost, 0, float(plain)
        for i, (chance, _, _) in enumerate(rows[: _MOST_ROWS - plain], 1):
            expected += chance
            rate = expected / (self._costs.seconds(plain + i) or cost)
            if rate > best:
                best, count = rate, i
        drafts: dict[Sequence, list[int]] = {}
        for _, sequence, token in rows[:count]:
            drafts.setdefault(sequence, []).append(token)
        return drafts

    def note(
        self,
        plain: int,
        seconds: float,
        drafts: Mapping[Sequence, List[int]],
        accepted: Mapping[Sequence, int],
    ) -> None:
        """Counts a pass.

        Args:
            plain: its sequences.
            seconds: that it took.
            drafts: that were in it.
            accepted: how many of each sequence's drafts were right.
        """
        rows = plain + sum(map(len, drafts.values()))
        self._costs.note(rows, seconds)
        before, after = self._costs.seconds(plain), self._costs.seconds(rows)
        if not drafts or not before or not after:
            return
        cost = max(0.0, plain * (after / before - 1)) / (rows - plain)  # of a draft, in tokens
        for sequence, given in drafts.items():
            sequence.proposer.note(len(given), accepted[sequence], cost * len(given))
