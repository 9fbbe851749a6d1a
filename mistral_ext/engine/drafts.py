"""Drafts: guesses of sequences' next tokens, which one pass checks beside the next tokens.

A draft is accepted only if it is the token that would have been chosen without it, so drafts change
the speed of a text and nothing else. `Drafter` decides which of the tokens that a `Proposer` or a
draft model proposes are worth their rows in a pass.

Source: Leviathan et al. 2022, arXiv:2211.17192.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from collections.abc import Sequence as List

from mistral_ext.engine.model_guesses import ModelGuesses
from mistral_ext.engine.pass_costs import MOST_ROWS, PassCosts
from mistral_ext.engine.sequence import Sequence

_log = logging.getLogger("mistral_ext")

# The tokens that wrong drafts may cost a sequence: so many, and this share of its completion.
_ALLOWANCE, _ALLOWED_SHARE = 0.5, 0.01

_LEAST_ADVANTAGE = 1.02  # expected tokens per second, relative to no drafts


def _may_lose(sequence: Sequence) -> bool:
    """Whether wrong drafts have not yet cost the sequence more than they may."""
    generated = len(sequence.ids) - sequence.prompt_length
    return sequence.proposer.gain >= -_ALLOWANCE - _ALLOWED_SHARE * generated


def _proposed(sequence: Sequence, most: int) -> List[tuple[int, float]]:
    """`Proposer.propose`; nothing, from now on, for a sequence for which it fails."""
    try:
        return sequence.proposer.propose(most, sequence.matcher)
    except Exception as error:
        _go_on_without([sequence], error)
        return []


def _go_on_without(sequences: Collection[Sequence], error: Exception) -> None:
    for sequence in sequences:
        sequence.proposer.gain = -math.inf
        _log.warning("a completion goes on without drafts: %s", error, exc_info=error)


class Drafter:
    """Decides which drafts the sequences of a pass get.

    Args:
        costs: of passes; it is added to.
        model: guesses where neither the text nor its grammar does; None: nothing does.
    """

    def __init__(self, costs: PassCosts | None = None, model: ModelGuesses | None = None) -> None:
        self._costs = costs or PassCosts()
        self._model = model

    def choose(
        self, sequences: List[Sequence], room: List[int], unknown: int = 0
    ) -> dict[Sequence, list[int]]:
        """The drafts that make a pass worth more than it costs.

        Args:
            sequences: of the pass, all of them, with a row each.
            room: how many drafts each of them may have.
            unknown: tokens that each sequence has before the drafts, and that are guesses too. A
                draft model does not guess them: a sequence that it may guess for once they are
                known has no drafts in the result.
        """
        plain = len(sequences)
        cost = self._costs.seconds(plain)
        if cost is None or plain >= MOST_ROWS:
            return {}
        given = zip(sequences, room, strict=True)
        drafting = {sequence: most for sequence, most in given if most and _may_lose(sequence)}
        may_ask = self._model is not None and self._model.are_worth(plain, drafting)
        rows: list[tuple[float, Sequence, int]] = []  # chance, sequence, token
        asking: dict[Sequence, int] = {}  # sequences that ask the model -> drafts at most
        for sequence, most in drafting.items():
            guesses = _proposed(sequence, unknown + most)
            if may_ask and sequence.proposer.prefers_model(guesses):
                asking[sequence] = most
            else:
                rows += _rows(sequence, guesses, unknown)
        if unknown:
            return {sequence: [] for sequence in asking} | self._best(rows, plain, cost)
        for sequence, guesses in self._guessed(plain, asking).items():
            rows += _rows(sequence, guesses)
        return self._best(rows, plain, cost)

    def keep_only(self, sequences: Collection[Sequence]) -> None:
        """Frees what the drafts of all other sequences need."""
        if self._model is not None:
            self._model.keep_only(sequences)

    def _guessed(
        self, plain: int, asking: Mapping[Sequence, int]
    ) -> Mapping[Sequence, List[tuple[int, float]]]:
        """`ModelGuesses.guess`; nothing, from now on, for sequences for which it fails."""
        if self._model is None or not asking:
            return {}
        try:
            return self._model.guess(plain, asking)
        except Exception as error:
            _go_on_without(asking, error)
            return {}

    def _best(
        self, rows: list[tuple[float, Sequence, int]], plain: int, cost: float
    ) -> dict[Sequence, list[int]]:
        """The most likely drafts, as many as raise the number of tokens per second most."""
        rows.sort(key=lambda row: -row[0])  # stable: drafts of a sequence stay in their order
        best, count, expected = _LEAST_ADVANTAGE * plain / cost, 0, float(plain)
        for i, (chance, _, _) in enumerate(rows[: MOST_ROWS - plain], 1):
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
        seconds: float | None,
        drafts: Mapping[Sequence, List[int]],
        accepted: Mapping[Sequence, int],
    ) -> None:
        """Counts a pass.

        Args:
            plain: its sequences.
            seconds: that it took; None: its time says nothing about others.
            drafts: that were in it.
            accepted: how many of each sequence's drafts were right.
        """
        rows = plain + sum(map(len, drafts.values()))
        self._costs.forget()
        if self._model is not None:
            self._model.costs.forget()
        if seconds is not None:
            self._costs.note(rows, seconds)
        before, after = self._costs.seconds(plain), self._costs.seconds(rows)
        if not drafts or not before or not after:
            return
        cost = max(0.0, plain * (after / before - 1)) / (rows - plain)  # of a draft, in tokens
        for sequence, given in drafts.items():
            sequence.proposer.note(len(given), accepted[sequence], cost * len(given))


def _rows(
    sequence: Sequence, guesses: List[tuple[int, float]], unknown: int = 0
) -> list[tuple[float, Sequence, int]]:
    """The guesses behind the unknown tokens, with the chance that all up to them are right."""
    rows, chance = [], 1.0
    for i, (token, of_token) in enumerate(guesses):
        chance *= of_token
        if i >= unknown:
            rows.append((chance, sequence, token))
    return rows
