"""Repeats decode steps on the CPU without Python between their kernels, like CUDA graphs on a GPU.

A step is recorded for each number of tokens. A recording has fixed addresses. Before each step the
tokens, positions and places in the cache are copied to the memory that the recording reads. A
recording is valid until a weight of the model is replaced, or other kernels are selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not

import torch
from torch import Tensor

from mistral_ext.engine.pass_costs import MOST_ROWS
from mistral_ext.engine.slots import SlotPool
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops.recording import Recording, record


class RecordedSteps:
    """Makes steps for the next tokens of sequences. Each token has a row of the sequence table. The
    row says where its sequence is in the cache (see `mistral_ext.ops`).

    Only steps of up to `MOST_ROWS` tokens without adapters are recorded. The kernels of larger
    steps take much longer than Python does, and a recording keeps the memory that they use.

    Args:
        model: the weights, on the CPU.
        pool: the cache.
    """

    def __init__(self, model: Transformer, pool: SlotPool) -> None:
        self._model = model
        self._pool = pool
        self._steps: dict[int, _Step] = {}

    @torch.inference_mode()
    def run(self, token_ids: Tensor, table: Tensor, adapters: Tensor | None) -> tuple[Tensor, bool]:
        """Makes a step. Returns the result of `Transformer.step`, which the next call with as many
        tokens may overwrite. Also returns whether that call takes about as long as this one: False
        if this call recorded the step.

        Args:
            token_ids: [T] int64.
            table: [T, 5] int64, the sequence table, with a row for each token.
            adapters: as in `Transformer.step`.
        """
        size = len(token_ids)
        if adapters is not None or size > MOST_ROWS:
            h = self._model.step(token_ids, table, self._pool, max_count=1, adapters=adapters)
            return h, True
        if size not in self._steps:
            self._steps[size] = _Step(self._model, self._pool, size)
        return self._steps[size].run(token_ids, table)


class _Step:
    """A step for a fixed number of tokens."""

    def __init__(self, model: Transformer, pool: SlotPool, size: int) -> None:
        self._model = model
        self._pool = pool
        self._token_ids = torch.empty(size, dtype=torch.int64, device="cpu")
        self._table = torch.empty(size, 5, dtype=torch.int64, device="cpu")
        self._h: Tensor  # the result of the recorded step
        # The model's weights at the last call. If there is a recording, it reads these.
        self._weights: Sequence[object] = ()
        self._can_record = True
        self._recording: Recording | None = None

    def run(self, token_ids: Tensor, table: Tensor) -> tuple[Tensor, bool]:
        self._token_ids.copy_(token_ids)
        self._table.copy_(table)
        # A recording has the addresses of the weights, so it is dropped if a weight was replaced.
        model = self._model
        weights = model.embeddings, model.frequencies, *model.weights_of_layers()
        if len(weights) != len(self._weights) or any(map(is_not, weights, self._weights)):
            self._weights, self._can_record, self._recording = weights, True, None
        if self._recording is not None and self._recording.is_valid:
            self._recording.run()
            return self._h, True
        if not self._can_record:
            self._step()
            return self._h, True
        # The old recording has to go first, because Ctrl-C may interrupt `record`. If the old
        # kernels were then selected again, the old recording would be valid again. But it does not
        # write to the `_h` that the interrupted step has made.
        self._recording = None
        self._recording = record(self._step, [self._token_ids])
        self._can_record = self._recording is not None
        return self._h, False

    def _step(self) -> None:
        self._h = self._model.step(self._token_ids, self._table, self._pool, max_count=1)
