"""Every op and the whole model in plain torch: the specification that the kernels are tested on.

Written to be read, not to be fast. Each function computes in the dtype of its arguments: called
with float32 or float64 it is the exact answer; called with bfloat16 or float16 it is what a plain
torch program would get, the yardstick for a kernel's own rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def embedding(weight: Tensor, token_ids: Tensor) -> Tensor:
    """weight: [V, E], token_ids: [T]."""
    return weight[token_ids]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, E], weight: [E]. Normalises in fp32 or better, rounds, then multiplies."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def frequencies(theta: float, dim: int, device: str = "cpu") -> Tensor:
    """[D/2] float64: theta^(-2i/D)."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x: [T, H, D], positions: [T]. Pairs (i, i + D/2) turn by position * frequencies[i]."""
    half = x.shape[-1] // 2
    angles = positions.double()[:, None, None] * frequencies  # [T, 1, D/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: the last `queries` of `keys` tokens see themselves and W - 1 before."""
    p = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)[None]
    return (j <= p) & (j > p - (window or keys))


def attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None = None
) -> Tensor:
    """One sequence, no cache. q: [Tq, Hq, D], the last of it; k, v: [Tk, Hkv, D], all of it."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    seen = visible(q.shape[0], k.shape[0], window, q.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return torch.einsum("hqk,khd->qhd", wide.softmax(-1).to(q.dtype), v)


def lora(
    x: Tensor, a: Tensor, b: Tensor, scales: Tensor, ranks: Tensor, adapters: Tensor, parts: list
) -> Tensor:
    """What `ops.lora` adds: [T, N]. a: [A, P, R, K], b: [A, R, N], scales, ranks: [A, P]."""
    added = x.new_zeros(len(x), b.shape[2])
    for token, adapter in enumerate(adapters.tolist()):
        if adapter < 0:
            continue
        columns = added[token].split(parts)
        for part, of_part in enumerate(b[adapter].split(parts, dim=1)):
            rank = int(ranks[adapter, part])
            hidden = a[adapter, part, :rank] @ x[token]
            columns[part].copy_(scales[adapter, part].to(x.dtype) * (hidden @ of_part[:rank]))
    return added


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def sample(
    logits: np.ndarray,
    options: Sequence[float],
    noise: Sequence[int],
    history: np.ndarray,
    bias: np.ndarray | None = None,
) -> int:
    """One row of `ops.sample`: logits, history and bias are [V], options and noise table rows."""
    temperature, top_k, top_p, min_p, *penalties = options
    x = penalised(logits, penalties, history, bias).astype(np.float32)
    if np.isnan(x).any() or x.max() == -np.inf:
        return -1
    if temperature == 0:
        return int(x.argmax())
    x = x.astype(np.float64) / temperature

    left = np.flatnonzero(x > -np.inf)
    if min_p > 0:
        left = np.flatnonzero(x >= x.max() + math.log(min_p))
    left = left[np.argsort(-x[left], kind="stable")]  # ties: the lower id first
    if top_k > 0:
        left = left[: int(top_k)]
    if top_p < 1:
        probabilities = np.exp(x[left] - x[left[0]])
        reached = np.cumsum(probabilities) / probabilities.sum()
        left = left[: np.searchsorted(reached, top_p) + 1]
    left.sort()
    return int(left[(x[left] + gumbel(noise, len(x))[left]).argmax()])


def penalised(
    logits: np.ndarray,
    penalties: Sequence[float],
    history: np.ndarray,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """[V] float64, the first steps of `sample`; penalties: repetition, presence, frequency."""
    repetition, presence, frequency = penalties
    with np.errstate(invalid="ignore"):  # inf - inf
        x = (logits if bias is None else logits + bias).astype(np.float64)
    x = np.where(history != 0, np.where(x > 0, x / repetition, x * repetition), x)
    count = history // 2
    return x - presence * (count > 0) - frequency * count


def gumbel(noise: Sequence[int], size: int) -> np.ndarray:
    """[V] what `sample` adds to the logits of a draw; noise: seed, index and step."""
    seed, index, step = noise
    key = np.array([seed, index], dtype=np.uint64)  # of a list, numpy might make floats
    philox = np.random.Philox(key=key, counter=[0, step, 0, 0])
    uniform = np.random.Generator(philox).random(size)
    with np.errstate(divide="ignore"):  # a uniform 0 gives noise -inf
        return -np.log(-np.log(uniform))


def model(weights: dict[str, Tensor], config, token_ids: Tensor) -> Tensor:
    """Logits [T, V] of one sequence; `weights` as checkpoint.load_weights gives them."""
    positions = torch.arange(len(token_ids), device=token_ids.device)
    h = embedding(weights["tok_embeddings.weight"], token_ids)
    for i in range(config.n_layers):
        w = {name: weights[f"layers.{i}.{name}.weight"] for name in LAYER_WEIGHTS}
        x = rms_norm(h, w["attention_norm"], config.norm_eps)
        q = (x @ w["attention.wq"].T).unflatten(-1, (config.n_heads, config.head_dim))
        k = (x @ w["attention.wk"].T).unflatten(-1, (config.n_kv_heads, config.head_dim))
        v = (x @ w["attention.wv"].T).unflatten(-1, (config.n_kv_heads, config.head_dim))
        turns = frequencies(config.rope_theta, config.head_dim, x.device)
        q, k = rotate(q, positions, turns), rotate(k, positions, turns)
        x = attention(q, k, v, config.sliding_window).flatten(1)
        h = h + x @ w["attention.wo"].T
        x = rms_norm(h, w["ffn_norm"], config.norm_eps)
        x = swiglu(x @ w["feed_forward.w1"].T, x @ w["feed_forward.w3"].T)
        h = h + x @ w["feed_forward.w2"].T
    return rms_norm(h, weights["norm.weight"], config.norm_eps) @ weights["output.weight"].T


LAYER_WEIGHTS = (
    "attention_norm",
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "ffn_norm",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


_TABLE4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def _nearest(x: Tensor) -> Tensor:
    """The values of the table of 16 next to x; the larger value half-way."""
    table = torch.tensor(_TABLE4[::-1], dtype=x.dtype)
    return table[(x.unsqueeze(-1) - table).abs().argmin(-1)]


def _best_scale(x: Tensor, counts: Tensor) -> Tensor:
    """[]: of the scales that are tried for 32 weights, that with the least weighted error."""
    extreme = x.max() if x.max() >= -x.min() else x.min()
    best, least = extreme * 0, torch.inf
    for tried in (0.86, 0.94, 1.02, 1.10):
        for end in (-127, 113):
            if extreme == 0:
                continue
            t = _nearest(x * end / (extreme * tried))
            scale = (counts * x * t).sum() / (counts * t * t).sum()
            error = (counts * (x - scale * t).square()).sum()
            if error < least:
                best, least = scale, error
    return best


def round_to_table(weight: Tensor, importance: Tensor | None, two_levels: bool) -> Tensor:
    """[N, K] float64: a weight [N, K] with values from the table of 16. Each 32 weights have an
    fp16 scale, or with two levels a multiple, -32 to 31, of an fp16 scale of 256 weights."""
    weight = weight.double()
    out = torch.empty_like(weight)
    for row, found in zip(weight, out, strict=True):
        for begin in range(0, len(row), 256):
            part = slice(begin, begin + 256)
            counts = row[part].abs() + row[part].abs().mean()
            if importance is not None:
                counts = counts * importance[part]
            groups = list(zip(row[part].split(32), counts.split(32), strict=True))
            scales = torch.stack([_best_scale(*group) for group in groups])
            upper = (scales[scales.abs().argmax()] / -32).half().double()
            for i, (x, v) in enumerate(groups):
                tried = [scales[i].half().double()]
                if two_levels:
                    middle = int((scales[i] / upper).round().clamp(-32, 31))
                    tried = [m * upper for m in range(middle - 1, middle + 2) if -32 <= m <= 31]
                made = [s * _nearest(x / s) if s != 0 else 0 * x for s in tried]
                errors = [(v * (x - m).square()).sum() for m in made]
                found[part][32 * i : 32 * i + 32] = made[errors.index(min(errors))]
    return out
