"""Times every op on a GPU, next to torch and, where it can be imported, FlashInfer.

    python bench/ops.py --device cuda [--dtype bf16] [--only attention] [--json FILE]
    python bench/ops.py --device cuda --only "attention sm90"    # the kernel of sm_90a: only so

First the two ceilings of the machine: a copy, counting bytes read and written, and a matrix product
of random bf16. Then each op: the bytes that have to be moved once, or the operations where they are
the limit, over its time, and the share of the ceiling. Peers are shown as their time over ours.

A measurement is the median of replays of a CUDA graph of calls on several inputs, so launches cost
what they cost in a captured decode step. Inputs and outputs together are several times the L2
cache, but for calls on less than a few hundred KB, which find theirs there as they do in a model.
The sides take turns. A peer that fails is named with its error, and the rest goes on.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from measure import print_header, print_row, write_json
from shapes import (
    DIM,
    EPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    THETA,
    VOCABULARY,
    WINDOW,
    Rings,
    random,
)
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

from mistral_ext import _C, ops
from mistral_ext.quantize import DEFAULT_GROUP, Quantized

DEVICE = "cuda"
MOST_INPUTS = 64  # in one graph
SECONDS = 0.15  # of replays for each function, within bounds:
LEAST, MOST = 5, 50

Call = Callable[[Any], Any]  # of one set of inputs


@dataclass
class Case:
    """One row of the table.

    Args:
        make: a new set of inputs.
        ours: the op, called with one set.
        peers: what makes a function that does the same; it may fail.
        nbytes: moved by a call, each byte once.
        flops: of a call, where they and not the bytes are the limit.
    """

    op: str
    shape: str
    make: Callable[[], Any]
    ours: Call
    nbytes: int
    flops: int = 0
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)


# ---- Timing


def capture(call: Call, inputs: list[Any]) -> Callable[[], None]:
    """What runs the call on each of the inputs, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, loads and plans what happens once
        for one in inputs[:3]:
            call(one)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the end, so that each call writes to memory of its own.
        results = [call(one) for one in inputs]
    del results
    return graph.replay


