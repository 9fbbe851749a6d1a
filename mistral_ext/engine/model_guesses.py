"""Decides how many guesses of a draft model are worth their time.

A draft model is a smaller model that guesses the next tokens of sequences. One pass of the main
model then checks the guesses. Each token that a pass reads is a *row* of the pass.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mistral_ext.engine.draft_model import DraftModel
from mistral_ext.engine.pass_costs import LEAST_ADVANTAGE, MOST_ROWS, PassCosts
from mistral_ext.engine.sequence import Sequence


@dataclass
class _Plan:
    """A pass that will check the guesses made so far.

    Attributes:
        rows: the number of rows of the pass.
        expected: the number of tokens that the pass is expected to give.
        seconds: the expected time of the draft model's passes that made the guesses.
    """

    rows: int
    expected: float
    seconds: float = 0.0


class ModelGuesses:
    """Asks a draft model for guesses, as long as more guesses promise more tokens per second.

    Args:
        model: the draft model.
        share: an estimate of the time of a pass of the draft model, as a share of the time of a
            pass that checks guesses. It is used until times have been measured.

    Attributes:
        costs: the costs of passes of the draft model.
        pass_costs: the costs of passes that check guesses, which the caller notes here.
    """

    def __init__(self, model: DraftModel, share: float) -> None:
        self.costs = PassCosts()
        self.pass_costs = PassCosts()
        self._model = model
        self._share = share

    def are_worth(self, plain: int, asking: Collection[Sequence]) -> bool:
        """Whether a first guess for each of `asking` is expected to be worth its time. `plain` is
        the number of rows of the pass without guesses."""
        return self._is_worth(_Plan(plain, plain), dict.fromkeys(asking, 1.0))

    def prepare(self, sequences: Collection[Sequence]) -> list[Sequence]:
        """Lets the draft model read the tokens of some sequences. Returns the sequences for which
        it can guess now."""
        return self._model.prepare(sequences)

    def guess(
        self, plain: int, asking: Mapping[Sequence, int]
    ) -> dict[Sequence, list[tuple[int, float]]]:
        """Guesses tokens of sequences that `prepare` has returned. Each guess comes with the chance
        that it is right if all guesses before it are right. A sequence that has to match a grammar
        gets at most one guess, because the sampler knows only which tokens the grammar allows next,
        not which it allows after a guess.

        Args:
            plain: the number of rows of the pass without guesses.
            asking: for each sequence the most guesses that it may have.

        Raises:
            ValueError: no token can be chosen (see `DraftModel.guess`).
        """
        sequences = list(asking)
        guesses: dict[Sequence, list[tuple[int, float]]] = {s: [] for s in sequences}
        # `going` has the sequences that may get another guess, each with the chance that all its
        # guesses so far are right.
        plan, going = _Plan(plain, plain), dict.fromkeys(sequences, 1.0)
        passes = self._model.guess(sequences)
        while self._is_worth(plan, going):
            began = time.perf_counter()
            given = next(passes)
            if self._model.is_usual:
                self.costs.note(self._model.rows, time.perf_counter() - began)
            plan.seconds += self._seconds(self._model.rows)
            for sequence, (token_id, probability) in zip(sequences, given, strict=True):
                if sequence not in going:
                    continue
                index = len(guesses[sequence])
                chance = sequence.proposer.chance_by_model(index, token_id, probability)
                guesses[sequence].append((token_id, chance))
                going[sequence] *= chance
                plan.expected += going[sequence]
                plan.rows += 1
                if sequence.matcher is not None or index + 1 == asking[sequence]:
                    del going[sequence]
        self._take_cost(plan, plain, sequences)
        return guesses

    def keep_only(self, sequences: Collection[Sequence]) -> None:
        """Forgets all sequences but these. The tokens of the others in the draft model's cache may
        then serve later requests."""
        self._model.keep_only(sequences)

    def _is_worth(self, plan: _Plan, going: Mapping[Sequence, float]) -> bool:
        """Whether one more guess for each sequence of `going` is worth its time. The values of
        `going` are the chances that all guesses of a sequence so far are right."""
        if not going or plan.rows + len(going) > MOST_ROWS:
            return False
        more = sum(chance * sequence.proposer.hope for sequence, chance in going.items())
        now = plan.seconds + self._pass_seconds(plan.rows)
        then = plan.seconds + self._seconds(len(going)) + self._pass_seconds(plan.rows + len(going))
        return (plan.expected + more) * now > LEAST_ADVANTAGE * plan.expected * then

    def _take_cost(self, plan: _Plan, plain: int, sequences: Collection[Sequence]) -> None:
        """Subtracts the time of the guesses from the gains of the sequences (`Proposer.gain`). The
        time is counted in tokens that could have been generated in it."""
        for sequence in sequences:
            cost = plain * plan.seconds / self._pass_seconds(plain)
            sequence.proposer.gain -= cost / len(sequences)

    def _pass_seconds(self, rows: int) -> float:
        return self.pass_costs.seconds(rows) or 1.0

    def _seconds(self, rows: int) -> float:
        """The expected time of a pass of the draft model."""
        return self.costs.seconds(rows) or self._share * self._pass_seconds(rows)
