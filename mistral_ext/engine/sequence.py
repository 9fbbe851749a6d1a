"""A request while the engine works on it."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch

from mistral_ext.engine.params import TokenLogprob
from mistral_ext.engine.proposer import Proposer
from mistral_ext.engine.request import Completion, Output, Request, Timing
from mistral_ext.engine.sampling import fresh_seed, token_logprob
from mistral_ext.engine.slots import Extent
from mistral_ext.text.grammar import Matcher


class Sequence:
    """The tokens of a request, and its places in the cache and the sampler.

    Args:
        request_id: the id that the engine gave to the request. Later requests have larger ids.
        request: the request, as the engine got it.
        vocab_size: the ids below this may be sampled, except `holes`.
        holes: ids below vocab_size that no token has.

    Attributes:
        ids: the tokens of the prompt, then the generated tokens.
        seed: the seed with which the sequence's tokens are drawn.
        extent: the sequence's slots of the cache. None: the sequence waits, or has ended.
        row: the sequence's row of the sampler. None: the sequence waits, has ended, or generates
            nothing.
        exact: the number of tokens at the beginning of the extent that any prompt with the same
            beginning may reuse, because it would get the same keys and values (to the bit on the
            CPU). The count ends before the first token that a decode step has read, because decode
            steps use other kernels, which round differently. So do small pieces of a prompt: for a
            prompt with a `Request.chunk`, or of fewer than `prefix_cache.LEAST_PIECE` tokens, the
            number is 0.
        reported: the number of prompt tokens whose logits or hidden states were given already, or
            are not requested.
        is_drawing: whether the sampler's row already has the options and state of this sequence. If
            not, it gets them before the next draw.
        was_put_back: whether the sequence ran before and lost its place in the cache.
        finish_reason: why the sequence has ended. None: it has not ended.
        is_aborted: whether the request was aborted, so that nobody waits for its outputs.
        matcher: knows which tokens may come next. None: any token may come next.
        proposer: guesses the next tokens.
        drafted, accepted: the number of guessed tokens (drafts) that were checked, and how many of
            them were right.
    """

    def __init__(
        self, request_id: int, request: Request, vocab_size: int, holes: Collection[int] = ()
    ) -> None:
        self.request_id = request_id
        self.request = request
        self.ids = list(request.prompt_ids)
        self.prompt_length = len(self.ids)
        self.extent: Extent | None = None
        self.row: int | None = None
        self.exact = 0
        self.reported = request.logits_from
        self.is_drawing = False
        self.was_put_back = False
        self.finish_reason: str | None = None
        self.is_aborted = False
        self.seed = 0
        self.matcher: Matcher | None = None
        self.drafted = self.accepted = 0
        self._vocab_size = vocab_size
        self._holes = holes
        self._eos_ids: tuple[int, ...] = ()
        self._logprobs: list[TokenLogprob] = []
        # The number of likely tokens whose log-probabilities are reported beside that of each
        # generated token. None: no log-probabilities are reported.
        self._others: int | None = None
        params = request.params
        if params is not None:
            params.check_vocabulary(vocab_size, holes)
            self.seed = fresh_seed(params)
            self._eos_ids = () if params.ignore_eos else tuple(request.eos_ids)
            self._others = params.logprobs
            if request.grammar is not None:
                self.matcher = request.grammar.matcher(request.eos_ids, not params.ignore_eos)
        self.proposer = Proposer(self.ids, self._eos_ids)
        self._read = self._cached = 0
        self._added = time.perf_counter()
        self._started = self._first = self._last = 0.0

    @property
    def place(self) -> Extent:
        """The sequence's extent. The sequence must be running."""
        assert self.extent is not None
        return self.extent

    @property
    def sampler_row(self) -> int:
        """The sequence's row of the sampler. The sequence must be running, and generate tokens."""
        assert self.row is not None
        return self.row

    @property
    def reads_prompt(self) -> bool:
        """Whether a part of the prompt is not in the cache yet. The sequence must be running."""
        return self.place.length < self.prompt_length

    @property
    def next_id(self) -> int:
        """The token that the next decode step reads. A step under way must not still be computing
        it."""
        return self.ids[self.place.length]

    @property
    def generates(self) -> bool:
        """Whether the next decode step gives a new token. A sequence that was put back has to read
        its generated tokens again first, and those steps give no new tokens."""
        return self.place.length >= len(self.ids) - 1

    @property
    def is_open(self) -> bool:
        """Whether the sequence has neither ended nor been aborted. A step under way may still
        compute a token that ends it."""
        return self.finish_reason is None and not self.is_aborted

    def note_read(self, count: int) -> None:
        """Counts prompt tokens as they are given to the model."""
        if not self._started:
            self._started = time.perf_counter()
            self._cached = self.place.length
        # A prompt that is read again after tokens were generated does not count.
        if len(self.ids) == self.prompt_length:
            self._read += count

    def report(self, results: torch.Tensor) -> Output:
        """Makes an output of results for the next n tokens of the prompt: logits [n, V] or hidden
        states [n, E]. The last result belongs to the token that was read last."""
        self.reported = self.place.length
        if self.request.hidden:
            return Output(self.request_id, hidden=results)
        return Output(self.request_id, prompt_logits=results)

    def accept(self, token_id: int, logits: torch.Tensor) -> Output:
        """Appends the next token, which was sampled from the first `vocab_size` of `logits`.
        Returns the output of the request for this token."""
        self._last = time.perf_counter()
        if len(self.ids) == self.prompt_length:
            self._first = self._last
        self.ids.append(token_id)
        if self._others is not None:
            logits = logits[: self._vocab_size]
            self._logprobs.append(token_logprob(logits, token_id, self._others, self._holes))
        is_end = token_id in self._eos_ids
        if self.matcher and not is_end:
            self.matcher.consume(token_id)
        if is_end or (self.matcher and self.matcher.is_finished):
            self.finish_reason = "stop"
        elif len(self.ids) >= self.request.max_length:
            self.finish_reason = "length"
        piece, text = "", self.request.text
        if text:
            # A token that ends a text is not part of the text, even if it is an ordinary token that
            # the request names as an end (`Request.eos_ids`).
            piece = "" if is_end else text.push(token_id)
            if self.finish_reason:
                piece += text.finish()
            if text.stopped:
                self.finish_reason = "stop"
        output = Output(
            self.request_id,
            piece,
            [token_id],
            logprobs=None if self._others is None else self._logprobs[-1:],
            finish_reason=self.finish_reason,
        )
        if self.finish_reason:
            output.completion = self._completion(self.finish_reason)
        return output

    def _completion(self, finish_reason: str) -> Completion:
        token_ids = self.ids[self.prompt_length :]
        text = self.request.text
        return Completion(
            text=text.text if text else None,
            token_ids=token_ids,
            finish_reason=finish_reason,
            logprobs=None if self._others is None else self._logprobs,
            timing=Timing(
                prompt_tokens=self._read,
                prompt_seconds=self._first - self._started,
                decode_tokens=len(token_ids) - 1,
                decode_seconds=self._last - self._first,
                cached_tokens=self._cached,
                queue_seconds=self._started - self._added,
                drafted_tokens=self.drafted,
                accepted_tokens=self.accepted,
            ),
        )