def elapsed(run: Callable[[], None], times: int) -> float:
    """Seconds of one of several runs, queued one after the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / times


def median_seconds(runs: list[Callable[[], None]]) -> list[float]:
    """The median time of each, taking turns."""
    plans = []
    for run in runs:
        run()
        one = max(elapsed(run, 2), 1e-6)
        times = max(1, math.ceil(1e-3 / one))  # a millisecond, against the latency of events
        rounds = min(max(LEAST, round(SECONDS / (times * one))), MOST)
        plans.append((run, times, rounds, []))
    for turn in range(MOST):
        for run, times, rounds, samples in plans:
            if turn < rounds:
                samples.append(elapsed(run, times))
    return [statistics.median(samples) for _, _, _, samples in plans]


def beyond_cache() -> int:
    """Bytes that do not fit in L2 by far."""
    return 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size


def measure(case: Case, facts: dict[str, Any]) -> dict[str, Any]:
    count = min(max(2, math.ceil(beyond_cache() / case.nbytes)), MOST_INPUTS)
    inputs = [case.make() for _ in range(count)]
    runs, failures = {"ours": capture(case.ours, inputs)}, {}
    for name, build in case.peers.items():
        try:
            runs[name] = capture(build(), inputs)
        except Exception as error:  # whatever it is, it is the peer's
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            torch.cuda.synchronize()
    seconds = dict(zip(runs, median_seconds(list(runs.values())), strict=True))
    ours = seconds.pop("ours") / count
    rate, peak = (
        (case.flops, facts["matmul_flops"]) if case.flops else (case.nbytes, facts["copy_bytes"])
    )
    return {
        "op": case.op,
        "shape": case.shape,
        "us": ours * 1e6,
        "GB/s": None if case.flops else case.nbytes / ours / 1e9,
        "TFLOP/s": case.flops / ours / 1e12 if case.flops else None,
        "of_peak": rate / ours / peak,
        "peers_us": {name: time / count * 1e6 for name, time in seconds.items()},
        "failures": failures,
    }


def machine() -> dict[str, Any]:
    """What the figures depend on, and the ceilings, per second."""
    device = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": device.name,
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "memory_bytes": device.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": _C.cuda_architectures,
        **ceilings(min(2**31, device.total_memory // 8)),
    }


def ceilings(nbytes: int, size: int = 8192) -> dict[str, float]:
    source = random(nbytes // 2, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (random(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    product = torch.empty_like(a)
    copy, matmul = median_seconds(
        [lambda: target.copy_(source), lambda: torch.mm(a, b, out=product)]
    )
    return {"copy_bytes": 2 * source.nbytes / copy, "matmul_flops": 2 * size**3 / matmul}


# ---- Peers


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def eager_and_compiled(
    function: Callable, arguments: Callable[[Any], tuple]
) -> dict[str, Callable[[], Call]]:
    """Two peers of a function of tensors, which `arguments` takes from a set of inputs."""

    def peer(function):
        return lambda given: function(*arguments(given))

    return {"eager": lambda: peer(function), "compiled": lambda: peer(compiled(function))}


def flashinfer():
    import flashinfer

    return flashinfer


# ---- The rows


def rms_norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    weight = random(DIM, dtype=dtype, device=DEVICE)

    def plain(x):
        return functional.rms_norm(x, (DIM,), weight, EPS)

    def plain_residual(x, residual):
        return functional.rms_norm(residual.add_(x), (DIM,), weight, EPS)

    def ours(given):
        return ops.rms_norm(given.x, weight, EPS)

    def ours_residual(given):
        return ops.rms_norm(given.x, weight, EPS, given.residual)

    def theirs(given):
        return flashinfer().norm.rmsnorm(given.x, weight, EPS)

    def theirs_residual(given):
        return flashinfer().norm.fused_add_rmsnorm(given.x, given.residual, weight, EPS)

    for tokens in (1, 16, 256, 2048):

        def make(tokens=tokens):
            x, residual = random(2, tokens, DIM, dtype=dtype, device=DEVICE)
            # It is added to the residual in every call.
            return SimpleNamespace(x=x * 1e-3, residual=residual.clone())

        nbytes = 2 * tokens * DIM * dtype.itemsize
        peers = eager_and_compiled(plain, lambda given: (given.x,))
        peers["flashinfer"] = lambda: theirs
        yield Case("rms_norm", f"{tokens} x {DIM}", make, ours, nbytes, peers=peers)
        peers = eager_and_compiled(plain_residual, lambda given: (given.x, given.residual))
        peers["flashinfer"] = lambda: theirs_residual
        shape = f"{tokens} x {DIM} + residual"
        yield Case("rms_norm", shape, make, ours_residual, 2 * nbytes, peers=peers)


def random_weight(rows: int, size: int, bits: int | None, dtype: torch.dtype) -> Tensor | Quantized:
    """Any bits will do for the time that they take, so none are quantised."""
    if bits is None:
        return random(rows, size, dtype=dtype, device=DEVICE) / 64
    if bits == 8:
        values = torch.randint(-127, 128, (rows, size), dtype=torch.int8, device=DEVICE)
        scales = torch.full((rows, 1), 1e-4, dtype=torch.bfloat16, device=DEVICE)
    else:
        shape = (rows, size // 8)
        values = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)
        groups = size // DEFAULT_GROUP
        scales = torch.full((rows, groups), 1e-3, dtype=torch.bfloat16, device=DEVICE)
    return Quantized(values, scales)


def linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The products of a decode step, as the model fuses them. The peer is torch's product of plain
    weights alone, without what is fused here."""
    qkv = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    products = {
        "qkv + rope, append": (qkv, DIM),
        "output + residual": ([DIM], DIM),
        "gate, up + swiglu": ([HIDDEN, HIDDEN], DIM),
        "down + residual": ([DIM], HIDDEN),
        "logits": ([VOCABULARY], DIM),
    }

    def call(name: str, given: Any) -> Any:
        if name.endswith("residual"):
            return ops.linear_residual(given.x, given.weights[0], given.residual)
        if name.endswith("swiglu"):
            return ops.linear_swiglu(given.x, *given.weights, given.norm, EPS)
        if name.endswith("append"):
            rings = given.rings.arguments()[3:]
            return ops.linear_rope(given.x, given.weights, given.norm, EPS, *rings, THETA, WINDOW)
        return ops.linear(given.x, given.weights, given.norm, EPS)

    for (name, (rows, size)), bits, tokens in itertools.product(
        products.items(), (None, 8, 4), (1, 8, 16, 64)
    ):

        def make(rows=rows, size=size, bits=bits, tokens=tokens):
            weights = [random_weight(n, size, bits, dtype) for n in rows]
            return SimpleNamespace(
                x=random(tokens, size, dtype=dtype, device=DEVICE),
                norm=random(size, dtype=dtype, device=DEVICE),
                weights=weights,
                whole=torch.cat(weights) if bits is None else None,
                residual=random(tokens, sum(rows), dtype=dtype, device=DEVICE) * 1e-3,
                rings=Rings(tokens, 1, 0, 1, dtype, DEVICE),  # each token starts a sequence
            )

        def theirs(given):
            return functional.linear(given.x, given.whole)

        stored = {None: dtype.itemsize, 8: 1, 4: 0.5 + 2 / DEFAULT_GROUP}[bits]
        outputs = sum(rows) // (2 if name.endswith("swiglu") else 1)
        passes = 2 if name.endswith("residual") else 1
        moved = tokens * (size + passes * outputs) * dtype.itemsize
        if name.endswith("append"):
            moved += tokens * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
        yield Case(
            "linear",
            f"{tokens} x {size} x {sum(rows)}, {name}{f', {bits} bits' if bits else ''}",
            make,
            functools.partial(call, name),
            int(sum(rows) * size * stored) + moved,
            peers={} if bits else {"torch": lambda theirs=theirs: theirs},
        )


