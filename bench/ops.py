"""Times every op at the shapes of Mistral 7B, next to what torch would do.

    python bench/ops.py [--threads N] [--dtype bf16] [--only attention] [--calls N] [--json FILE]
    python bench/ops.py --device cuda [--dtype bf16] [--only attention] [--no-compile] [--json FILE]

Times are medians. The two sides take turns in one run, because machines are noisy: compare the
ratios. `GB/s` counts each byte that has to be read or written once, and `of read` is its share of
the bandwidth that a plain multithreaded read has just before and after (an op whose data is in a
cache may pass 100 %); `GFLOP/s` is given where arithmetic is the limit. `x torch` is torch's time
over ours: above 1 we are faster. Each call comes after a pause and finds its code in no near cache;
with `--calls 20`, the last of 20 calls in a row is timed. The other command is for a GPU: see
ops_cuda.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measure import (
    keep_freed_memory,
    machine,
    median_seconds,
    print_header,
    print_machine,
    print_row,
    rotate,
    write_json,
)
from shapes import (
    DIM,
    DTYPES,
    EPS,
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

from mistral_ext import ops
from mistral_ext.bench.peaks import read_bandwidth
from mistral_ext.weights.quantize import quantize


@dataclass
class Case:
    """A row of the table: two functions with the same result, and their bytes and operations."""

    op: str
    shape: str
    ours: Callable[[], Any]
    torch: Callable[[], Any]
    nbytes: int
    flops: int = 0  # given if operations are the limit, not bytes


def rms_norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    weight = random(DIM, dtype=dtype)
    for tokens in (1, 256, 2048):
        x, residual = random(2, tokens, DIM, dtype=dtype)
        x.mul_(1e-3)  # it is added to the residual in every call

        def plain(x=x):
            return functional.rms_norm(x, (DIM,), weight, EPS)

        def plain_residual(x=x, residual=residual):
            return functional.rms_norm(residual.add_(x), (DIM,), weight, EPS)

        def ours(x=x):
            return ops.rms_norm(x, weight, EPS)

        def ours_residual(x=x, residual=residual):
            return ops.rms_norm(x, weight, EPS, residual)

        yield Case("rms_norm", f"{tokens} x {DIM}", ours, plain, 2 * x.nbytes)
        shape = f"{tokens} x {DIM} + residual"
        yield Case("rms_norm", shape, ours_residual, plain_residual, 4 * x.nbytes)


def embedding_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The embeddings of a step, plain and quantised. Torch reads a plain matrix in both."""
    exact = random(VOCABULARY, DIM, dtype=dtype)
    for form in ("plain", "q8_0"):
        weight = exact if form == "plain" else quantize(exact, form)
        for tokens in (1, 8, 256):
            ids = torch.randint(0, VOCABULARY, (tokens,))

            def plain(ids=ids):
                return functional.embedding(ids, exact)

            def ours(ids=ids, weight=weight):
                return ops.embedding(ids, weight, dtype)

            nbytes = tokens * (weight.nbytes // VOCABULARY + exact[0].nbytes)
            yield Case("embedding", f"{tokens} x {DIM}, {form}", ours, plain, nbytes)


def rope_cases(dtype: torch.dtype) -> Iterator[Case]:
    for tokens in (1, 256):
        rings = Rings(1, tokens, 0, WINDOW, dtype)
        half = HEAD_DIM // 2
        turns = frequencies()
        angles = (torch.arange(tokens)[:, None] * turns).repeat(1, 2)[:, None]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        slots = torch.arange(tokens)

        def plain(rings=rings, cos=cos, sin=sin, slots=slots, half=half):
            for x in (rings.q, rings.k):
                turned = torch.cat((-x[..., half:], x[..., :half]), -1)
                x.copy_(x * cos + turned * sin)
            rings.k_cache[0].index_copy_(1, slots, rings.k.transpose(0, 1))
            rings.v_cache[0].index_copy_(1, slots, rings.v.transpose(0, 1))

        def ours(rings=rings, turns=turns):
            ops.rope(*rings.arguments(), turns, WINDOW)

        nbytes = 2 * (rings.q.nbytes + rings.k.nbytes) + 2 * rings.k.nbytes + rings.v.nbytes
        shape = f"{tokens} token{'s' * (tokens > 1)}, with append"
        yield Case("rope", shape, ours, plain, nbytes)


def decode_cases(dtype: torch.dtype) -> Iterator[Case]:
    for sequences, keys in ((1, 512), (1, 4096), (8, 512), (8, 4096)):
        # The last token is in its ring already, as rope leaves it.
        def make(sequences=sequences, keys=keys):
            return Rings(sequences, 1, keys - 1, keys, dtype)

        one = make()
        nbytes = one.k_cache.nbytes + one.v_cache.nbytes
        turn = rotate(make, nbytes)

        def plain(turn=turn):
            rings = turn()
            # Heads of a group as queries of one head: ten times as fast as enable_gqa.
            q = rings.q.view(-1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
            functional.scaled_dot_product_attention(q, rings.k_cache, rings.v_cache)

        def ours(turn=turn):
            ops.attention(*turn().arguments(), WINDOW)

        shape = f"decode, {sequences} x {keys} keys"
        yield Case("attention", shape, ours, plain, nbytes)


def prefill_cases(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, history in ((256, 0), (1024, 0), (4096, 0), (1024, 4096)):
        rings = Rings(1, tokens, history, WINDOW, dtype)
        seen = min(history, WINDOW - 1)  # tokens of the history that the first query sees
        query = torch.arange(seen, seen + tokens)[:, None]
        key = torch.arange(seen + tokens)
        mask = (key <= query) & (key > query - WINDOW)
        if history:
            keys = [
                torch.cat((cache[0, :, :seen], new.transpose(0, 1)), 1)[None]
                for cache, new in ((rings.k_cache, rings.k), (rings.v_cache, rings.v))
            ]
            rule = {"attn_mask": mask}
        else:
            keys = [new.transpose(0, 1)[None] for new in (rings.k, rings.v)]
            rule = {"is_causal": True}

        def plain(rings=rings, keys=keys, rule=rule):
            q = rings.q.transpose(0, 1)[None]
            functional.scaled_dot_product_attention(q, *keys, enable_gqa=True, **rule)

        def ours(rings=rings):
            ops.attention(*rings.arguments(), WINDOW)

        flops = 4 * HEADS * HEAD_DIM * int(mask.sum())
        nbytes = sum(x.nbytes for x in (rings.q, rings.q, *keys))
        shape = f"prefill, {tokens} after {history}"
        yield Case("attention", shape, ours, plain, nbytes, flops)


def swiglu_cases(dtype: torch.dtype) -> Iterator[Case]:
    for tokens in (1, 256):
        gate, up = random(2, tokens, HIDDEN, dtype=dtype)

        def plain(gate=gate, up=up):
            return functional.silu(gate) * up

        def ours(gate=gate, up=up):
            return ops.swiglu(gate, up)

        yield Case("swiglu", f"{tokens} x {HIDDEN}", ours, plain, 3 * gate.nbytes)


def linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    for outputs, inputs in ((DIM, DIM), (HIDDEN, DIM)):
        turn = None
        for tokens in (1, 8, 256):
            x = random(tokens, inputs, dtype=dtype)
            nbytes = (outputs * inputs + x.numel() + tokens * outputs) * x.element_size()
            turn = turn or rotate(
                lambda outputs=outputs, inputs=inputs: random(outputs, inputs, dtype=dtype), nbytes
            )

            def plain(x=x, turn=turn):
                return functional.linear(x, turn())

            def ours(x=x, turn=turn):
                return ops.linear(x, turn())

            flops = 2 * tokens * outputs * inputs if tokens > 8 else 0
            shape = f"{tokens} x {inputs} -> {outputs}"
            yield Case("linear", shape, ours, plain, nbytes, flops)


def lora_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The cases of `lora`: one adapter of rank 16 on the largest matrix."""
    rank, scale = 16, 0.5
    a, b = random(rank, DIM, dtype=dtype), random(rank, HIDDEN, dtype=dtype)
    stack = a[None, None], b[None], torch.tensor([[scale]]), torch.tensor([[rank]]).int()
    for tokens in (1, 8, 256):
        x, out = random(tokens, DIM, dtype=dtype), random(tokens, HIDDEN, dtype=dtype)
        adapters = torch.zeros(tokens, dtype=torch.int32)

        def plain(x=x, out=out):
            out.addmm_(x @ a.T, b, alpha=scale)

        def ours(x=x, out=out, adapters=adapters):
            ops.lora(x, *stack, adapters, [HIDDEN], out)

        nbytes = a.nbytes + b.nbytes + x.nbytes + 2 * out.nbytes
        yield Case("lora", f"{tokens} x {DIM} x {rank} x {HIDDEN}", ours, plain, nbytes)


def sample_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows in (1, 8):
        logits = 3 * torch.randn(rows, VOCABULARY)
        for name, temperature, top_p in (("greedy", 0, 1), ("plain", 1, 1), ("top_p", 1, 0.9)):
            options = torch.tensor([temperature, 0, top_p, 0, 1, 0, 0], dtype=torch.float64)
            tables = (
                torch.arange(rows),
                options.repeat(rows, 1),
                torch.zeros(rows, 3, dtype=torch.int64),
                torch.zeros(rows, VOCABULARY, dtype=torch.int32),
            )

            def plain(logits=logits, temperature=temperature, top_p=top_p):
                if temperature == 0:
                    return logits.argmax(-1)
                probabilities = (logits / temperature).softmax(-1)
                if top_p == 1:
                    return torch.multinomial(probabilities, 1)
                probabilities, ids = probabilities.sort(descending=True)
                probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
                return ids.gather(-1, torch.multinomial(probabilities, 1))

            def ours(logits=logits, tables=tables):
                return ops.sample(logits, *tables)

            yield Case("sample", f"{rows} x {VOCABULARY}, {name}", ours, plain, logits.nbytes)


CASES = (
    embedding_cases,
    rms_norm_cases,
    rope_cases,
    decode_cases,
    prefill_cases,
    swiglu_cases,
    linear_cases,
    lora_cases,
    sample_cases,
)

COLUMNS = (
    ("op", -9),
    ("shape", -26),
    ("us", 10),
    ("GB/s", 7),
    ("of read", 7),
    ("GFLOP/s", 8),
    ("torch us", 10),
    ("x torch", 7),
)


def measure(case: Case, calls: int) -> dict[str, Any]:
    before = read_bandwidth()
    ours, torch_ = median_seconds([case.ours, case.torch], calls=calls)
    bandwidth = (before + read_bandwidth()) / 2
    return {
        "op": case.op,
        "shape": case.shape,
        "us": ours * 1e6,
        "GB/s": case.nbytes / ours / 1e9,
        "read_bandwidth": bandwidth,
        "of_read": case.nbytes / ours / bandwidth,
        "GFLOP/s": case.flops / ours / 1e9 if case.flops else None,
        "torch_us": torch_ * 1e6,
        "x_torch": torch_ / ours,
    }


def cells(row: dict[str, Any]) -> list[str]:
    bound_by_arithmetic = row["GFLOP/s"] is not None
    return [
        row["op"],
        row["shape"],
        f"{row['us']:.1f}",
        "" if bound_by_arithmetic else f"{row['GB/s']:.1f}",
        "" if bound_by_arithmetic else f"{row['of_read']:.0%}",
        f"{row['GFLOP/s']:.0f}" if bound_by_arithmetic else "",
        f"{row['torch_us']:.1f}",
        f"{row['x_torch']:.2f}",
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--only", metavar="OP", help="rows of this op alone")
    parser.add_argument(
        "--calls", type=int, default=1, help="on cpu: time the last of so many calls in a row"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="on cuda: without peers that torch compiles"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if options.device == "cuda":
        import ops_cuda

        dtype, compiling = DTYPES[options.dtype], not options.no_compile
        return ops_cuda.run(dtype, options.only, options.json, compiling)
    if options.threads:
        torch.set_num_threads(options.threads)

    keep_freed_memory()
    facts = machine() | {"dtype": options.dtype, "calls": options.calls}
    print_machine(facts)
    print(f"Mistral 7B shapes, {options.dtype}\n")
    print_header(COLUMNS)
    rows = []
    for cases in CASES:
        for case in cases(DTYPES[options.dtype]):
            if options.only in (None, case.op):
                rows.append(measure(case, options.calls))
                print_row(COLUMNS, cells(rows[-1]))
    if options.json:
        write_json(options.json, {"machine": facts, "rows": rows})


if __name__ == "__main__":
    main()
