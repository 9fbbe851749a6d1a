"""How many guesses of a draft model are worth its time."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mistral_ext.engine.draft_model import DraftModel
from mistral_ext.engine.pass_costs import MOST_ROWS, PassCosts
from mistral_ext.engine.sequence import Sequence

_LEAST_ADVANTAGE = 1.02  # expected tokens per second with another guess, relative to those without


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
        pass_costs: of the passes that check guesses.
        share: the time of a pass of the model relative to those, as long as it was not measured.

    Attributes:
        costs: of the passes of the draft model.
    """

    def __init__(self, model: DraftModel, pass_costs: PassCosts, share: float) -> None:
        self.costs = PassCosts()
        self._model = model
        self._pass_costs = pass_costs
        self._share = share

    def are_worth(self, plain: int, asking: Collection[Sequence]) -> bool:
        """Whether first guesses are expected to be worth their time, for some sequences of a pass
        of `plain` rows."""
        return self._is_worth(_Plan(plain, plain), dict.fromkeys(asking, 1.0))

    def guess(
        self, plain: int, asking: Mapping[Sequence, int]
    ) -> dict[Sequence, list[tuple[int, float]]]:
        """Guesses for those of the sequences that the model has read, with the chance that each is
        right if all before it are.

        Args:
            plain: rows of the pass without guesses.
            asking: sequences -> guesses at most.

        Raises:
            ValueError: the model chooses no token.
        """
        sequences = self._model.prepare(asking)
        guesses: dict[Sequence, list[tuple[int, float]]] = {s: [] for s in sequences}
        plan, going = _Plan(plain, plain), dict.fromkeys(sequences, 1.0)  # chances so far
        passes = self._model.guess(sequences)
        while self._is_worth(plan, going):
            began = time.perf_counter()
            given = next(passes)
            if self._model.is_usual:
                self.costs.note(len(sequences), time.perf_counter() - began)
            plan.seconds += self._seconds(len(sequences))
            for sequence, (token_id, probability) in zip(sequences, given, strict=True):
                if sequence not in going:
                    continue
                chance = sequence.proposer.chance_by_model(probability)
                guesses[sequence].append((token_id, chance))
                going[sequence] *= chance
                plan.expected += going[sequence]
                plan.rows += 1
                if len(guesses[sequence]) == asking[sequence] or not _may_come(
                    sequence, [guess for guess, _ in guesses[sequence]]
                ):
                    del going[sequence]
        self._take_cost(plan, plain, sequences)
        return guesses

    def keep_only(self, sequences: Collection[Sequence]) -> None:
        """Frees the memory of all other sequences."""
        self._model.keep_only(sequences)

    def _is_worth(self, plan: _Plan, going: Mapping[Sequence, float]) -> bool:
        """Whether another guess for each of some sequences is, given the chance that all of its
        guesses so far are right."""
        if not going or plan.rows + len(going) > MOST_ROWS:
            return False
        more = sum(chance * sequence.proposer.hope for sequence, chance in going.items())
        now = plan.seconds + self._pass_seconds(plan.rows)
        then = plan.seconds + self._seconds(len(going)) + self._pass_seconds(plan.rows + len(going))
        return (plan.expected + more) * now > _LEAST_ADVANTAGE * plan.expected * then

    def _take_cost(self, plan: _Plan, plain: int, sequences: Collection[Sequence]) -> None:
        """Has sequences pay for the time of the guesses, in tokens that it could have given."""
        for sequence in sequences:
            cost = plain * plan.seconds / self._pass_seconds(plain)
            sequence.proposer.gain -= cost / len(sequences)

    def _pass_seconds(self, rows: int) -> float:
        return self._pass_costs.seconds(rows) or 1.0

    def _seconds(self, sequences: int) -> float:
        """Of a pass of the draft model."""
        return self.costs.seconds(sequences) or self._share * self._pass_seconds(sequences)


def _may_come(sequence: Sequence, token_ids: list[int]) -> bool:
    """Whether the last of some tokens may come where the sequence has to match a grammar."""
    matcher = sequence.matcher
    return matcher is None or matcher.count_allowed(token_ids) == len(token_ids)