def swiglu_cases(dtype: torch.dtype) -> Iterator[Case]:
    def plain(gate, up):
        return functional.silu(gate) * up

    def ours(given):
        return ops.swiglu(*given)

    for tokens in (1, 256, 2048):

        def make(tokens=tokens):
            return random(2, tokens, HIDDEN, dtype=dtype, device=DEVICE).unbind()

        nbytes = 3 * tokens * HIDDEN * dtype.itemsize
        peers = eager_and_compiled(plain, lambda given: given)
        yield Case("swiglu", f"{tokens} x {HIDDEN}", make, ours, nbytes, peers=peers)


def rope_cases(dtype: torch.dtype) -> Iterator[Case]:
    half = HEAD_DIM // 2

    def plain(q, k, v, k_pool, v_pool, cos, sin, rows):
        for x in (q, k):
            turned = torch.cat((-x[..., half:], x[..., :half]), -1)
            x.copy_(x * cos + turned * sin)
        k_pool.index_put_((rows,), k)
        v_pool.index_put_((rows,), v)

    def arguments(given):
        return *given.rings.arguments()[:5], given.cos, given.sin, given.rows

    def ours(given):
        ops.rope(*given.rings.arguments(), THETA, WINDOW)

    for sequences, tokens in ((1, 1), (32, 1), (1, 2048)):

        def make(sequences=sequences, tokens=tokens):
            rings = Rings(sequences, tokens, 0, tokens, dtype, DEVICE)
            frequencies = THETA ** (-torch.arange(half, device=DEVICE) / half)
            positions = torch.arange(tokens, device=DEVICE).repeat(sequences)
            angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]
            heads = torch.arange(sequences * KV_HEADS, device=DEVICE) * tokens
            rows = heads.view(sequences, 1, KV_HEADS) + torch.arange(tokens, device=DEVICE)[:, None]
            return SimpleNamespace(
                rings=rings,
                cos=angles.cos().to(dtype),
                sin=angles.sin().to(dtype),
                rows=rows.view(-1, KV_HEADS),
            )

        # q and k are read and written, v is read, k and v are written to the rings.
        elements = 2 * HEADS + (2 + 1 + 1 + 1) * KV_HEADS
        nbytes = sequences * tokens * elements * HEAD_DIM * dtype.itemsize
        shape = f"{sequences} x {tokens} token{'s' * (tokens > 1)}, with append"
        peers = eager_and_compiled(plain, arguments)
        yield Case("rope", shape, make, ours, nbytes, peers=peers)


