"""Runs decode steps as CUDA graphs on a CUDA device.

A GPU may finish a step faster than Python can launch its kernels. So a step is captured as a CUDA
graph and replayed. All values that differ between steps are in device memory: tokens, positions,
and the state of `Sampler`. If a step has the same sequences as the last step, the graph of the last
step has already updated these values. Then the host launches the step before it knows the tokens of
the last step, and the GPU need not wait for the host. For any other step the host copies the values
to the device.

With drafts or a grammar, the host has to know the tokens of a step before it launches the next
step, so it waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from mistral_ext.engine.runner import Runner, Step, Verified, captures_steps, choose
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import Extent, SlotPool
from mistral_ext.model.transformer import Transformer


class _Choice(Enum):
    """The code that chooses the tokens of a step."""

    LARGEST = "the product with the output matrix"
    DRAWN = "the sampler"
    BY_CALLER = "the caller, from the logits"


class GraphRunner(Runner):
    """Queues decode steps on a CUDA device. `launch` does not wait for their results.

    There is a graph for each *kind* of step. A kind is a number of tokens, a way to choose them,
    with or without biases, and with or without adapters. Graphs for only some numbers of tokens
    would need padded batches, which would slow their steps. The second step of a kind captures its
    graph, which takes about as long as one step that Python launches.

    The runner keeps its graphs. Only graphs with adapters are dropped when a stack of adapters'
    weights (see `model.adapters`) is made, replaced or removed, because they read these stacks.

    A graph treats a draft as a sequence of its own, which shares the ring of the sequence that it
    belongs to. So a pass with drafts is a step with as many sequences as the pass has tokens. Its
    results are read before `verify` returns, because they decide how far each sequence advances.

    Args:
        model, pool, sampler: the arguments of `Runner`, on the device.
        device: an object that captures work as graphs, and copies results to the host. None: a
            `CudaGraphs`.
    """

    ahead = 1
    pauses = False

    def __init__(
        self,
        model: Transformer,
        pool: SlotPool,
        sampler: Sampler,
        device: CudaGraphs | None = None,
    ) -> None:
        super().__init__(model, pool, sampler)
        self._device = device or CudaGraphs(model.device)
        self._captured: dict[tuple[int, _Choice, bool, bool], _CapturedStep] = {}
        self._last: _CapturedStep  # the step that ran last
        self._generation = model.adapters.generation

    def launch(
        self,
        extents: Sequence[Extent],
        rows: Sequence[int],
        token_ids: Sequence[int] | None,
        adapters: Sequence[int] = (),
    ) -> Step:
        choice = _Choice.LARGEST if self._sampler.needs_no_draw(rows) else _Choice.DRAWN
        step = self._captured_step(len(rows), choice, adapters)
        if token_ids is None:
            step.follow(self._last)
        else:
            table = self._pool.table(dict.fromkeys(extents, 1))
            step.start(rows, token_ids, table, adapters)
        self._last = step
        is_usual, results = step.is_captured, step.run()
        return Step(results.token_ids, results.logits, is_usual)

    def _verify_rows(
        self, token_ids: Sequence[int], table: Tensor, adapters: Sequence[int], greedy: bool
    ) -> Verified:
        choice = _Choice.LARGEST if greedy else _Choice.BY_CALLER
        step = self._captured_step(len(token_ids), choice, adapters)
        # The rows of the sampler may be any, because this step draws no token with the sampler.
        step.start([0] * len(token_ids), token_ids, table, adapters)
        is_usual, results = step.is_captured, step.run()
        return Verified(results.logits, results.token_ids() if greedy else None, is_usual)

    def _captured_step(self, size: int, choice: _Choice, adapters: Sequence[int]) -> _CapturedStep:
        """Returns the `_CapturedStep` of a kind. It keeps its graph for later steps."""
        if self._generation != self._model.adapters.generation:
            self._generation = self._model.adapters.generation
            for old in [kind for kind in self._captured if kind[-1]]:
                del self._captured[old]  # its graph reads stacks of adapters that were freed
        adapted = max(adapters, default=-1) >= 0
        kind = size, choice, choice is _Choice.DRAWN and self._sampler.biased, adapted
        if kind not in self._captured:
            self._captured[kind] = _CapturedStep(
                size, choice, adapted, self._model, self._pool, self._sampler, self._device
            )
        return self._captured[kind]


class _Results:
    """Copies of the results of one step. They are needed because the next step overwrites the
    memory of the graph."""

    def __init__(self, size: int, vocab_size: int, device: CudaGraphs) -> None:
        self.logits = torch.empty(size, vocab_size, dtype=torch.float32, device=device.name)
        self._token_ids = device.host_copy(size)

    def keep(self, token_ids: Tensor | None, logits: Tensor) -> None:
        self.logits.copy_(logits)
        if token_ids is not None:
            self._token_ids.start(token_ids)

    def token_ids(self) -> list[int]:
        return self._token_ids.wait()


class _CapturedStep:
    """A step for a fixed number of tokens, and its state on the device."""

    @torch.inference_mode(False)  # tensors made in inference mode cannot be changed outside of it
    def __init__(
        self,
        size: int,
        choice: _Choice,
        adapted: bool,
        model: Transformer,
        pool: SlotPool,
        sampler: Sampler,
        device: CudaGraphs,
    ) -> None:
        self._choice = choice
        self._adapted = adapted
        self._model = model
        self._pool = pool
        self._sampler = sampler
        self._device = device
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device.name)
        self._rows = torch.zeros_like(self._tokens)
        self._sequences = torch.zeros(size, 5, dtype=torch.int64, device=device.name)
        self._adapters = torch.full_like(self._tokens, -1, dtype=torch.int32)
        vocab_size = model.output.shape[0]
        self._results = [_Results(size, vocab_size, device) for _ in range(GraphRunner.ahead + 1)]
        self._sampled: Tensor | None = None  # token ids of the last step
        self._logits: Tensor
        self._runs = 0
        self._replay: Callable[[], None] | None = None

    @property
    def is_captured(self) -> bool:
        """Whether the next run only replays a graph."""
        return self._replay is not None

    def start(
        self,
        rows: Sequence[int],
        token_ids: Sequence[int],
        sequences: Tensor,
        adapters: Sequence[int],
    ) -> None:
        self._rows.copy_(torch.tensor(rows, device="cpu"))
        self._tokens.copy_(torch.tensor(token_ids, device="cpu"))
        self._sequences.copy_(sequences)
        if self._adapted:
            self._adapters.copy_(torch.tensor(adapters, dtype=torch.int32, device="cpu"))

    def follow(self, last: _CapturedStep) -> None:
        """Takes over the rows, tokens, sequences and adapters of the last step. The last step may
        be of another kind: if a new completion has a bias, all later steps add biases."""
        if last is not self:
            self._rows.copy_(last._rows)
            self._tokens.copy_(last._tokens)
            self._sequences.copy_(last._sequences)
            self._adapters.copy_(last._adapters)

    def run(self) -> _Results:
        # The first step also loads the kernels, which is not allowed during a capture.
        if self._runs == 0:
            self.step()
        else:
            if self._replay is None:
                self._replay = self._device.capture(self.step)
            self._replay()
        results = self._results[self._runs % len(self._results)]
        results.keep(self._sampled, self._logits)
        self._runs += 1
        return results

    @torch.inference_mode()
    def step(self) -> None:
        """Does the work to capture. Each time it launches the same kernels on the same memory,
        whatever values this memory has, and does not wait for results."""
        model, sampler = self._model, self._sampler
        adapters = self._adapters if self._adapted else None
        h = model.step(self._tokens, self._sequences, self._pool, max_count=1, adapters=adapters)
        if self._choice is _Choice.BY_CALLER:
            self._logits = model.logits(h)
            return
        greedy = self._choice is _Choice.LARGEST
        self._logits, self._sampled = choose(model, sampler, h, self._rows, greedy)
        # The id -1 means that no token could be chosen. The host reports this later. By that time
        # the next step may have read the id, so it is replaced by an id that exists.
        torch.clamp(self._sampled, min=0, out=self._tokens)
        self._sequences[:, 2].add_(1)


class CudaGraphs:
    """Captures work of a CUDA device as graphs, and copies results to the host.

    Args:
        name: the name of the device.
    """

    def __init__(self, name: torch.device) -> None:
        self.name = name
        # No two graphs run at the same time, because all run on one stream. So they may share
        # memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(name)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Captures the work without doing it. Returns a function that replays it."""
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` is not used here, because it would also collect garbage and give back
        # all unused memory. In the mode "thread_local", other threads of the process may allocate
        # memory during the capture.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay

    def host_copy(self, size: int) -> _HostCopy:
        return _HostCopy(size)


class _HostCopy:
    """Copies int64 values to the host. The copy is queued behind the device's earlier work."""

    def __init__(self, size: int) -> None:
        self._host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
        self._done = torch.cuda.Event()

    def start(self, values: Tensor) -> None:
        self._host.copy_(values, non_blocking=True)
        self._done.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[int]:
        self._done.synchronize()
        return self._host.tolist()


def make_runner(model: Transformer, pool: SlotPool, sampler: Sampler) -> Runner:
    """Makes the runner for the model's device."""
    graphs = model.device.type == "cuda" and captures_steps()
    return (GraphRunner if graphs else Runner)(model, pool, sampler)
