"""The decode step: the next token of several completions, in one pass over the weights.

On the CPU a step is done when its call returns. A GPU finishes a step faster than Python can tell
it what to do: there the step of each batch size, and way to choose tokens, is captured as a CUDA
graph and replayed. Everything that differs from step to step is then in the memory of the device,
which brings it up to date by itself: tokens and positions here, the state of sampling in `Sampler`.
So the next step can be launched before the tokens of the last one are known to the host, and the
GPU never waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_ext.engine.cache import RingCache
from mistral_ext.engine.sampling import Sampler
from mistral_ext.model.transformer import Transformer


@dataclass(frozen=True)
class Step:
    """A step that was launched.

    Attributes:
        rings: one for each of its N completions.
        token_ids: waits for the step; the N tokens that it sampled.
        logits: [N, V] fp32, from which they were, for as long as at most `ahead` later steps of as
            many completions have been launched.
    """

    rings: list[int]
    token_ids: Callable[[], list[int]]
    logits: Tensor


class Decoder:
    """Computes a step when it is launched.

    Args:
        model: the weights.
        cache: the rings.
        sampler: its rows are the rings.

    Attributes:
        ahead: steps that may be under way when another is launched.
        captures: whether steps are captured, which another decoder would have to do again.
    """

    ahead = 0
    captures = False

    def __init__(self, model: Transformer, cache: RingCache, sampler: Sampler) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler

    def launch(self, rings: Sequence[int], token_ids: Sequence[int] | None) -> Step:
        """Starts the step that reads one token of each ring and samples the next.

        Args:
            rings: N of them.
            token_ids: N; None: those that the step before, of the same rings, samples.
        """
        model, sampler, device = self._model, self._sampler, self._model.device
        sequences = self._cache.append(dict.fromkeys(rings, 1)).to(device)
        tokens, rows = (torch.tensor(ids, device=device) for ids in (token_ids, rings))
        h = model.step(tokens, sequences, self._cache, max_count=1)
        logits, sampled = _choose(model, sampler, h, rows, sampler.needs_no_draw(rings))
        logits = logits.float()
        sampled = sampler.checked(sampled.tolist(), logits)
        return Step(list(rings), lambda: sampled, logits)


def _choose(
    model: Transformer, sampler: Sampler, h: Tensor, rows: Tensor, greedy: bool
) -> tuple[Tensor, Tensor]:
    """(logits [N, V], token ids [N]) of a step; greedy: what `sampler` says about the rows."""
    if greedy:
        return model.greedy(h, sampler.vocab_size)
    logits = model.logits(h)
    return logits, sampler.draw(rows, logits)


class GraphDecoder(Decoder):
    """Queues a step on a CUDA device and returns at once.

    There is a graph for each number of completions and way to choose their tokens, captured at its
    second step: it lasts as long as the cache and the sampler that it was captured with. Filling up
    to the next of fewer sizes would cost every step something, and a capture costs about as much as
    one step launched by Python.

    Args:
        model, cache, sampler: as above, on the device.
        device: how work is captured and read there.
    """

    ahead = 1
    captures = True

    def __init__(
        self,
        model: Transformer,
        cache: RingCache,
        sampler: Sampler,
        device: CudaGraphs | None = None,
    ) -> None:
        super().__init__(model, cache, sampler)
        self._device = device or CudaGraphs(model.device)
        self._batches: dict[tuple[int, bool, bool], _Batch] = {}

    def launch(self, rings: Sequence[int], token_ids: Sequence[int] | None) -> Step:
        sequences = self._cache.append(dict.fromkeys(rings, 1))
        greedy = self._sampler.needs_no_draw(rings)
        kind = len(rings), greedy, not greedy and self._sampler.biased
        if kind not in self._batches:
            self._batches[kind] = _Batch(
                len(rings), greedy, self._model, self._cache, self._sampler, self._device
            )
        batch = self._batches[kind]
        if token_ids is not None:
            batch.start(rings, token_ids, sequences)
        results = batch.run()
        return Step(list(rings), lambda: self._sampler.checked(*results.read()), results.logits)


class _Results:
    """What one step leaves for the host, while the next one overwrites the graph's own memory."""

    def __init__(self, size: int, vocab_size: int, device: CudaGraphs) -> None:
        self.logits = torch.empty(size, vocab_size, dtype=torch.float32, device=device.name)
        self._token_ids = device.host_copy(size)

    def keep(self, token_ids: Tensor, logits: Tensor) -> None:
        self.logits.copy_(logits)
        self._token_ids.start(token_ids)

    def read(self) -> tuple[list[int], Tensor]:
        return self._token_ids.wait(), self.logits


class _Batch:
    """The step of a number of completions, and its state on the device."""

    def __init__(
        self,
        size: int,
        greedy: bool,
        model: Transformer,
        cache: RingCache,
        sampler: Sampler,
        device: CudaGraphs,
    ) -> None:
        self._greedy = greedy
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._device = device
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device.name)
        self._rows = torch.zeros_like(self._tokens)
        self._sequences = torch.zeros(size, 5, dtype=torch.int64, device=device.name)
        vocab_size = model.output.shape[0]
        self._results = [_Results(size, vocab_size, device) for _ in range(GraphDecoder.ahead + 1)]
        self._sampled = self._logits = None  # of the last step
        self._runs = 0
        self._replay: Callable[[], None] | None = None

    def start(self, rings: Sequence[int], token_ids: Sequence[int], sequences: Tensor) -> None:
        self._rows.copy_(torch.tensor(rings))
        self._tokens.copy_(torch.tensor(token_ids))
        self._sequences.copy_(sequences)

    def run(self) -> _Results:
        # The first step also loads the kernels, which a capture may not.
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
        """Nothing in it depends on a value, waits for the device, or lies elsewhere next time."""
        model, sampler = self._model, self._sampler
        h = model.step(self._tokens, self._sequences, self._cache, max_count=1)
        self._logits, self._sampled = _choose(model, sampler, h, self._rows, self._greedy)
        # -1, where there was nothing to choose from, is an error that the host sees too late.
        torch.clamp(self._sampled, min=0, out=self._tokens)
        self._sequences[:, 2].add_(1)


class CudaGraphs:
    """How a CUDA device repeats work, and how the host reads its results later.

    Args:
        name: the device.
    """

    def __init__(self, name: torch.device) -> None:
        self.name = name
        # Graphs never run at the same time, so they may use the same memory: that of one stream.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capture_stream(name)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work, as a graph; it is not done now."""
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: it also collects garbage and gives all unused memory back. Other
        # threads of the process may go on allocating.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay

    def host_copy(self, size: int) -> _HostCopy:
        return _HostCopy(size)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _HostCopy:
    """int64s, copied to the host behind what the device has to do until then."""

    def __init__(self, size: int) -> None:
        self._host = torch.empty(size, dtype=torch.int64, pin_memory=True)
        self._done = torch.cuda.Event()

    def start(self, values: Tensor) -> None:
        self._host.copy_(values, non_blocking=True)
        self._done.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[int]:
        self._done.synchronize()
        return self._host.tolist()


def decoder(model: Transformer, cache: RingCache, sampler: Sampler) -> Decoder:
    """The one for the model's device."""
    kind = GraphDecoder if model.device.type == "cuda" else Decoder
    return kind(model, cache, sampler)