def decode_cases(dtype: torch.dtype) -> Iterator[Case]:
    group = HEADS // KV_HEADS

    def plain(rings):
        # Heads of a group as queries of one head: what torch does with enable_gqa, or better.
        q = rings.q.view(-1, KV_HEADS, group, HEAD_DIM)
        return functional.scaled_dot_product_attention(q, rings.k_cache, rings.v_cache)

    def flexible(rings):
        q = rings.q[:, :, None]
        return compiled(flex.flex_attention)(q, rings.k_cache, rings.v_cache, enable_gqa=True)

    def ours(rings):
        return ops.attention(*rings.arguments(), WINDOW, max_count=1)

    for sequences in (1, 8, 32, 128):

        def make(sequences=sequences):
            return Rings(sequences, 1, 3 * WINDOW + 57, WINDOW, dtype, DEVICE)

        def paged(sequences=sequences):
            page = 16
            pages = sequences * WINDOW // page
            workspace = torch.empty(2**27, dtype=torch.uint8, device=DEVICE)
            wrapper = flashinfer().BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=True
            )
            int32 = {"dtype": torch.int32, "device": DEVICE}
            wrapper.plan(
                torch.arange(0, pages + 1, WINDOW // page, **int32),
                torch.arange(pages, **int32),
                torch.full((sequences,), page, **int32),
                HEADS,
                KV_HEADS,
                HEAD_DIM,
                page,
                q_data_type=dtype,
            )
            shape = (pages, KV_HEADS, page, HEAD_DIM)

            def theirs(rings):
                return wrapper.run(rings.q, (rings.k_cache.view(shape), rings.v_cache.view(shape)))

            return theirs

        nbytes = 2 * sequences * KV_HEADS * WINDOW * HEAD_DIM * dtype.itemsize
        peers = {"sdpa": lambda: plain, "flashinfer": paged}
        if sequences == 32:  # each shape takes long to compile
            peers["flex"] = lambda: flexible
        shape = f"decode, {sequences} x {WINDOW} keys"
        yield Case("attention", shape, make, ours, nbytes, peers=peers)


def visible_pairs(tokens: int, history: int, window: int | None) -> int:
    """Pairs of a new token and one that it sees."""
    return sum(min(p + 1, window or p + 1) for p in range(history, history + tokens))


@dataclass
class Chunk:
    """New tokens of one sequence on a full ring, and how the peers attend to what they see."""

    tokens: int
    history: int
    window: int | None
    dtype: torch.dtype

    @property
    def seen(self) -> int:
        """Keys of the history that a peer is given."""
        return min(self.history, self.window or self.history)

    def make(self) -> Any:
        capacity = self.window or self.history + self.tokens
        rings = Rings(1, self.tokens, self.history, capacity, self.dtype, DEVICE)
        keys = [
            torch.cat((cache[0, :, : self.seen], new.transpose(0, 1)), 1)[None]
            for cache, new in ((rings.k_cache, rings.k), (rings.v_cache, rings.v))
        ]
        return SimpleNamespace(rings=rings, q=rings.q.transpose(0, 1)[None], keys=keys)

    def ours(self, given: Any) -> Any:
        return ops.attention(*given.rings.arguments(), self.window, max_count=self.tokens)

    def sdpa(self, *backends: SDPBackend) -> Call:
        def call(given):
            with sdpa_kernel(list(backends)) if backends else nullcontext():
                return functional.scaled_dot_product_attention(
                    given.q, *given.keys, is_causal=True, enable_gqa=True
                )

        return call

    def masked_sdpa(self) -> Call:
        query = torch.arange(self.seen, self.seen + self.tokens, device=DEVICE)[:, None]
        key = torch.arange(self.seen + self.tokens, device=DEVICE)
        mask = (key <= query) & (key > query - self.window)

        def call(given):
            # A copy for each query head: with a mask torch has no fast kernel for groups.
            if not hasattr(given, "wide"):
                given.wide = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in given.keys]
            return functional.scaled_dot_product_attention(given.q, *given.wide, attn_mask=mask)

        return call

    def flex(self) -> Call:
        seen, window, tokens = self.seen, self.window, self.tokens

        def sees(batch, head, query, key):
            causal = key <= query + seen
            return causal & (key > query + seen - window) if window else causal

        blocks = flex.create_block_mask(sees, None, None, tokens, seen + tokens, device=DEVICE)

        def call(given):
            return compiled(flex.flex_attention)(
                given.q, *given.keys, block_mask=blocks, enable_gqa=True
            )

        return call

    def flashinfer(self) -> Call:
        def call(given):
            keys = [x[0] for x in given.keys]
            left = self.window - 1 if self.window else -1
            return flashinfer().single_prefill_with_kv_cache(
                given.rings.q, *keys, causal=True, kv_layout="HND", window_left=left
            )

        return call

    def flash_attention(self, module: str) -> Call:
        """Of version 2 or 3. Its last query is the last key's."""
        attend = importlib.import_module(module).flash_attn_func

        def call(given):
            q, k, v = (x.transpose(1, 2) for x in (given.q, *given.keys))
            window = (self.window - 1, 0) if self.window else (-1, -1)
            return attend(q, k, v, causal=True, window_size=window)

        return call

    def case(self, op: str, ours: Call, peers: dict[str, Callable[[], Call]]) -> Case:
        keys = self.seen + self.tokens
        shape = f"prefill, {self.tokens}"
        shape += f" after {self.history}" if self.history else ""
        shape += f", window {self.window}" if self.window else ", causal"
        return Case(
            op,
            shape,
            self.make,
            ours,
            2 * (HEADS * self.tokens + KV_HEADS * keys) * HEAD_DIM * self.dtype.itemsize,
            4 * HEADS * HEAD_DIM * visible_pairs(self.tokens, self.history, self.window),
            peers,
        )


