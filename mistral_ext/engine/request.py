"""Requests to an engine, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mistral_ext.engine.adapters import LoadedAdapter
from mistral_ext.engine.params import SamplingParams, TokenLogprob
from mistral_ext.text.grammar import Grammar
from mistral_ext.text.text_stream import TextStream
from mistral_ext.text.tool_calls import ToolCall
from mistral_ext.text.tool_parser import ToolParser


@dataclass(frozen=True)
class Timing:
    """Where a completion's time went, in seconds of wall clock."""

    prompt_tokens: int  # read for this completion; the rest of the prompt was in the cache
    prompt_seconds: float  # from its first step to its first token
    decode_tokens: int  # generated after the first
    decode_seconds: float
    cached_tokens: int = 0  # tokens of the prompt that were in the cache
    queue_seconds: float = 0.0  # from its arrival to its first step
    drafted_tokens: int = 0  # drafts that were checked (`engine.drafts`)
    accepted_tokens: int = 0  # drafts that were right: each has saved a decode step

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
    """The model's continuation of a prompt."""

    text: str | None  # None: the model has no tokenizer
    token_ids: list[int]  # as sampled, an end-of-text token included
    finish_reason: str  # "stop": its end, or a stop string; "length": max_tokens or the limit;
    # "tool_calls": its end, after calls
    logprobs: list[TokenLogprob] | None  # one per token id, if asked for
    timing: Timing
    tool_calls: Sequence[ToolCall] = ()

    def divided(self, parser: ToolParser) -> Completion:
        """This completion with calls of tools apart from its text. `parser` has read all outputs of
        the completion."""
        reason = parser.reason(self.finish_reason)
        return replace(self, text=parser.content, finish_reason=reason, tool_calls=parser.calls)


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how to complete it.

    Args:
        prompt_ids: at least one token id.
        params: how to choose tokens. None: only read the prompt, for its logits, and choose no
            tokens.
        max_length: the most tokens of prompt and completion together.
        eos_ids: tokens that end the completion.
        index: which of the prompt's n completions this is.
        text: turns the completion's token ids into text; None without a tokenizer.
        prompt_logits: also give the logits that follow each token of the prompt, from the token
            `logits_from` on. The tokens before it may come from the cache.
        hidden: give hidden states, after the last norm, in place of these logits.
        chunk: the exact number of tokens of the prompt to read in one pass. None: the engine
            decides.
        salt: a cached prefix serves only requests of the same salt.
        reuse_completions: also reuse generated tokens in the cache, not only tokens of prompts. A
            conversation then need not read its replies again. But the keys and values of a
            generated token differ in their last bits from the keys and values of a prompt's token,
            so the text may depend on what is still in the cache.
        grammar: what the completion has to match. None: it need not match anything.
        adapter: the adapter to use. None: the model's own weights are used alone.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams | None
    max_length: int
    eos_ids: Sequence[int] = ()
    index: int = 0
    text: TextStream | None = None
    prompt_logits: bool = False
    logits_from: int = 0
    chunk: int | None = None
    salt: str | None = None
    reuse_completions: bool = False
    grammar: Grammar | None = None
    adapter: LoadedAdapter | None = None
    hidden: bool = False

    @property
    def adapter_slot(self) -> int:
        """The slot of the request's adapter. -1: it has none."""
        return -1 if self.adapter is None else self.adapter.slot

    @property
    def prefix_owner(self) -> tuple[str | None, LoadedAdapter | None]:
        """Requests with the same value may share a cached prefix."""
        return self.salt, self.adapter

    @property
    def reports_prompt(self) -> bool:
        """Whether the request needs results for tokens of its prompt, from `logits_from` on."""
        return self.prompt_logits or self.hidden


@dataclass
class Output:
    """New results of a request.

    The last output of a request has a `finish_reason` or an `error`.
    """

    request_id: int
    text: str = ""  # the part of the completion's text that became final
    token_ids: list[int] = field(default_factory=list)  # the new tokens
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids, if asked for
    prompt_logits: Tensor | None = None  # [n, V] fp32, after the next n tokens of the prompt
    hidden: Tensor | None = None  # [n, E] fp32, of the next n tokens of the prompt
    finish_reason: str | None = None
    error: Exception | None = None
    completion: Completion | None = None  # all of it, with the finish_reason

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None
