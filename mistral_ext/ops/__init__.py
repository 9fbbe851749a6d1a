"""The kernels as functions on torch tensors, and as `torch.ops.mistral_ext.*`.

Inference only: no op has a gradient, and where torch records them, an argument that requires one
is a RuntimeError. Tensors are float32, bfloat16 or float16, all arguments of
a call of one dtype; arithmetic is done in float32 (in both, `sample` is different). Nothing is
copied or made contiguous behind the caller's back: the last axis must have stride 1 (the weights,
pools and tables must be contiguous), other strides are free, so q, k and v may be slices of one
matrix. Wrong arguments raise ValueError (shapes, strides, numbers) or TypeError (dtypes, devices,
not a tensor) with the op, the argument, what was expected and what was given.

Shape letters: T new tokens of all sequences, packed one after another; S sequences; E model
dimension; F hidden dimension; Hq query heads; Hkv key/value heads, a divisor of Hq; D head
dimension, a multiple of 32 up to 256; R rows of a layer's key or value pool.

The *sequence table*, int64 [S, 5], says for each sequence what the call adds to it and where its
ring is (`mistral_ext.engine.slots.SlotPool` makes it; csrc/ring.h defines it):

    first_token  index of its first new token among the T
    count        how many new tokens it has: 1 in decode, more for a prompt chunk, 0 if idle
    position     absolute position of the first of them
    ring_row     first row of its ring in the pools
    capacity     C, slots of its ring: the window, or its longest length if that is less

The ring is [Hkv, C, D] and holds position p in slot p mod C.

What a table holds is checked on the CPU only: to read it back from a GPU would make a call wait.
"""

from mistral_ext.ops.attention import attention
from mistral_ext.ops.isa import active_isa, head_dims, select_isa, supported_isas
from mistral_ext.ops.linear import (
    linear,
    linear_argmax,
    linear_residual,
    linear_rope,
    linear_swiglu,
)
from mistral_ext.ops.rms_norm import rms_norm
from mistral_ext.ops.rope import rope
from mistral_ext.ops.sample import sample
from mistral_ext.ops.swiglu import swiglu
from mistral_ext.ops.weight import JoinedWeight, Quantized, Weight, Weights

__all__ = [
    "JoinedWeight",
    "Quantized",
    "Weight",
    "Weights",
    "active_isa",
    "attention",
    "head_dims",
    "linear",
    "linear_argmax",
    "linear_residual",
    "linear_rope",
    "linear_swiglu",
    "rms_norm",
    "rope",
    "sample",
    "select_isa",
    "supported_isas",
    "swiglu",
]
