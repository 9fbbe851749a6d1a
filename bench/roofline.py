"""The bytes and operations of every launch of a decode step, and the time they must take.

    python bench/roofline.py [--weights bf16|int8|int4] [--batch N] [--history N] [--layers 32]
                             [--bandwidth GB/s] [--matrix TFLOP/s] [--measured FILE]
    python bench/roofline.py --training TOKENS [--weights ...]   # a pass of fine-tuning instead

From the shapes of Mistral 7B alone: the bytes of weights, of cached keys and values and of
activations that each launch reads or writes once, its FLOPs, and its floor, the longer of bytes
over the bandwidth and FLOPs over the rate of matrix products. The default limits are those measured
on an H200: a copy, and a product of large bf16 matrices. --measured takes the file that
`bench/decode_cuda.py --json` writes, and shows the time of each launch beside its floor. Needs no
GPU. Products of up to 16 sequences normalise their input themselves, as on an H200 (GPUs with less
shared memory do of fewer); those of more have a launch for that before them. The step is greedy:
one that draws its tokens has a launch more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arguments import at_least
from measure import print_header, print_row
from models import mistral_7b

from mistral_ext.model.config import MistralConfig
from mistral_ext.weights.quantize import Quantization

KINDS = ("bf16", "int8", "int4")
ELEMENT = 2  # bytes of an activation, key or value
NORMALISED_BY_PRODUCTS = 16  # tokens: kNormTokens of csrc/cuda/linear/gemv.cuh
H200_BANDWIDTH = 4.3e12  # bytes/s of a copy, read and written
H200_MATRIX = 788e12  # FLOP/s


@dataclass(frozen=True)
class Launch:
    """A launch of one kernel in a step.

    Attributes:
        weights, cache, activations: the bytes of each kind that are moved, each byte counted once.
        flops: the number of multiplications and additions.
    """

    name: str
    weights: int = 0
    cache: int = 0
    activations: int = 0
    flops: int = 0

    @property
    def nbytes(self) -> int:
        return self.weights + self.cache + self.activations

    def floor(self, bandwidth: float, matrix: float) -> float:
        """The least seconds that the launch can take."""
        return max(self.nbytes / bandwidth, self.flops / matrix)


def weight_bytes(rows: int, columns: int, kind: str, name: str) -> int:
    """The bytes of a stored matrix, its scales included. `name` is Mistral's name of the matrix."""
    if kind == "bf16":
        return rows * columns * ELEMENT
    return Quantization.from_name(kind).parts(name, (rows, columns)).nbytes


def decode_step(config: MistralConfig, kind: str, batch: int, history: int) -> Iterator[Launch]:
    """The launches of our kernels in a step, in their order.

    Args:
        config: the model's shape.
        kind: the kind of the weights, one of KINDS.
        batch: the number of sequences, with one token each.
        history: the number of tokens that each sequence has already.
    """

    def product(
        name: str, rows: int, columns: int, outputs: int, also: int = 0, weight: str = "layers.0"
    ):
        return Launch(
            name,
            weights=weight_bytes(rows, columns, kind, f"{weight}.weight"),
            activations=batch * ELEMENT * (columns + outputs + also),
            flops=2 * batch * rows * columns,
        )

    def norm():  # of more tokens than a block of a product normalises for itself
        if batch > NORMALISED_BY_PRODUCTS:
            yield Launch("norm", activations=2 * batch * ELEMENT * dim)

    dim, hidden = config.dim, config.hidden_dim
    queries, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    seen = min(history + 1, config.sliding_window or history + 1)
    # The kernels of int4's format do not rotate.
    rotates = kind != "int4"
    rows = batch * ELEMENT * dim  # embeddings are not quantised
    yield Launch("embeddings", weights=rows, activations=rows)
    for _ in range(config.n_layers):
        yield from norm()
        if rotates:
            yield product("qkv, rope, append", queries + 2 * kv, dim, queries + 4 * kv)
        else:
            yield product("qkv", queries + 2 * kv, dim, queries + 2 * kv)
            moved = 2 * queries + 5 * kv  # q and k in place, k and v to the ring
            yield Launch("rope, append", activations=batch * ELEMENT * moved)
        yield Launch(
            "attention",
            cache=batch * (seen - 1) * 2 * kv * ELEMENT,
            activations=batch * ELEMENT * (2 * queries + 2 * kv),
            flops=4 * batch * seen * queries,
        )
        yield product("wo, residual", dim, queries, dim, also=dim)
        yield from norm()
        yield product("gate, up, swiglu", 2 * hidden, dim, hidden)
        yield product("down, residual", dim, hidden, dim, also=dim)
    yield from norm()
    yield product("logits, argmax", config.vocab_size, dim, config.vocab_size, weight="output")