def prefill_cases(dtype: torch.dtype) -> Iterator[Case]:
    prompts = [(tokens, 0, None) for tokens in (512, 1024, 2048, 4096, 8192, 16384)]
    for tokens, history, window in (
        *prompts,
        (8192, 0, WINDOW),
        (16384, 0, WINDOW),
        (1024, 3 * WINDOW, WINDOW),
    ):
        chunk = Chunk(tokens, history, window, dtype)
        peers = {"sdpa mask": chunk.masked_sdpa} if window else {"sdpa": chunk.sdpa}
        if tokens >= 8192:
            peers["flex"] = chunk.flex
        peers["flashinfer"] = chunk.flashinfer
        yield chunk.case("attention", chunk.ours, peers)


SM90 = "attention sm90"  # measured only if asked for: the kernel has not run on hardware yet


def sm90_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Prompts in one piece, and their last chunks of 2048. The kernel of sm_80 is one of the peers,
    and where its time is ahead, that is what a model gets by default."""
    prompts = [(tokens, 0, None) for tokens in (512, 1024, 2048, 4096, 8192, 16384, 32768)]
    windows = [(tokens, 0, WINDOW) for tokens in (8192, 16384, 32768)]
    chunks = [(2048, 14336, None), (2048, 14336, WINDOW)]
    for tokens, history, window in (*prompts, *windows, *chunks):
        chunk = Chunk(tokens, history, window, dtype)

        def ours(given, chunk=chunk):
            _C.select_attention("sm90")
            try:
                return chunk.ours(given)
            finally:
                _C.select_attention("sm80")

        peers = {"sm80": lambda chunk=chunk: chunk.ours}
        if not (history or window):
            peers["flash"] = functools.partial(chunk.sdpa, SDPBackend.FLASH_ATTENTION)
            peers["cudnn"] = functools.partial(chunk.sdpa, SDPBackend.CUDNN_ATTENTION)
        if tokens in (8192, 16384):  # each shape takes long to compile
            peers["flex"] = chunk.flex
        peers["flashinfer"] = chunk.flashinfer
        for module in ("flash_attn", "flash_attn_interface"):
            peers[module] = functools.partial(chunk.flash_attention, module)
        yield chunk.case(SM90, ours, peers)


def sample_cases(dtype: torch.dtype) -> Iterator[Case]:
    def plain(given):
        probabilities, ids = given.logits.softmax(-1).sort(descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= 0.9
        noise = torch.empty_like(probabilities).exponential_()
        best = (probabilities.masked_fill(outside, 0) / noise).argmax(-1, keepdim=True)
        return ids.gather(-1, best)

    def greedy(given):
        return given.logits.argmax(-1)

    def theirs(given):
        return flashinfer().sampling.top_p_sampling_from_probs(given.logits.softmax(-1), 0.9)

    def ours(given):
        return ops.sample(given.logits, *given.tables)

    for rows, temperature in itertools.product((1, 32), (0.0, 1.0)):

        def make(rows=rows, temperature=temperature):
            options = torch.tensor([temperature, 0, 0.9, 0, 1, 0, 0], dtype=torch.float64)
            tables = (
                torch.arange(rows),
                options.repeat(rows, 1),
                torch.zeros(rows, 3, dtype=torch.int64),
                torch.zeros(rows, VOCABULARY, dtype=torch.int32),
            )
            return SimpleNamespace(
                logits=3 * torch.randn(rows, VOCABULARY, device=DEVICE),
                tables=[table.to(DEVICE) for table in tables],
            )

        peers = {"eager": lambda: plain, "flashinfer": lambda: theirs}
        peers = peers if temperature else {"eager": lambda: greedy}
        name = "top_p 0.9" if temperature else "greedy"
        shape = f"{rows} x {VOCABULARY}, {name}"
        yield Case("sample", shape, make, ours, 4 * rows * VOCABULARY, peers=peers)


CASES = (
    *(rms_norm_cases, linear_cases, decode_cases, prefill_cases, rope_cases, swiglu_cases),
    *(sample_cases, sm90_cases),
)

COLUMNS = (
    ("op", -9),
    ("shape", -40),
    ("us", 9),
    ("GB/s", 7),
    ("TFLOP/s", 8),
    ("of peak", 8),
    ("peers, their time over ours", -40),
)


def cells(row: dict[str, Any]) -> list[str]:
    peers = [f"{name} {time / row['us']:.2f}" for name, time in row["peers_us"].items()]
    return [
        row["op"],
        row["shape"],
        f"{row['us']:.1f}",
        "" if row["GB/s"] is None else f"{row['GB/s']:.0f}",
        "" if row["TFLOP/s"] is None else f"{row['TFLOP/s']:.1f}",
        f"{row['of_peak']:.0%}",
        ", ".join(peers),
    ]


# ---- What is aimed at on an H200


@dataclass
class Goal:
    """A figure of one row, or its ratio to that of another one."""

    row: str  # "op shape"
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    over: str | None = None

    def report(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """None if a row is missing."""
        if self.row not in rows or (self.over and self.over not in rows):
            return None
        value = rows[self.row][self.figure]
        if self.over:
            value /= rows[self.over][self.figure]
        return {
            "goal": f"{self.row}: {self.figure}{f' over that of {self.over}' if self.over else ''}",
            "value": value,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "met": (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most),
        }


GOALS = (
    Goal("linear 1 x 4096 x 28672, gate, up + swiglu", "of_peak", at_least=0.9),
    Goal("linear 1 x 4096 x 4096, output + residual", "of_peak", at_least=0.8),
    Goal("linear 1 x 4096 x 28672, gate, up + swiglu, 4 bits", "of_peak", at_least=0.8),
    Goal(
        "linear 8 x 4096 x 28672, gate, up + swiglu",
        "us",
        at_most=1.1,
        over="linear 1 x 4096 x 28672, gate, up + swiglu",
    ),
    Goal("rms_norm 2048 x 4096", "of_peak", at_least=0.9),
    Goal("attention decode, 32 x 4096 keys", "of_peak", at_least=0.85),
    Goal("attention decode, 1 x 4096 keys", "us", at_most=10),
    Goal("attention prefill, 8192, causal", "TFLOP/s", at_least=330),
    Goal(
        "attention prefill, 16384, window 4096",
        "us",
        at_most=1 / 2.2,
        over="attention prefill, 16384, causal",
    ),
    *(
        Goal(f"{SM90} prefill, {shape}", "TFLOP/s", at_least=rate)
        for shape, rate in {
            "8192, causal": 580,
            "16384, causal": 580,
            f"16384, window {WINDOW}": 520,
            f"32768, window {WINDOW}": 520,
        }.items()
    ),
)


def run(dtype: torch.dtype, only: str | None, json: str | None) -> None:
    """The benchmark; `only`: of one op; `json`: a file, written again after every row."""
    if _C.cuda_architectures is None or not torch.cuda.is_available():
        raise SystemExit("ops: --device cuda needs a CUDA device and a build with CUDA")
    if dtype == torch.float32:
        raise SystemExit("ops: --dtype fp32 is not for --device cuda: attention has bf16 and fp16")
    facts = machine() | {"dtype": str(dtype).removeprefix("torch.")}
    print(
        f"{facts['gpu']}, torch {facts['torch']}, {facts['dtype']}: copies "
        f"{facts['copy_bytes'] / 1e9:.0f} GB/s, multiplies {facts['matmul_flops'] / 1e12:.0f} "
        "TFLOP/s\n"
    )
    print_header(COLUMNS)
    rows, goals = [], []
    for case in (case for cases in CASES for case in cases(dtype)):
        if case.op != only and (only or case.op == SM90):
            continue
        rows.append(measure(case, facts))
        print_row(COLUMNS, cells(rows[-1]))
        by_name = {f"{row['op']} {row['shape']}": row for row in rows}
        goals = [report for goal in GOALS if (report := goal.report(by_name))]
        if json:
            write_json(json, {"machine": facts, "rows": rows, "goals": goals})
    print()
    for goal in goals:
        bound = f"<= {goal['at_most']:.3g}" if goal["at_most"] else f">= {goal['at_least']:.3g}"
        verdict = "met" if goal["met"] else "NOT met"
        print(f"{goal['goal']}: {goal['value']:.3g}, {bound} {verdict}")
    failures = {name: text for row in rows for name, text in row["failures"].items()}
    for name, text in failures.items():
        print(f"{name}: {text}")
