"""Measures what LoRA adapters cost a decode step, on the CPU.

    python bench/lora.py [--weights bf16,int8,int4] [--rank 16] [--layers 8] [--turns 15]
                         [--threads N] [--json FILE]

A model of Mistral 7B's shape with random weights and adapters on all linear layers decodes a token
of one sequence with an adapter, and of eight with one adapter or with eight. Times are seconds of
the processor, of all threads, so that other processes matter less. `x none` is the time of the step
over that of the same step without adapters. The two take turns, because machines are noisy. A ratio
is taken within a turn, and the median of the ratios is shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cpu import decoder
from measure import (
    keep_freed_memory,
    machine,
    print_header,
    print_machine,
    print_row,
    write_json,
)
from models import mistral_7b, quantized, random_weights

from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import LowRank
from mistral_ext.weights.checkpoint import tensor_shapes

ADAPTERS = 8
CASES = [0], [0] * ADAPTERS, list(range(ADAPTERS))  # the slot of the adapter of each sequence
PROMPT = list(range(3, 19))

COLUMNS = (
    ("weights", -8),
    ("sequences", 9),
    ("adapters", 8),
    ("none ms", 9),
    ("ms", 9),
    ("x none", 7),
)


def random_adapter(config: MistralConfig, rank: int) -> dict[str, LowRank]:
    return {
        name.removesuffix(".weight"): LowRank(
            torch.randn(rank, shape[1]), torch.randn(shape[0], rank), 1e-3
        )
        for name, shape in tensor_shapes(config).items()
        if name.startswith("layers.") and len(shape) == 2
    }


def measure(model: Transformer, slots: list[int], turns: int) -> dict[str, float]:
    steps = [decoder(model, len(slots), PROMPT, given) for given in (None, slots)]
    times = [_turn(steps) for _ in range(turns)]
    without, with_adapters = map(statistics.median, zip(*times, strict=True))
    return {
        "without_ms": without * 1e3,
        "ms": with_adapters * 1e3,
        "ratio": statistics.median(after / before for before, after in times),
    }


def _turn(steps: list[Callable[[], None]]) -> list[float]:
    times = []
    for step in steps:
        step()  # of two in a row the second is timed
        begin = time.process_time()
        step()
        times.append(time.process_time() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="bf16,int8,int4", help="of bf16, int8, int4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8, help="of 32")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    keep_freed_memory()
    facts = machine() | {"rank": options.rank, "layers": options.layers}
    print_machine(facts)
    print_header(COLUMNS)
    config = mistral_7b(options.layers)
    plain = random_weights(config)
    adapters = [random_adapter(config, options.rank) for _ in range(ADAPTERS)]
    rows: list[dict[str, Any]] = []
    for name in options.weights.split(","):
        model = Transformer(config, plain if name == "bf16" else quantized(plain, name))
        for slot, adapter in enumerate(adapters):
            model.adapters.put(slot, adapter)
        for slots in CASES:
            counts = {"sequences": len(slots), "adapters": len(set(slots))}
            row = {"weights": name, **counts, **measure(model, slots, options.turns)}
            rows.append(row)
            shown = f"{row['without_ms']:.1f}", f"{row['ms']:.1f}", f"{row['ratio']:.3f}"
            print_row(COLUMNS, [name, *map(str, counts.values()), *shown])
    if options.json:
        write_json(options.json, {"machine": facts, "rows": rows})


if __name__ == "__main__":
    main()
