"""How many guesses of a draft model are worth its time."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mistral_ext.engine.draft_model import DraftModel
from mistral_ext.engine.pass_costs import LEAST_ADVANTAGE, MOST_ROWS, PassCosts
from mistral_ext.engine.sequence import Sequence


@dataclass
class _Plan:
    """A pass with the guesses so far.

    Attributes:
        rows: of the pass.
        expected: tokens that it is expected to give.
        seconds: that the guesses took.
    """

    rows: int
    expected: float
    seconds: float = 0.0


class ModelGuesses:
    """Asks a draft model for guesses, as long as they promise more tokens per second.

    Args:
        model: the draft model.
        share: the time of a pass of the model relative to one that checks guesses, as long as it
            was not measured.

    Attributes:
        costs: of the passes of the draft model.
        pass_costs: of the passes that check guesses; the caller adds to it.
    """

    def __init__(self, model: DraftModel, share: float) -> None:
        self.costs = PassCosts()
        self.pass_costs = PassCosts()
        self._model = model
        self._share = share

    def are_worth(self, plain: int, asking: Collection[Sequence]) -> bool:
        """Whether first guesses are expected to be worth their time, for some sequences of a pass
        of `plain` rows."""
        return self._is_worth(_Plan(plain, plain), dict.fromkeys(asking, 1.0))

    def prepare(self, sequences: Collection[Sequence]) -> list[Sequence]:
        """`DraftModel.prepare`."""
        return self._model.prepare(sequences)

    def guess(
        self, plain: int, asking: Mapping[Sequence, int]
    ) -> dict[Sequence, list[tuple[int, float]]]:
        """Guesses for sequences that `prepare` has returned, with the chance that each is right if
        all before it are. A sequence that has to match a grammar gets one guess: see
        `DraftModel.guess`.

        Args:
            plain: rows of the pass without guesses.
            asking: sequences -> guesses at most.

        Raises:
            ValueError: the model chooses no token.
        """
        sequences = list(asking)
        guesses: dict[Sequence, list[tuple[int, float]]] = {s: [] for s in sequences}
        plan, going = _Plan(plain, plain), dict.fromkeys(sequences, 1.0)  # chances so far
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
        """Lets go of all other sequences: others may use what was read of them."""
        self._model.keep_only(sequences)

    def _is_worth(self, plan: _Plan, going: Mapping[Sequence, float]) -> bool:
        """Whether another guess for each of some sequences is, given the chance that all of its
        guesses so far are right."""
        if not going or plan.rows + len(going) > MOST_ROWS:
            return False
        more = sum(chance * sequence.proposer.hope for sequence, chance in going.items())
        now = plan.seconds + self._pass_seconds(plan.rows)
        then = plan.seconds + self._seconds(len(going)) + self._pass_seconds(plan.rows + len(going))
        return (plan.expected + more) * now > LEAST_ADVANTAGE * plan.expected * then

    def _take_cost(self, plan: _Plan, plain: int, sequences: Collection[Sequence]) -> None:
        """Has sequences pay for the time of the guesses, in tokens that it could have given."""
        for sequence in sequences:
            cost = plain * plan.seconds / self._pass_seconds(plain)
            sequence.proposer.gain -= cost / len(sequences)

    def _pass_seconds(self, rows: int) -> float:
        return self.pass_costs.seconds(rows) or 1.0

    def _seconds(self, rows: int) -> float:
        """Of a pass of the draft model."""
        return self.costs.seconds(rows) or self._share * self._pass_seconds(rows)
