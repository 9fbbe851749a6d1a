"""Decides how much of a prompt is read between two decode steps of other sequences.

A pass over a long prompt takes many times as long as a decode step. Without pauses, the texts of
other sequences would stand still meanwhile. So the pass is divided into parts of some layers each,
with a decode step after each part. The parts change no bit of the result, because each layer still
sees all tokens of the pass.

A pass with more tokens costs less for each token, because it unpacks the weights once for all of
them. So passes get more and more tokens, as long as a part still has room for a few layers.

If more sequences wait for their prompts than generate, prompts get more than half of the time.
Otherwise one sequence that generates would hold back all that wait.
"""

from __future__ import annotations

# A part may take as long as one decode step, or as several, at most this many, if more sequences
# wait for their prompts than generate. A part as long as one decode step at most doubles the time
# between two tokens of a sequence. Now and then a part takes longer than planned, because its time
# is predicted from that of earlier parts. A part has at least one layer, even if that takes longer.
_MOST_STEPS = 4.0

# A pass gets twice as many tokens as the last one only if this many layers of the last one fit into
# a part. Then at least one layer of the larger pass fits into a part, even if each token costs
# more, for instance because the prompt has become long.
_LAYERS_TO_SPARE = 4

_NEWEST = 0.2  # the weight of the last measurement in the average of all


class Pace:
    """Measures passes, and decides how many tokens the next pass of prompts may have, and how many
    of its layers are computed before the next decode step.

    Args:
        layers: the number of layers of the model.
        least, most: bounds of the number of tokens of a pass.

    Attributes:
        tokens: the most tokens of a pass if a part may take as long as one decode step. If parts
            may take longer, a pass may have more (`most_tokens`).
    """

    def __init__(self, layers: int, least: int, most: int) -> None:
        self.tokens = least
        self._layers = layers
        self._least, self._most = least, most
        self._steps = 1.0  # decode steps that the next part of a pass may take
        self._planned = 1.0  # the value of _steps when the current pass began
        self._is_full = False  # whether the current pass has as many tokens as it may have
        self._step: float | None = None  # seconds of a decode step
        self._of_layer: float | None = None  # seconds of a layer of the current pass
        self._tokens = 0  # tokens of the current pass

    def note_step(self, seconds: float) -> None:
        """Notes how many seconds a decode step took."""
        if self._step is None:
            self._step = seconds
        # A measurement is too long if the machine was busy with something else for a moment. So it
        # counts as at most twice the average.
        self._step += _NEWEST * (min(seconds, 2 * self._step) - self._step)

    def divide(self, waiting: int, generating: int) -> None:
        """Divides the time between prompts and decode steps. Call this before each part of a pass.

        Args:
            waiting: the number of sequences that generate as soon as their prompts are read.
            generating: the number of sequences that generate now, at least 1.
        """
        self._steps = min(max(waiting / generating, 1.0), _MOST_STEPS)

    @property
    def most_tokens(self) -> int:
        """The most tokens of a pass that begins now."""
        tokens = int(self._steps * self.tokens) // self._least * self._least
        return min(self._most, tokens)

    def begin(self, tokens: int) -> None:
        """Begins a pass over this many tokens of prompts."""
        if self._of_layer is not None and tokens > self._tokens:
            self._of_layer *= tokens / self._tokens
        self._tokens = tokens
        self._is_full = tokens >= self.most_tokens
        self._planned = self._steps

    def note_read(self, layers: int, seconds: float) -> None:
        """Notes how many seconds this many layers of the pass took together."""
        self._of_layer = seconds / layers

    def end(self) -> None:
        """Ends the pass, and adapts `tokens` to the time that its layers took."""
        fitting = self._fitting(self._planned)
        if fitting < 1:
            self.tokens = max(self._least, self.tokens // 2)
        elif self._is_full and fitting >= min(_LAYERS_TO_SPARE, self._layers):
            self.tokens = min(self._most, 2 * self.tokens)

    def layers(self) -> int:
        """How many layers of the pass to compute before the next decode step."""
        return max(1, min(int(self._fitting(self._steps)), self._layers))

    def _fitting(self, steps: float) -> float:
        """The number of layers of the pass that fit into a part that takes `steps` decode steps. It
        is 1 until times have been measured."""
        if self._step is None or self._of_layer is None:
            return 1.0
        return steps * self._step / max(self._of_layer, 1e-9)
