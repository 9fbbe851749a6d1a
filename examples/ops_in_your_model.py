"""The kernels in a model of your own: a transformer block over a cache, one token after another."""

import torch

from mistral_ext import ops
from mistral_ext.model.rope import frequencies

E, HEADS, D, F, WINDOW = 256, 4, 64, 512, 16
torch.manual_seed(0)


def weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k) / k**0.5


wq, wk, wv, wo = (weight(HEADS * D, E) for _ in range(4))
gate, up, down = weight(F, E), weight(F, E), weight(E, F)
norm = torch.ones(E)
turns = frequencies(1e4, D)  # of RoPE, radians per position
k_pool, v_pool = torch.zeros(2, HEADS * WINDOW, D)  # the ring of one sequence: WINDOW slots

tokens = torch.randn(40, E)  # embeddings; more than the window, so that slots are used again
for position in range(len(tokens)):
    h = tokens[position : position + 1].clone()  # [T, E], the residual stream of one new token
    # first_token, count, position, ring_row, capacity: see mistral_ext.ops
    rings = (k_pool, v_pool, torch.tensor([[0, 1, position, 0, WINDOW]]))
    qkv = ops.linear_rope(h, [wq, wk, wv], norm, 1e-5, *rings, turns, WINDOW)
    q, k, v = qkv.unflatten(1, (-1, D)).split(HEADS, dim=1)
    x = ops.attention(q, k, v, *rings, window=WINDOW)
    ops.linear_residual(x.flatten(1), wo, h)  # h += x @ wo.T
    ops.linear_residual(ops.linear_swiglu(h, [gate, up], norm), down, h)
print("last token:", [round(value, 3) for value in h[0, :4].tolist()])
