"""The product of linear alone, beside torch's: a part of cpu.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from measure import keep_freed_memory, median_seconds, print_header, print_row
from shapes import random
from torch.nn import functional

from mistral_ext import ops
from mistral_ext.bench import DEFAULT_WEIGHTS as MADE
from mistral_ext.bench.peaks import matrix_rate
from mistral_ext.weights.quantize import NAMES, quantize

LINEAR_SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))  # in, out
LINEAR_TOKENS = (256, 512, 1024)

LINEAR_COLUMNS = (
    ("in x out", -12),
    ("tokens", 6),
    ("bf16 GFLOP/s", 12),
    ("of peak", 7),
    ("torch", 6),
    ("of peak", 7),
    ("x torch", 7),
    ("int8 x bf16", 11),
    ("int4 x bf16", 11),
)


@torch.inference_mode()
def linear_table(kinds: list[str], turns: float) -> list[dict[str, Any]]:
    """Measures and prints linear alone, in bf16 and the `kinds` among MADE."""
    print("\nlinear\n")
    print_header(LINEAR_COLUMNS)
    keep_freed_memory()
    rows = []
    for inputs, outputs in LINEAR_SHAPES:
        weight = random(outputs, inputs, dtype=torch.bfloat16).mul_(0.02)
        weights = {
            kind: weight if kind == "bf16" else quantize(weight, NAMES[kind])
            for kind in MADE
            if kind == "bf16" or kind in kinds
        }
        for tokens in LINEAR_TOKENS:
            x = random(tokens, inputs, dtype=torch.bfloat16)
            functions = {
                kind: functools.partial(ops.linear, x, each) for kind, each in weights.items()
            }
            functions["torch"] = functools.partial(functional.linear, x, weight)
            before = matrix_rate()
            seconds = dict(
                zip(
                    functions,
                    median_seconds(list(functions.values()), 0.5 * turns),
                    strict=True,
                )
            )
            peak = (before + matrix_rate()) / 2
            n_flops = 2 * tokens * inputs * outputs
            rows.append({"in": inputs, "out": outputs, "tokens": tokens, "flops": n_flops})
            rows[-1] |= {"seconds": seconds, "peak": peak}
            cells = [f"{inputs} x {outputs}", f"{tokens}"]
            for name in ("bf16", "torch"):
                rate = n_flops / seconds[name]
                cells += [f"{rate / 1e9:.0f}", f"{rate / peak:.0%}" if peak else ""]
            cells.append(f"{seconds['torch'] / seconds['bf16']:.2f}")
            for kind in ("int8", "int4"):
                cells.append(f"{seconds['bf16'] / seconds[kind]:.2f}" if kind in seconds else "")
            print_row(LINEAR_COLUMNS, cells)
    return rows
