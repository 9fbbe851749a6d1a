"""Launches every CUDA kernel once or twice on small inputs, for compute-sanitizer.

compute-sanitizer --tool memcheck python bench/sanitizer_subset.py
"""

from __future__ import annotations

import torch
from shapes import GPU, HEAD_DIM, KV_HEADS, Rings, frequencies, random

from mistral_ext import ops
from mistral_ext.weights.quantize import quantize

WINDOW = 300


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, dim in ((3, 4096), (2, 333)):  # with and without 16-byte accesses
            x, y = (random(tokens, dim, dtype=dtype, device=GPU) for _ in range(2))
            ops.rms_norm(x, x[0].clone(), residual=y)
            ops.swiglu(x, y)
            ops.embedding(torch.tensor([1, 0], device=GPU), x, dtype)
        # Few tokens and more, rows and a K that end within a tile, a chunk and a row of scales.
        exact = torch.randn(70, 1120)
        for weight in (
            exact.to(dtype),
            *(quantize(exact, form) for form in ("int8", "q8_0", "iq4_nl")),
            quantize(exact, "int4", 32),
        ):
            weight = weight.to(GPU)
            ops.embedding(torch.tensor([69, 0], device=GPU), weight, dtype)
            for tokens in (1, 13, 33, 70):
                x = random(tokens, 1120, dtype=dtype, device=GPU)
                ops.linear(x, [weight, weight], x[0].clone())
                ops.linear_residual(x, weight, random(tokens, 70, dtype=dtype, device=GPU))
                ops.linear_swiglu(x, [weight, weight])
                ops.linear_argmax(x, weight, limit=69)
                rings = Rings(1, tokens, 0, tokens, dtype, GPU).arguments()[3:]
                heads = [
                    random(n * HEAD_DIM, 1120, dtype=dtype, device=GPU)
                    for n in (2 * KV_HEADS, KV_HEADS, KV_HEADS)
                ]
                ops.linear_rope(x, heads, x[0].clone(), 1e-5, *rings, frequencies(GPU), WINDOW)
        # A decode whose keys are divided among blocks; a prompt; a chunk on a full ring.
        for sequences, tokens, history in ((2, 1, 1000), (1, 130, 0), (2, 70, 500)):
            rings = Rings(sequences, tokens, history, WINDOW, dtype, GPU)
            ops.rope(*rings.arguments(), frequencies(GPU), WINDOW)
            ops.attention(*rings.arguments(), WINDOW, max_count=tokens)
    for vocab_size in (2048, 1001):
        options = [[0, 0, 1, 0, 1, 0, 0], [0.8, 50, 0.9, 0.01, 1.1, 0.1, 0.1]]
        ops.sample(
            torch.randn(2, vocab_size, device=GPU),
            torch.arange(2, device=GPU),
            torch.tensor(options, dtype=torch.float64, device=GPU),
            torch.zeros(2, 3, dtype=torch.int64, device=GPU),
            torch.zeros(2, vocab_size, dtype=torch.int32, device=GPU),
        )
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
