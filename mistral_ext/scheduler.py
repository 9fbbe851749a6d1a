"""Runs many completions through the model together.

A step is one pass over the weights: in turn, one for the next chunk of one prompt, and one for
the next token of every completion that has read its prompt. They are not mixed. Sums of floating
point numbers depend on how many tokens a product has, and so would the text, on what else is in the
batch: this way a prompt is cut and multiplied as if alone, and the products of up to 8 decoded
tokens do not depend on their number (`ops.linear`). A completion that ends leaves the batch for
good and gives its ring to the next one waiting.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mistral_ext.cache import RingCache
from mistral_ext.model import Transformer
from mistral_ext.sampling import Sampler, SamplingParams, TokenLogprob, token_logprob
from mistral_ext.text_stream import TextStream


@dataclass(frozen=True)
class Timing:
    """Where a completion's time went, in seconds of wall clock."""

    prompt_tokens: int  # read for this completion; less than the prompt if a cache held the rest
    prompt_seconds: float  # from its first step to its first token
    decode_tokens: int  # generated after the first
    decode_seconds: float

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second after the first; 0 if there was no second."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    text: str | None  # None: the model has no tokenizer
    token_ids: list[int]  # as sampled, an end-of-text token included
    finish_reason: str  # "stop": end of text or a stop string; "length": max_tokens or the limit
    logprobs: list[TokenLogprob] | None  # one per token id, if asked for
    timing: Timing


class Request:
    """A completion in the making.

    Args:
        prompt_ids: at least one token id.
        params: how to sample.
        max_length: tokens of prompt and completion together, at most.
        eos_ids: tokens that end it.
        vocab_size: ids that may be sampled.
        index: which of the prompt's n completions.
        text: turns token ids into text; None without a tokenizer.

    Raises:
        ValueError: logit_bias has a token that may not be sampled.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        max_length: int,
        eos_ids: Sequence[int],
        vocab_size: int,
        index: int = 0,
        text: TextStream | None = None,
    ) -> None:
        params.check_vocabulary(vocab_size)
        self.ids = list(prompt_ids)  # the prompt, then what was generated
        self.prompt_length = len(self.ids)
        self.params = params
        self.vocab_size = vocab_size
        self.index = index
        self.max_length = max_length
        self.finish_reason: str | None = None
        self.text = text
        self._eos_ids = () if params.ignore_eos else tuple(eos_ids)
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._read = 0  # prompt tokens that went through the model
        self._started = self._first = self._last = 0.0

    def note_read(self, count: int) -> None:
        """Counts prompt tokens as they are given to the model."""
        if self._read == 0:
            self._started = time.perf_counter()
        self._read += count

    def accept(self, token_id: int, logits: torch.Tensor) -> str:
        """Takes the next token, sampled from logits [V]; returns the text that this makes final."""
        self._last = time.perf_counter()
        if len(self.ids) == self.prompt_length:
            self._first = self._last
        self.ids.append(token_id)
        if self._logprobs is not None:
            self._logprobs.append(token_logprob(logits, token_id, self.params.logprobs))
        if token_id in self._eos_ids:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.max_length:
            self.finish_reason = "length"
        if not self.text:
            return ""
        piece = self.text.push(token_id)
        if self.finish_reason:
            piece += self.text.finish()
        if self.text.stopped:
            self.finish_reason = "stop"
        return piece

    def completion(self) -> Completion:
        """The result, once `finish_reason` is set."""
        token_ids = self.ids[self.prompt_length :]
        return Completion(
            text=self.text.text if self.text else None,
            token_ids=token_ids,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs,
            timing=Timing(
                prompt_tokens=self._read,
                prompt_seconds=self._first - self._started,
                decode_tokens=len(token_ids) - 1,
                decode_seconds=self._last - self._first,
            ),
        )


def run(
    model: Transformer, cache: RingCache, requests: Sequence[Request], prefill_chunk: int
) -> Iterator[tuple[Request, str]]:
    """Completes all requests; yields (request, piece of text) for every token that is sampled.

    A ring takes a request that needs no more slots than it has. A ring that already holds a
    prefix of its first request's tokens keeps it; only the rest is read.

    Args:
        model: the weights.
        cache: at least one ring; the largest must do for every request.
        requests: the waiting, at least one, served in this order; of one vocabulary.
        prefill_chunk: prompt tokens read in one step, at most.
    """
    waiting = list(requests)
    active: dict[int, Request] = {}  # ring -> the request it serves
    free = list(range(len(cache.capacities)))
    sampler = Sampler(len(free), waiting[0].vocab_size, model.device)
    while waiting or active:
        while waiting and free:
            ring, request = free.pop(0), waiting.pop(0)
            active[ring] = request
            sampler.start(ring, request.params, request.ids, request.index)
        for tokens in _next_steps(active, cache, prefill_chunk):
            sampled, logits = _step(model, cache, active, tokens)
            token_ids = sampler.sample(sampled, logits)
            for ring, token_id, row in zip(sampled, token_ids, logits, strict=True):
                request = active[ring]
                piece = request.accept(token_id, row)
                if request.finish_reason:
                    del active[ring]
                    if waiting:  # else the ring keeps its tokens: a chat goes on from them
                        cache.rewind(ring, 0)
                        free.append(ring)
                yield request, piece


def _next_steps(
    active: dict[int, Request], cache: RingCache, prefill_chunk: int
) -> Iterator[dict[int, list[int]]]:
    """{ring: tokens to read}: the next chunk of the first prompt that is not read yet, if there is
    one; then, as things are after that, the one unread token of every completion."""
    for ring, request in active.items():
        unread = request.ids[cache.lengths[ring] :]
        if len(unread) > 1:
            yield {ring: unread[:prefill_chunk]}
            break  # `active` may have changed
    last = {ring: request.ids[cache.lengths[ring] :] for ring, request in active.items()}
    decodes = {ring: unread for ring, unread in last.items() if len(unread) == 1}
    if decodes:
        yield decodes


def _step(
    model: Transformer, cache: RingCache, active: dict[int, Request], tokens: dict[int, list[int]]
) -> tuple[list[int], torch.Tensor]:
    """One pass over the weights; the rings that have read all they have, and their logits."""
    token_ids, last_rows, complete = [], [], []
    for ring, new in tokens.items():
        request, length = active[ring], cache.lengths[ring]
        if length < request.prompt_length:
            request.note_read(len(new))
        token_ids += new
        if length + len(new) == len(request.ids):
            last_rows.append(len(token_ids) - 1)
            complete.append(ring)
    sequences = cache.append({ring: len(new) for ring, new in tokens.items()})
    rows = torch.tensor(last_rows, dtype=torch.int64)
    return complete, model.forward(torch.tensor(token_ids), sequences, cache, rows)
