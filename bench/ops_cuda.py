"""Times every op on a GPU, next to torch and, where it can be imported, FlashInfer.

    python bench/ops.py --device cuda [--dtype bf16] [--only attention] [--no-compile] [--json FILE]
    python bench/ops.py --device cuda --only "attention sm90"    # the kernel of sm_90a: only so
    python bench/ops.py --device cuda --only gradients           # those of training: only so

First the two ceilings of the machine: a copy, counting bytes read and written, and a matrix product
of random bf16. Then each op: the bytes that have to be moved once, or the operations where they are
the limit, over its time, and the share of the ceiling. Peers are shown as their time over ours.

A measurement is the median of replays of a CUDA graph of calls on several inputs, so launches cost
what they cost in a captured decode step. Inputs and outputs together are several times the L2
cache, but for calls on less than a few hundred KB, which find theirs there as they do in a model.
The sides take turns. A peer that fails is named with its error, and the rest goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from attention_cuda import SM90, decode_cases, prefill_cases, sm90_cases
from gradients_cuda import GRADIENTS, gradient_cases
from measure import print_header, print_row, write_json
from measure_cuda import COMPILED, Case, eager_and_compiled, flashinfer, machine, measure
from models import random_weight
from shapes import (
    DIM,
    EPS,
    GPU,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCABULARY,
    WINDOW,
    Rings,
    frequencies,
    random,
)
from torch.nn import functional

from mistral_ext import _C, ops
from mistral_ext.weights.quantize import Quantization


def rms_norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    weight = random(DIM, dtype=dtype, device=GPU)

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
            x, residual = random(2, tokens, DIM, dtype=dtype, device=GPU)
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


def linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The products of a decode step, as the model fuses them. The peer is torch's product of plain
    weights alone. It does not do what is fused into ours."""
    qkv = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    products = {
        "qkv + rope, append": (qkv, DIM),
        "output + residual": ([DIM], DIM),
        "gate, up + swiglu": ([HIDDEN, HIDDEN], DIM),
        "down + residual": ([DIM], HIDDEN),
        "logits + argmax": ([VOCABULARY], DIM),
    }

    def call(name: str, given: Any) -> Any:
        if name.endswith("residual"):
            return ops.linear_residual(given.x, given.weights[0], given.residual)
        if name.endswith("swiglu"):
            return ops.linear_swiglu(given.x, given.weights, given.norm, EPS)
        if name.endswith("append"):
            rings, turns = given.rings.arguments()[3:], frequencies(GPU)
            return ops.linear_rope(given.x, given.weights, given.norm, EPS, *rings, turns, WINDOW)
        return ops.linear_argmax(given.x, given.weights[0], given.norm, EPS)

    for (name, (rows, size)), form, tokens in itertools.product(
        products.items(), (None, "q8_0", "iq4_xs"), (1, 8, 16, 64)
    ):

        def make(rows=rows, size=size, form=form, tokens=tokens):
            weights = [random_weight(n, size, form, dtype) for n in rows]
            return SimpleNamespace(
                x=random(tokens, size, dtype=dtype, device=GPU),
                norm=random(size, dtype=dtype, device=GPU),
                weights=weights,
                whole=torch.cat(weights) if form is None else None,
                residual=random(tokens, sum(rows), dtype=dtype, device=GPU) * 1e-3,
                rings=Rings(tokens, 1, 0, 1, dtype, GPU),  # each token starts a sequence
            )

        def theirs(given):
            return functional.linear(given.x, given.whole)

        stored = sum(rows) * size * dtype.itemsize
        if form is not None:
            stored = Quantization(form).parts("layers.0.weight", (sum(rows), size)).nbytes
        outputs = sum(rows) // (2 if name.endswith("swiglu") else 1)
        passes = 2 if name.endswith("residual") else 1
        moved = tokens * (size + passes * outputs) * dtype.itemsize
        if name.endswith("append"):
            moved += tokens * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
        yield Case(
            "linear",
            f"{tokens} x {size} x {sum(rows)}, {name}{f', {form}' if form else ''}",
            make,
            functools.partial(call, name),
            stored + moved,
            peers={} if form else {"torch": lambda theirs=theirs: theirs},
        )


def swiglu_cases(dtype: torch.dtype) -> Iterator[Case]:
    def plain(gate, up):
        return functional.silu(gate) * up

    def ours(given):
        return ops.swiglu(*given)

    for tokens in (1, 256, 2048):

        def make(tokens=tokens):
            return random(2, tokens, HIDDEN, dtype=dtype, device=GPU).unbind()

        nbytes = 3 * tokens * HIDDEN * dtype.itemsize
        peers = eager_and_compiled(plain, lambda given: given)
        yield Case("swiglu", f"{tokens} x {HIDDEN}", make, ours, nbytes, peers=peers)


def rope_cases(dtype: torch.dtype) -> Iterator[Case]:
    half, turns = HEAD_DIM // 2, frequencies(GPU)

    def plain(q, k, v, k_pool, v_pool, cos, sin, rows):
        for x in (q, k):
            turned = torch.cat((-x[..., half:], x[..., :half]), -1)
            x.copy_(x * cos + turned * sin)
        k_pool.index_put_((rows,), k)
        v_pool.index_put_((rows,), v)

    def arguments(given):
        return *given.rings.arguments()[:5], given.cos, given.sin, given.rows

    def ours(given):
        ops.rope(*given.rings.arguments(), turns, WINDOW)

    for sequences, tokens in ((1, 1), (32, 1), (1, 2048)):

        def make(sequences=sequences, tokens=tokens):
            rings = Rings(sequences, tokens, 0, tokens, dtype, GPU)
            positions = torch.arange(tokens, device=GPU).repeat(sequences)
            angles = (positions[:, None] * turns).repeat(1, 2)[:, None]
            heads = torch.arange(sequences * KV_HEADS, device=GPU) * tokens
            rows = heads.view(sequences, 1, KV_HEADS) + torch.arange(tokens, device=GPU)[:, None]
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
                logits=3 * torch.randn(rows, VOCABULARY, device=GPU),
                tables=[table.to(GPU) for table in tables],
            )

        peers = {"eager": lambda: plain, "flashinfer": lambda: theirs}
        peers = peers if temperature else {"eager": lambda: greedy}
        name = "top_p 0.9" if temperature else "greedy"
        shape = f"{rows} x {VOCABULARY}, {name}"
        yield Case("sample", shape, make, ours, 4 * rows * VOCABULARY, peers=peers)


CASES = (
    *(rms_norm_cases, linear_cases, decode_cases, prefill_cases, rope_cases, swiglu_cases),
    *(sample_cases, sm90_cases, gradient_cases),
)
ON_REQUEST = (SM90, GRADIENTS)

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
    """A goal for a figure of one row, or for the ratio of this figure to that of another row."""

    row: str  # "op shape"
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    over: str | None = None

    def report(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """Compares the goal with what was measured. None if a row is missing."""
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
    Goal("linear 1 x 4096 x 28672, gate, up + swiglu, iq4_xs", "of_peak", at_least=0.8),
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


def run(dtype: torch.dtype, only: str | None, json: str | None, compiling: bool = True) -> None:
    """Runs the benchmark.

    Args:
        only: the op whose rows to measure. None: the rows of all ops that need not be asked for.
        json: a file that is written again after every row. None: no file is written.
        compiling: whether to measure peers that have to be compiled, too.
    """
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
        if case.op != only and (only or case.op in ON_REQUEST):
            continue
        if not compiling:
            peers = {name: peer for name, peer in case.peers.items() if name not in COMPILED}
            case = dataclasses.replace(case, peers=peers)
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
