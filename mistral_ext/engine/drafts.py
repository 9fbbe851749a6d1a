"""Chooses drafts, which are guesses of the next tokens of sequences. The pass that computes the
next token of a sequence also checks its drafts. Each token that the pass reads is a *row* of the
pass: one for each sequence, and one for each draft.

A draft is accepted only if that pass chooses the same token. On the CPU a token gets the same bits
in all passes of 1 to 8 rows, so drafts change only the speed of a text. On a GPU, the number of
rows decides how attention splits its sums. So with drafts another token may be chosen if two tokens
are almost equally likely. A `Proposer` or a draft model proposes tokens. `Drafter` decides which of
them are worth a row in a pass.

Source: Leviathan et al. 2022, arXiv:2211.17192.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as List
from typing import TypeVar

import torch

from mistral_ext.engine.model_guesses import ModelGuesses
from mistral_ext.engine.params import MOST_DRAFTS
from mistral_ext.engine.pass_costs import LEAST_ADVANTAGE, MOST_ROWS, PassCosts
from mistral_ext.engine.sequence import Sequence
from mistral_ext.engine.slots import SlotPool

_T = TypeVar("_T")

_log = logging.getLogger("mistral_ext")

# The time that wrong drafts cost a sequence is counted in tokens that could have been generated
# meanwhile. A sequence may lose _ALLOWANCE tokens, plus _ALLOWED_SHARE of the length of its
# completion. Beyond that it gets no more drafts.
_ALLOWANCE, _ALLOWED_SHARE = 0.5, 0.01

# The most tokens to guess at a time without a draft model, by default. On a GPU, drafts may change
# a text, and nobody has measured how they change the speed. So the default there is 0.
_DRAFTS = {"cpu": MOST_DRAFTS, "cuda": 0}


def default_drafts(device: torch.device, has_draft_model: bool) -> int:
    """The most tokens to guess at a time, for requests that do not set `drafts`."""
    return MOST_DRAFTS if has_draft_model else _DRAFTS[device.type]


def room_for_drafts(sequence: Sequence, pool: SlotPool, drafts: int, unknown: int) -> int:
    """How many drafts a sequence may have in the next step.

    Args:
        sequence: the sequence, which is running.
        pool: the cache that holds the sequence's extent.
        drafts: the most drafts, if the sequence's request does not set a number.
        unknown: the number of the sequence's tokens that steps under way compute. These tokens come
            before the drafts.
    """
    params = sequence.request.params
    if params is None or not sequence.generates:
        return 0
    most = drafts if params.drafts is None else params.drafts
    wanted = sequence.request.max_length - len(sequence.ids) - unknown - 1
    return max(0, min(most, wanted, pool.room_for_drafts(sequence.place)))


def _may_lose(sequence: Sequence) -> bool:
    """Whether wrong drafts have cost the sequence no more than it may lose."""
    generated = len(sequence.ids) - sequence.prompt_length
    return sequence.proposer.gain >= -_ALLOWANCE - _ALLOWED_SHARE * generated


def _tried(sequences: Collection[Sequence], work: Callable[[], _T], nothing: _T) -> _T:
    """Calls `work` and returns its result. If `work` fails, returns `nothing`, and the sequences
    get no drafts from the next pass on."""
    try:
        return work()
    except Exception as error:
        for sequence in sequences:
            sequence.proposer.gain = -math.inf
            _log.warning("a completion goes on without drafts: %s", error, exc_info=error)
        return nothing


class Drafter:
    """Decides which drafts the sequences of a pass get.

    Args:
        model: the draft model. It guesses tokens of a sequence if its guesses are likelier to be
            right than those from the sequence's text or grammar. None: there is no draft model.
    """

    def __init__(self, model: ModelGuesses | None = None) -> None:
        self._costs = PassCosts() if model is None else model.pass_costs
        self._model = model

    def choose(
        self, sequences: List[Sequence], room: List[int], unknown: int = 0
    ) -> dict[Sequence, list[int]]:
        """Chooses the drafts of a pass, so that it gives the most expected tokens per second.

        Args:
            sequences: all sequences of the pass. Each has one row without drafts.
            room: for each sequence the most drafts that it may have.
            unknown: the number of tokens of each sequence that steps under way still compute. These
                tokens come before the drafts, so they have to be guessed too. A draft model does
                not guess beyond them.

        Returns:
            The drafts of each sequence that gets any. An empty list means that the draft model
            should guess for the sequence, but first needs its unknown tokens. There are empty lists
            only if `unknown` is not 0.
        """
        plain = len(sequences)
        cost = self._costs.seconds(plain)
        if cost is None or plain >= MOST_ROWS:
            return {}
        given = zip(sequences, room, strict=True)
        drafting = {sequence: most for sequence, most in given if most and _may_lose(sequence)}
        proposed = {s: self._proposed(s, unknown + most) for s, most in drafting.items()}
        ready = self._ready(plain, proposed)
        # For each row that a draft may get: the chance that the draft is right, its sequence, its
        # token.
        rows: list[tuple[float, Sequence, int]] = []
        for sequence, guesses in proposed.items():
            if sequence not in ready:
                rows += _rows(sequence, guesses, unknown)
        if unknown:
            return {sequence: [] for sequence in ready} | self._best(rows, plain, cost)
        guessed = self._guessed(plain, {sequence: drafting[sequence] for sequence in ready})
        for sequence, guesses in guessed.items():
            rows += _rows(sequence, guesses)
        return self._best(rows, plain, cost)

    def keep_only(self, sequences: Collection[Sequence]) -> None:
        """Forgets all sequences but these."""
        if self._model is not None:
            self._model.keep_only(sequences)

    def _proposed(self, sequence: Sequence, most: int) -> List[tuple[int, float]]:
        propose = sequence.proposer.propose
        return _tried([sequence], lambda: propose(most, sequence.matcher), [])

    def _ready(
        self, plain: int, proposed: Mapping[Sequence, List[tuple[int, float]]]
    ) -> List[Sequence]:
        """Chooses the sequences for which the draft model should guess, and lets it read their
        tokens.

        Args:
            proposed: for each sequence the guesses from its text and grammar.
        """
        model = self._model
        if model is None or not model.are_worth(plain, proposed):
            return []
        asking = [s for s, guesses in proposed.items() if s.proposer.prefers_model(guesses)]
        return _tried(asking, lambda: model.prepare(asking), [])

    def _guessed(
        self, plain: int, asking: Mapping[Sequence, int]
    ) -> Mapping[Sequence, List[tuple[int, float]]]:
        model = self._model
        if model is None or not asking:
            return {}
        return _tried(asking, lambda: model.guess(plain, asking), {})

    def _best(
        self, rows: list[tuple[float, Sequence, int]], plain: int, cost: float
    ) -> dict[Sequence, list[int]]:
        """Takes the most likely drafts. Takes as many as give the most expected tokens per second,
        and no drafts if this is hardly more than without them (`LEAST_ADVANTAGE`)."""
        # A draft is never likelier than those before it in its sequence. So this sort, which is
        # stable, keeps the drafts of each sequence in order.
        rows.sort(key=lambda row: -row[0])
        best, count, expected = LEAST_ADVANTAGE * plain / cost, 0, float(plain)
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
        """Notes the time of a pass, and which of its drafts were right.

        Args:
            plain: the number of sequences of the pass.
            seconds: the time that the pass took. None: its time was unusual and is not noted.
            drafts: the drafts of each sequence that were in the pass.
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
        # The cost of one draft, in tokens that could have been generated in the same time.
        cost = max(0.0, plain * (after / before - 1)) / (rows - plain)
        for sequence, given in drafts.items():
            sequence.proposer.note(accepted[sequence], cost * len(given))


def _rows(
    sequence: Sequence, guesses: List[tuple[int, float]], unknown: int = 0
) -> list[tuple[float, Sequence, int]]:
    """Returns the guesses without the first `unknown` ones, because steps under way compute those
    tokens. Each guess has the chance that it and all guesses before it are right."""
    rows, chance = [], 1.0
    for i, (token, of_token) in enumerate(guesses):
        chance *= of_token
        if i >= unknown:
            rows.append((chance, sequence, token))
    return rows
