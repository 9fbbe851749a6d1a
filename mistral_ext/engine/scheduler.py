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
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mistral_ext.engine.cache import RingCache
from mistral_ext.engine.decoding import Decoder, Step, decoder
from mistral_ext.engine.sampling import Sampler, SamplingParams, TokenLogprob, token_logprob
from mistral_ext.model.transformer import Transformer
from mistral_ext.text.text_stream import TextStream


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


class Scheduler:
    """Completes requests, as many at a time as the cache has rings.

    The state of sampling and, on a GPU, the captured steps belong to the rings: they serve every
    run, one after the other.

    Args:
        model: the weights.
        cache: at least one ring.
        vocab_size: ids that may be sampled, as of all requests.

    Attributes:
        cache: as given.
    """

    def __init__(self, model: Transformer, cache: RingCache, vocab_size: int) -> None:
        self.cache = cache
        self._model = model
        self._sampler = Sampler(len(cache.capacities), vocab_size, model.device)
        self._decoder = decoder(model, cache, self._sampler)

    @property
    def worth_keeping(self) -> bool:
        """Whether another one, for the next requests, would have to capture its steps anew."""
        return self._decoder.captures

    def run(self, requests: Sequence[Request], prefill_chunk: int) -> Iterator[tuple[Request, str]]:
        """Completes all requests; yields (request, piece of text) for every token that is sampled.

        A ring takes a request that needs no more slots than it has. A ring that already holds a
        prefix of its first request's tokens keeps it; only the rest is read.

        Args:
            requests: the waiting, served in this order; the largest ring must do for every one.
            prefill_chunk: prompt tokens read in one step, at most.
        """
        run = _Run(self._model, self.cache, self._sampler, self._decoder, requests, prefill_chunk)
        return run.pieces()


class _Run:
    def __init__(
        self,
        model: Transformer,
        cache: RingCache,
        sampler: Sampler,
        decoder: Decoder,
        requests: Sequence[Request],
        prefill_chunk: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._decoder = decoder
        self._prefill_chunk = prefill_chunk
        self._waiting = list(requests)
        self._free = list(range(len(cache.capacities)))
        self._active: dict[int, Request] = {}  # ring -> the request it serves
        self._under_way: deque[Step] = deque()  # decode steps whose tokens are not read yet

    def pieces(self) -> Iterator[tuple[Request, str]]:
        while self._waiting or self._active:
            self._admit()
            yield from self._read_prompt()
            yield from self._decode()
            if not self._under_way:
                self._release()

    def _admit(self) -> None:
        while self._waiting and self._free:
            ring, request = self._free.pop(0), self._waiting.pop(0)
            self._active[ring] = request
            self._sampler.start(ring, request.params, request.ids, request.index)

    def _release(self) -> None:
        for ring, request in list(self._active.items()):
            if request.finish_reason:
                del self._active[ring]
                if self._waiting:  # else the ring keeps its tokens: a chat goes on from them
                    self._cache.rewind(ring, 0)
                    self._free.append(ring)

    def _read_prompt(self) -> Iterator[tuple[Request, str]]:
        """Reads the next chunk of the first prompt that has more than a token to be read."""
        cache = self._cache
        for ring, request in self._active.items():
            unread = request.ids[cache.lengths[ring] :]
            if len(unread) > 1:
                break
        else:
            return
        new = unread[: self._prefill_chunk]
        request.note_read(len(new))
        rows = torch.tensor([len(new) - 1] if new == unread else [], dtype=torch.int64)
        logits = self._model.forward(torch.tensor(new), cache.append({ring: len(new)}), cache, rows)
        if new == unread:
            (token_id,) = self._sampler.sample([ring], logits)
            yield request, request.accept(token_id, logits[0])

    def _decode(self) -> Iterator[tuple[Request, str]]:
        """Launches the step of all that have read their prompt, or, before there are others than
        in the last one, waits for that; reads what has been waited for long enough."""
        rings = [ring for ring in self._active if self._may_go_on(ring)]
        if self._under_way and self._under_way[-1].rings != rings:
            while self._under_way:
                yield from self._accept(self._under_way.popleft())
        elif rings:
            token_ids = None
            if not self._under_way:
                token_ids = [self._active[ring].ids[-1] for ring in rings]
            for ring in rings:
                if self._cache.lengths[ring] < self._active[ring].prompt_length:
                    self._active[ring].note_read(1)
            self._under_way.append(self._decoder.launch(rings, token_ids))
            if len(self._under_way) > self._decoder.ahead:
                yield from self._accept(self._under_way.popleft())

    def _may_go_on(self, ring: int) -> bool:
        """Whether there is to be another token, as far as is known, after those under way."""
        request, length = self._active[ring], self._cache.lengths[ring]
        has_read = length >= len(request.ids) - 1
        return not request.finish_reason and has_read and length + 1 < request.max_length

    def _accept(self, step: Step) -> Iterator[tuple[Request, str]]:
        for ring, token_id, row in zip(step.rings, step.token_ids(), step.logits, strict=True):
            request = self._active[ring]
            if request.finish_reason:
                # The step had been launched when its end became known. What it stored took the
                # place of nothing that the sequence still sees.
                self._cache.rewind(ring, self._cache.lengths[ring] - 1)
            else:
                yield request, request.accept(token_id, row)
