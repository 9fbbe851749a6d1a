"""The choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import fake_empty, register
from mistral_ext.ops.workspace import run


def sample(
    logits: Tensor,
    rows: Tensor,
    options: Tensor,
    noise: Tensor,
    history: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Chooses the next token of each row of logits, by the options and state of its completion.

    The steps are, in this order: bias, repetition penalty, presence and frequency penalties,
    rounding to float32, temperature, min_p, top_k, top_p, and a draw by the Gumbel-max rule. The
    noise of the draw is a pure function of (seed, index, step, token). A temperature of 0 takes the
    largest logit. Among equal logits the lowest id is chosen. The same arguments give the same
    tokens on every device, whatever else is in the batch. csrc/sample.h has the full definition.

    Options and state are tables with a row for each completion. They are on the device of the
    logits, so a decode loop needs no data from the host. `mistral_ext.engine.sampling.Sampler`
    keeps the tables. Their columns are:

        options  temperature, top_k (0: all), top_p, min_p, repetition_penalty, presence_penalty,
                 frequency_penalty
        noise    seed (its 64 bits), index (which of the completions of one seed), step

    Args:
        logits: [N, V] float32, V up to 2^24.
        rows: [N] int64, the row of the tables for each row of logits. No two rows are the same.
        options: [M, 7] float64.
        noise: [M, 3] int64. The op adds 1 to the column step.
        history: [M, V] int32, 2 * (times chosen) + (1 if in the prompt) for each token. The op
            counts the chosen token here.
        bias: [M, V] float32, added to the logits. None: nothing is added.

    Returns:
        [N] int64 token ids. The id is -1 if a logit is NaN or all are -inf. The state of such a row
        does not change.

    Source: Gumbel 1954 and Maddison et al. 2014, arXiv:1411.0030 (Gumbel-max); Salmon et al. 2011
    (Philox); Holtzman et al. 2020, arXiv:1904.09751 (top_p); Keskar et al. 2019, arXiv:1909.05858
    (repetition penalty).
    """
    out: Tensor = torch.ops.mistral_ext.sample(logits, rows, options, noise, history, bias)
    return out


_SCHEMA = (
    "sample(Tensor logits, Tensor rows, Tensor options, Tensor(a!) noise, Tensor(b!) history, "
    "Tensor? bias=None) -> Tensor"
)


def _run(
    logits: Tensor,
    rows: Tensor,
    options: Tensor,
    noise: Tensor,
    history: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    out = rows.new_empty(rows.shape)
    run(_C.sample(logits, rows, options, noise, history, bias, out), logits)
    return out


def _fake(logits: Tensor, rows: Tensor, *_: object) -> Tensor:
    return fake_empty(rows, rows.shape)


register(_SCHEMA, _run, _fake)
