"""Times products on the CPU: activations in 8 bits, next to exact ones.

    python bench/rounded_products.py [--threads 1] [--rounds N] [--dtype bf16] [--json FILE]
                                     [--tokens 1,4,8,64,256] [--formats NAMES] [--inputs N]

Weights have the shape of Mistral 7B's attention output, or rows of N inputs. Times are milliseconds
of processor time of all threads, so that other programs of the machine count for little. They are
medians of turns in which both ways alternate. `gain` is exact over rounded, `of one` the rounded
time over that of the first number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from measure import machine, print_header, print_machine, print_row, write_json
from shapes import DIM, DTYPES, random

from mistral_ext import ops
from mistral_ext.ops import Quantized

FORMATS = {"int4": 64, "q4_0": None, "q4_1": None, "q4_k": None, "q5_k": None, "q6_k": None}
FORMATS |= {"iq4_nl": None, "iq4_xs": None}  # the group, None: the smallest
# Weights in 8 bits, with a scale for each row or 32 values, have exact products alone.
FORMATS |= {"int8": None, "q8_0": None}
TOKENS = "1,4,8,64,256"
COLUMNS = [("format", -8), ("tokens", 6), ("exact", 8), ("rounded", 8), ("gain", 6), ("of one", 6)]


def random_weight(form: str, group: int | None, inputs: int) -> Quantized:
    weight = Quantized.empty((DIM, inputs), form, group)
    of_value = torch.iinfo(weight.values.dtype)
    weight.values.random_(of_value.min, of_value.max)
    if weight.scales.dtype == torch.uint8:
        weight.scales.fill_(0x2C)  # as fp16 a small number
    else:
        weight.scales.normal_(0, 0.01)
    return weight


def seconds(x: torch.Tensor, weight: Quantized, rounds: int) -> list[float]:
    """The median processor time of a product with exact and with rounded activations."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(rounds + 1):  # the first warms up
        for exact, samples in times.items():
            ops.set_exact_products(exact)
            begin = time.process_time()
            ops.linear(x, weight)
            if i > 0:
                samples.append(time.process_time() - begin)
    return [statistics.median(samples) for samples in times.values()]


def rows(
    formats: list[str], numbers: list[int], dtype: torch.dtype, rounds: int, inputs: int
) -> Iterator[dict[str, str | int | float]]:
    for form in formats:
        weight, one = random_weight(form, FORMATS[form], inputs), 0.0
        for tokens in numbers:
            exact, rounded = seconds(random(tokens, inputs, dtype=dtype), weight, rounds)
            one = one or rounded
            yield {
                "format": form,
                "tokens": tokens,
                "exact": 1e3 * exact,
                "rounded": 1e3 * rounded,
                "gain": exact / rounded,
                "of one": rounded / one,
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tokens", default=TOKENS, metavar="N,N")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="NAMES")
    parser.add_argument("--inputs", type=int, default=DIM)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = machine()
    print_machine(facts)
    print_header(COLUMNS)
    measured = []
    numbers = [int(number) for number in args.tokens.split(",")]
    formats = args.formats.split(",")
    for row in rows(formats, numbers, DTYPES[args.dtype], args.rounds, args.inputs):
        measured.append(row)
        print_row(COLUMNS, [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()])
    if args.json:
        write_json(args.json, {"machine": facts, "products": measured})


if __name__ == "__main__":
    main()
