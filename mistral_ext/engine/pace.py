"""How much of a prompt is read between two decode steps of other sequences.

A pass of a long prompt takes many times as long as a decode step, and streams would stand still
meanwhile. So the pass is made in parts of some layers each, with a decode step after each part.
Parts change no bit of the result, because each layer still sees all tokens of the pass. A pass of
many tokens costs less for each token, as it unpacks the weights once for all of them; so passes
have as many tokens as one layer has time for.
"""

from __future__ import annotations

# A part of a pass takes at most this share of the time of a decode step. So the gap between two
# tokens of a stream is twice its usual length, and rarely three times: times vary.
_SHARE = 1.0

# A pass gets more tokens as long as this many layers fit into a part: a layer then still fits if
# the tokens are twice as many and each costs more, for instance because the prompt has grown long.
_LAYERS_TO_SPARE = 4

_NEWEST = 0.2  # weight of the last measurement


class Pace:
    """Measures passes, and decides how long the next may be.

    Args:
        layers: of the model.
        least, most: tokens of a pass.

    Attributes:
        tokens: of the next pass of prompts beside sequences that generate, at most.
    """

    def __init__(self, layers: int, least: int, most: int) -> None:
        self.tokens = least
        self._layers = layers
        self._least, self._most = least, most
        self._step: float | None = None  # seconds of a decode step
        self._of_layer: float | None = None  # seconds of a layer of the present pass
        self._tokens = 0  # of the present pass

    def note_step(self, seconds: float) -> None:
        """Takes the seconds of a decode step."""
        if self._step is None:
            self._step = seconds
        # A machine that is busy for a moment tells nothing.
        self._step += _NEWEST * (min(seconds, 2 * self._step) - self._step)

    def begin(self, tokens: int) -> None:
        """Begins a pass over so many tokens of prompts."""
        if self._of_layer is not None and tokens > self._tokens:
            self._of_layer *= tokens / self._tokens
        self._tokens = tokens

    def note_read(self, layers: int, seconds: float) -> None:
        """Takes the seconds of some layers of a pass."""
        self._of_layer = seconds / layers

    def end(self) -> None:
        """Ends the pass."""
        fitting = self._fitting()
        if fitting < 1:
            self.tokens = max(self._least, self.tokens // 2)
        elif self._tokens >= self.tokens and fitting >= min(_LAYERS_TO_SPARE, self._layers):
            self.tokens = min(self._most, 2 * self.tokens)

    def layers(self) -> int:
        """How many layers of the pass to compute before the next decode step."""
        return max(1, min(int(self._fitting()), self._layers))

    def _fitting(self) -> float:
        """Layers of the pass that take as long as a part may; 1 while that is unknown."""
        if self._step is None or self._of_layer is None:
            return 1.0
        return _SHARE * self._step / max(self._of_layer, 1e-9)
