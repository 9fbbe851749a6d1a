"""Keeps the options and the state of completions, by which `ops.sample` chooses tokens.

The options are applied in vLLM's order: logit bias, penalties, temperature, min_p, top_k, top_p.
The random noise of a draw is a pure function of the seed, the index of the completion, the number
of tokens drawn before, and the token. So it depends neither on the rest of the batch nor on which
tokens were drawn before.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_ext import ops
from mistral_ext.engine.params import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Sampler:
    """Chooses the next tokens of several completions in one call.

    The state of a completion is one row of several tensors on the device (see `ops.sample`).

    Args:
        rows: the most completions at a time.
        vocab_size: V, the number of ids that may be chosen.
        device: the device of the logits.
        holes: ids below V that no token has, and that are never chosen.

    Attributes:
        vocab_size: V.
    """

    def __init__(
        self,
        rows: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
        holes: Collection[int] = (),
    ) -> None:
        self.vocab_size = vocab_size
        # Tensors that are made in inference mode cannot be changed outside of it.
        with torch.inference_mode(False):
            self._options = torch.zeros(rows, 7, dtype=torch.float64, device=device)
            self._noise = torch.zeros(rows, 3, dtype=torch.int64, device=device)
            self._history = torch.zeros(rows, vocab_size, dtype=torch.int32, device=device)
        self._bias: Tensor | None = None  # [rows, V], made when a row first needs it
        self._plainly_greedy = [False] * rows
        self._unrestricted: dict[int, Tensor] = {}  # row -> its bias before `restrict`
        self._holes = tuple(holes)
        if holes:
            self._make_bias()

    def start(
        self,
        row: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        index: int = 0,
        completion_ids: Sequence[int] = (),
        seed: int | None = None,
    ) -> None:
        """Gives a row to a completion.

        Args:
            row: the row, 0 to rows - 1. The previous completion with this row must have ended.
            params: the options.
            prompt_ids: tokens of the prompt, for the repetition penalty.
            index: which of the prompt's n completions this is, from 0 on.
            completion_ids: the tokens that were already drawn.
            seed: the seed of the draws, 0 to 2^64 - 1. None: the seed of the options, or a random
                seed if they have none.

        Raises:
            ValueError: logit_bias has a token that may not be chosen.
        """
        params.check_vocabulary(self.vocab_size, self._holes)
        options = (
            params.temperature,
            min(params.top_k, self.vocab_size),
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._options[row] = torch.tensor(options, dtype=torch.float64, device="cpu")
        self._plainly_greedy[row] = params.plainly_greedy and not self._holes
        if seed is None:
            seed = fresh_seed(params)
        signed_seed = seed - 2**64 if seed >= 2**63 else seed  # int64 with the same 64 bits
        step = len(completion_ids)
        self._noise[row] = torch.tensor([signed_seed, index, step], device="cpu")
        self._history[row] = 0
        prompt = self._ids(prompt_ids)
        self._history[row, prompt[prompt < self.vocab_size]] = 1
        chosen = self._ids(completion_ids)
        self._history[row] += 2 * chosen.bincount(minlength=self.vocab_size).to(torch.int32)
        self._unrestricted.pop(row, None)
        biases = params.logit_bias or {}
        if biases and self._bias is None:
            self._make_bias()
        if self._bias is not None:
            self._bias[row] = 0
            self._bias[row, self._ids(self._holes)] = -torch.inf
            values = torch.tensor(list(biases.values()), dtype=torch.float32, device="cpu")
            self._bias[row, self._ids(list(biases))] = values.to(self._bias.device)

    def follow(self, other: Sampler, rows: Sequence[int]) -> None:
        """Copies the state of some completions from another sampler with as many rows and ids. So
        a draft model draws its guesses as the main model draws the tokens. If no completion needs a
        draw (`needs_no_draw`), copies only this fact.

        Args:
            rows: the rows of the completions. They are the same in both samplers.
        """
        for row in rows:
            self._plainly_greedy[row] = other._plainly_greedy[row]
        if self.needs_no_draw(rows):
            return
        index = self._ids(rows)
        self._options[index] = other._options[index]
        self._noise[index] = other._noise[index]
        self._history[index] = other._history[index]
        if other._bias is not None:
            if self._bias is None:
                self._make_bias()
            assert self._bias is not None
            self._bias[index] = other._bias[index]

    def restrict(self, row: int, allowed: NDArray[np.bool_]) -> None:
        """Limits a row to some tokens, until the next call of `restrict` or `start` for this row.

        Args:
            row: a row that `start` has given to a completion.
            allowed: [V or more], for each id whether it may be chosen.
        """
        if self._bias is None:
            self._make_bias()
        assert self._bias is not None
        if row not in self._unrestricted:
            self._unrestricted[row] = self._bias[row].clone()
            self._plainly_greedy[row] = False
        given = torch.from_numpy(allowed[: self.vocab_size]).to(self._bias.device)
        banned = self._bias.new_full((), -torch.inf)
        torch.where(given, self._unrestricted[row], banned, out=self._bias[row])

    @torch.inference_mode(False)  # tensors made in inference mode cannot be changed outside of it
    def _make_bias(self) -> None:
        self._bias = torch.zeros_like(self._history, dtype=torch.float32)

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self._history.device)

    @property
    def biased(self) -> bool:
        """Whether draws add a bias. The draws of all rows do so if the vocabulary has holes, or
        once a completion has had a logit_bias or a restriction."""
        return self._bias is not None

    def needs_no_draw(self, rows: Sequence[int]) -> bool:
        """Whether all these completions simply take the token with the largest logit."""
        return all(self._plainly_greedy[row] for row in rows)

    def sample(self, rows: Sequence[int], logits: Tensor) -> list[int]:
        """Chooses the next token of some of the completions.

        Args:
            rows: [N], the completions' rows.
            logits: [N, V or more] fp32. They are not changed, and columns after the first V are
                never chosen.

        Returns:
            The N token ids.

        Raises:
            ValueError: no token can be chosen. A logit is NaN, or all are -inf after biases and
                restrictions.
        """
        token_ids = self.draw_now(rows, logits)
        if -1 in token_ids:
            raise self.problem(logits[token_ids.index(-1)])
        return token_ids

    def draw(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Does the same as `sample`, but takes the rows as a tensor on the device, and returns the
        token ids as a tensor, without waiting for them. An id is -1 where `sample` raises an
        error."""
        logits = logits[:, : self.vocab_size]
        return ops.sample(logits, rows, self._options, self._noise, self._history, self._bias)

    def draw_now(self, rows: Sequence[int], logits: Tensor) -> list[int]:
        """Does the same as `sample`, but an id is -1 where `sample` raises an error."""
        token_ids: list[int] = self.draw(self._ids(rows), logits).tolist()
        return token_ids

    def problem(self, logits: Tensor) -> ValueError:
        """Makes the error that says why no token could be chosen.

        Args:
            logits: [V or more], the completion's logits.
        """
        if logits[: self.vocab_size].isnan().any():
            return ValueError("the model's logits are NaN: its weights may be damaged")
        return ValueError(
            "all logits are -inf, with logit_bias and what has to match: no token is left to choose"
        )


def fresh_seed(params: SamplingParams) -> int:
    """Returns the seed of the options, or a new random seed if they have none."""
    return secrets.randbits(64) if params.seed is None else params.seed


def token_logprob(
    logits: Tensor, token_id: int, count: int, holes: Collection[int] = ()
) -> TokenLogprob:
    """Returns the log-probability of a token, and those of the most likely tokens.

    Args:
        logits: [V] fp32.
        token_id: the token.
        count: the number of most likely tokens to report.
        holes: ids that no token has. Their probability is 0, and they are not reported.
    """
    logits = logits.to(torch.float64, copy=True)
    logits[list(holes)] = -torch.inf
    count = min(count, len(logits) - len(holes))
    logprobs = logits.log_softmax(-1)
    top = logprobs.sort(descending=True, stable=True)
    ids, values = top.indices[:count].tolist(), top.values[:count].tolist()
    return TokenLogprob(token_id, logprobs[token_id].item(), dict(zip(ids, values, strict=True)))
