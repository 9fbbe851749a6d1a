"""The kernels as functions on torch tensors, and as `torch.ops.mistral_ext.*`.

These ops have gradients for activations and adapters, but not for weights: `rms_norm` without a
residual, `rotate`, `attention` without pools, `linear`, `swiglu`, `lora` without `out`, and
`linear_cross_entropy`. While torch records gradients, any other argument that requires a gradient
raises RuntimeError. docs/kernels.md says how gradients are computed.

Activations and plain weights are float32, bfloat16 or float16. In a call all of them have the same
dtype, unless the op says otherwise. Kernels accumulate in float32 (for exceptions see `linear`;
`sample` computes in float64 and in integers). The last axis of an argument must have stride 1, and
weights, pools and tables must be contiguous. Other strides are free. For example, q, k and v may be
slices of one matrix. But no two elements of a tensor that an op changes may share memory, as those
of an expanded tensor do.

Wrong arguments raise ValueError (shapes, strides, numbers) or TypeError (dtypes, devices). The
message names the op, the argument, its value and what was expected. An argument that is not a
tensor raises an error of torch or Python.

Shape letters: T new tokens of all sequences, packed one after another; S sequences; E model
dimension; F hidden dimension; Hq query heads; Hkv key/value heads, a divisor of Hq; D head
dimension, a multiple of 32 up to 256; R rows of a layer's key or value pool.

The *sequence table*, int64 [S, 5], says for each sequence which tokens the call adds and where its
ring is. `mistral_ext.engine.slots.SlotPool` makes the table, and csrc/ring.h defines it:

    first_token  the index of the sequence's first new token among the T
    count        the number of its new tokens: 1 in a decode step, more for a chunk of a prompt, 0
                 if it has none
    position     the position of its first new token in the sequence
    ring_row     the first row of its ring in the pools
    capacity     C, the number of slots of its ring: at least the window, or else enough for all
                 tokens of the sequence

The ring is [Hkv, C, D] and holds position p in slot p mod C.

A sequence may also have several consecutive rows of the table, as in a step that checks guessed
tokens (drafts). Each row then has one new token, and the positions of these tokens are consecutive.
The rows share the ring of the sequence. On the CPU each token gets the same bits as in a call of
its own. All these tokens are stored before attention, and must not replace a token that one of
their queries reads. So C must be at least the length of the sequence, or the window plus the number
of rows after the first.

The values in a table and the ids of tokens are checked only on the CPU. On a GPU, a call would have
to wait to read them.
"""

from mistral_ext.ops.attention import attention
from mistral_ext.ops.cross_entropy import linear_cross_entropy
from mistral_ext.ops.embedding import embedding
from mistral_ext.ops.isa import (
    active_isa,
    exact_products,
    head_dims,
    select_isa,
    set_exact_products,
    supported_isas,
)
from mistral_ext.ops.linear import (
    linear,
    linear_argmax,
    linear_residual,
    linear_rope,
    linear_swiglu,
)
from mistral_ext.ops.lora import LowRank, lora
from mistral_ext.ops.rms_norm import rms_norm
from mistral_ext.ops.rope import rope
from mistral_ext.ops.rotate import rotate
from mistral_ext.ops.sample import sample
from mistral_ext.ops.swiglu import swiglu
from mistral_ext.ops.weight import JoinedWeight, Quantized, Weight, Weights

__all__ = [
    "JoinedWeight",
    "LowRank",
    "Quantized",
    "Weight",
    "Weights",
    "active_isa",
    "attention",
    "embedding",
    "exact_products",
    "head_dims",
    "linear",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_residual",
    "linear_rope",
    "linear_swiglu",
    "lora",
    "rms_norm",
    "rope",
    "rotate",
    "sample",
    "select_isa",
    "set_exact_products",
    "supported_isas",
    "swiglu",
]
