"""Chooses the next token."""

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

    `options` and the state of completions (`noise` and `history`) are tables with a row for each of
    M completions. They are on the device of the logits, so a decode loop needs no data from the
    host. `mistral_ext.engine.sampling.Sampler` keeps the tables. The columns of two of them are:

        options  temperature, top_k (0: all), top_p, min_p, repetition_penalty, presence_penalty,
                 frequency_penalty
        noise    seed (its 64 bits), index (the number of the completion among those with this
                 seed, from 0 on), step (the number of tokens drawn before)

    Args:
        logits: [N, V] float32, V up to 2^24.
        rows: [N] int64, for each row of logits its row of the tables. No two may be the same.
        options: [M, 7] float64.
        noise: [M, 3] int64. The op adds 1 to the step of each row that it uses.
        history: [M, V] int32, for each token 2 * (number of times chosen), plus 1 if it is in the
            prompt. The op adds 2 for the chosen token.
        bias: [M, V] float32, added to the logits. None: nothing is added.

    Returns:
        [N] int64 token ids. The id is -1 if a logit is NaN or all are -inf (with the bias). The
        state of such a row does not change.

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
