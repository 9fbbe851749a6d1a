"""Torch in place of the ops whose gradients are needed."""

import reference
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mistral_ext import ops

REAL = {name: getattr(ops, name) for name in ("rms_norm", "linear", "swiglu", "attention")}


def plain(w):
    if isinstance(w, Tensor):
        return w
    if hasattr(w, "dequantize") and not isinstance(w, Tensor):
        return w.dequantize()
    ws = w.parts if hasattr(w, "parts") else w
    return torch.cat([plain(x) for x in ws])


def guarded(name, fn):
    def run(*a, **k):
        if torch.is_inference_mode_enabled():
            return REAL[name](*a, **k)
        return fn(*a, **k)

    return run


def attention(q, k, v, kp, vp, sequences, window=None, scale=None, max_count=None):
    return torch.cat(
        [
            reference.attention(q[f : f + n], k[f : f + n], v[f : f + n], window, scale)
            for f, n, *_ in sequences.tolist()
        ]
    )


def rotate(x, sequences, frequencies):
    pos = torch.cat([torch.arange(n) for _, n, *_ in sequences.tolist()])
    return reference.rotate(x, pos, frequencies)


def lce(x, weight, targets, weights=None, norm=None):
    losses = cross_entropy(
        (x @ plain(weight).to(x.dtype).T).float(), targets, reduction="none", ignore_index=-100
    )
    if weights is not None:
        losses = losses * weights
    return losses.sum(), losses


def stand_in(mp):
    mp.setattr(
        ops, "rms_norm", guarded("rms_norm", lambda x, w, eps: reference.rms_norm(x, w, eps))
    )
    mp.setattr(ops, "linear", guarded("linear", lambda x, w: x @ plain(w).to(x.dtype).T))
    mp.setattr(ops, "swiglu", guarded("swiglu", reference.swiglu))
    mp.setattr(ops, "attention", guarded("attention", attention))
    mp.setattr(ops, "rotate", rotate, raising=False)
    mp.setattr(ops, "linear_cross_entropy", lce, raising=False)