def training_pass(config: MistralConfig, kind: str, tokens: int, rank: int) -> Iterator[Launch]:
    """The launches of a pass of fine-tuning: one sample, an adapter on all linear layers.

    A layer is computed forward, again for its gradients, and backward. Products are the vendor's,
    by weights that are dequantised before each. The products of adapters count as one pass over x
    and one over the result, with fp32 sums.
    """
    dim, hidden = config.dim, config.hidden_dim
    queries, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    seen = min(tokens, config.sliding_window or tokens)
    pairs = seen * (seen + 1) // 2 + (tokens - seen) * seen  # a query and a key that it sees
    statistics = 4 * tokens * config.n_heads  # bytes of the log-sum-exps, or of delta
    linears = {"layers.0.wqkv": (queries + 2 * kv, dim), "layers.0.wo": (dim, queries)}
    linears |= {"layers.0.w13": (2 * hidden, dim), "layers.0.w2": (dim, hidden)}

    def moved(name: str, columns: int, flops: int = 0, others: int = 0) -> Launch:
        return Launch(name, activations=tokens * ELEMENT * columns + others, flops=flops)

    def product(name: str, weight: str, rows: int, columns: int) -> Iterator[Launch]:
        plain = rows * columns * ELEMENT
        if kind != "bf16":
            stored = weight_bytes(rows, columns, kind, f"{weight}.weight")
            yield Launch("dequantise", weights=stored + plain)
        yield Launch(
            name,
            weights=plain,
            activations=tokens * ELEMENT * (rows + columns),
            flops=2 * tokens * rows * columns,
        )

    def forward(which: str) -> Iterator[Launch]:
        for weight, (rows, columns) in linears.items():
            yield from product(f"products, {which}", weight, rows, columns)
            of_adapter = 2 * tokens * rank * (rows + columns)
            yield moved(f"adapters, {which}", columns + 2 * rows, of_adapter)
        scores = 4 * pairs * queries
        yield moved(f"attention, {which}", 2 * queries + 2 * kv, scores, statistics)
        yield moved(f"the rest, {which}", 4 * dim + 2 * (queries + kv) + 3 * hidden)

    def backward() -> Iterator[Launch]:
        for weight, (rows, columns) in linears.items():
            yield from product("products, backward", weight, rows, columns)
            sums = 4 * tokens * rank * (rows + columns)  # d_hidden and d_b, d_x and d_a
            yield moved("adapters, backward", 2 * rows + 3 * columns, sums)
        yield moved("delta", 2 * queries, others=statistics)
        yield moved("d_k, d_v", 2 * queries + 4 * kv, 8 * pairs * queries, 2 * statistics)
        yield moved("d_q", 3 * queries + 2 * kv, 6 * pairs * queries, 2 * statistics)
        yield moved("the rest, backward", 6 * dim + 2 * (queries + kv) + 5 * hidden)

    for _ in range(config.n_layers):
        for which in ("forward", "again"):
            yield from forward(which)
        yield from backward()
    yield moved("the rest, forward", 2 * dim)
    for name in ("logits", "logits, backward"):
        yield from product(name, "output", config.vocab_size, dim)
    yield moved("cross_entropy", 2 * config.vocab_size)
    yield moved("the rest, backward", 3 * dim)


def print_table(
    launches: list[Launch], bandwidth: float, matrix: float, measured: list[float] | None
) -> None:
    """Prints one row for all launches with the same name. `measured` has the seconds of each
    launch, in the same order."""
    columns = [("launch", -24), ("times", 5), ("weights, MB", 11), ("cache, MB", 9)]
    columns += [("other, MB", 9), ("GFLOP", 7), ("floor, us", 9)]
    if measured:
        columns += [("measured, us", 12), ("of floor", 8)]
    print_header(columns)
    names = list(dict.fromkeys(launch.name for launch in launches))
    for name in [*names, None]:
        chosen = [i for i, launch in enumerate(launches) if name in (launch.name, None)]
        of_name = [launches[i] for i in chosen]
        floor = sum(launch.floor(bandwidth, matrix) for launch in of_name)
        cells = [name or "all", str(len(chosen))]
        cells += [
            f"{sum(getattr(launch, field) for launch in of_name) / scale:.2f}"
            for field, scale in (
                ("weights", 1e6),
                ("cache", 1e6),
                ("activations", 1e6),
                ("flops", 1e9),
            )
        ]
        cells.append(f"{floor * 1e6:.1f}")
        if measured:
            seconds = sum(measured[i] for i in chosen)
            cells += [f"{seconds * 1e6:.1f}", f"{floor / seconds:.0%}"]
        print_row(columns, cells)


def print_training(args: argparse.Namespace) -> None:
    config, tokens = mistral_7b(args.layers), args.training
    launches = list(training_pass(config, args.weights, tokens, args.rank))
    bandwidth, matrix = args.bandwidth * 1e9, args.matrix * 1e12
    floor = sum(launch.floor(bandwidth, matrix) for launch in launches)
    print(
        f"\n{args.weights}, a pass of {tokens} tokens, rank {args.rank}, {config.n_layers} layers, "
        f"{bandwidth / 1e9:.0f} GB/s, {matrix / 1e12:.0f} TFLOP/s: "
        f"at most {tokens / floor:.0f} tokens/s"
    )
    print_table(launches, bandwidth, matrix, None)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", choices=KINDS, default="bf16")
    parser.add_argument("--batch", type=at_least(1), metavar="N", help="sequences (default: 1)")
    parser.add_argument(
        "--history", type=at_least(0), metavar="N", help="tokens seen so far (default: 128)"
    )
    parser.add_argument("--layers", type=at_least(1), default=32)
    parser.add_argument("--bandwidth", type=float, default=H200_BANDWIDTH / 1e9, metavar="GB/s")
    parser.add_argument("--matrix", type=float, default=H200_MATRIX / 1e12, metavar="TFLOP/s")
    parser.add_argument(
        "--measured", metavar="FILE", help="from decode_cuda.py, which gives all else"
    )
    parser.add_argument(
        "--training", type=at_least(1), metavar="TOKENS", help="a pass of fine-tuning"
    )
    parser.add_argument(
        "--rank", type=at_least(1), default=16, help="of the adapter, with --training"
    )
    options = parser.parse_args()
    if options.training is not None:
        for name in ("batch", "history", "measured"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} is of a decode step, expected none with --training")
    options.batch = 1 if options.batch is None else options.batch
    options.history = 128 if options.history is None else options.history
    return options


def main() -> None:
    args = parse_options()
    if args.training is not None:
        return print_training(args)

    cases = [vars(args) | {"launches": None, "seconds": None}]
    bandwidth, matrix = args.bandwidth * 1e9, args.matrix * 1e12
    if args.measured:
        report = json.loads(Path(args.measured).read_text())
        cases = [case | {"layers": report["layers"]} for case in report["cases"]]
        bandwidth, matrix = report["copy_bandwidth"], report["matrix_rate"]
    for case in cases:
        config = mistral_7b(case["layers"])
        launches = list(decode_step(config, case["weights"], case["batch"], case["history"]))
        floor = sum(launch.floor(bandwidth, matrix) for launch in launches)
        print(
            f"\n{case['weights']}, {case['batch']} sequences after {case['history']} tokens, "
            f"{config.n_layers} layers, {bandwidth / 1e9:.0f} GB/s: "
            f"at most {case['batch'] / floor:.0f} tokens/s"
        )
        print_table(launches, bandwidth, matrix, case["launches"])
        if case["seconds"]:
            rate = case["batch"] / case["seconds"]
            print(f"measured, all of it: {rate:.0f} tokens/s, {floor / case['seconds']:.0%}")


if __name__ == "__main__":
    main()
