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
    """How long the phases of a completion took, in seconds of wall clock, and how many tokens each
    phase had."""

    prompt_tokens: int  # the number of prompt tokens read; the rest of the prompt was in the cache
    prompt_seconds: float  # from the first step of the request to its first token
    decode_tokens: int  # the number of tokens generated after the first token
    decode_seconds: float  # from the first token to the last token
    cached_tokens: int = 0  # the number of prompt tokens that were in the cache
    queue_seconds: float = 0.0  # from the arrival of the request to its first step
    drafted_tokens: int = 0  # the number of guessed tokens that were checked (`engine.drafts`)
    accepted_tokens: int = 0  # how many of the guesses were right; each saved a decode step

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second after the first token; 0 if there is only one token."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0


@dataclass(frozen=True)
class Completion:
    """The model's continuation of a prompt."""

    text: str | None  # None: the model has no tokenizer
    token_ids: list[int]  # the sampled tokens; the last may be an end-of-text token
    # "stop": an end token, a stop string, or the end of what the grammar allows. "length":
    # max_tokens, or the model's limit. "tool_calls": an end token after tool calls.
    finish_reason: str
    logprobs: list[TokenLogprob] | None  # one for each token id; None: they were not requested
    timing: Timing
    tool_calls: Sequence[ToolCall] = ()

    def divided(self, parser: ToolParser) -> Completion:
        """Returns this completion with its tool calls moved from the text to `tool_calls`. `parser`
        must have read all outputs of the completion."""
        reason = parser.reason(self.finish_reason)
        return replace(self, text=parser.content, finish_reason=reason, tool_calls=parser.calls)


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how to complete it.

    Args:
        prompt_ids: at least one token id.
        params: how to choose tokens. None: the request only reads the prompt, for its logits or
            hidden states, and generates nothing.
        max_length: the most tokens of prompt and completion together.
        eos_ids: tokens that end the completion.
        index: which of the prompt's n completions this is, from 0 on.
        text: turns the token ids of the completion into text. None: there is no tokenizer.
        prompt_logits: whether to give the logits that follow tokens of the prompt.
        logits_from: the index of the first prompt token whose logits or hidden state are given.
            Earlier tokens may come from the cache.
        hidden: whether to give hidden states (after the last norm) of tokens of the prompt, instead
            of logits.
        chunk: the number of prompt tokens to read in each pass. The last pass may read fewer. No
            other prompt is read in these passes. None: the engine decides.
        salt: any text. Cached prefixes serve only requests with the same salt. So a client with a
            salt of its own cannot learn from response times what others have asked. None: the
            request shares prefixes with other requests without a salt.
        reuse_completions: whether to reuse also generated tokens in the cache, not only tokens of
            prompts. If True, the replies of a conversation need not be read again. But the keys and
            values of a generated token differ in their last bits from those of a prompt token, so
            the text may depend on what is still in the cache.
        grammar: the constraint of the completion. None: the completion need not match anything.
        adapter: the LoRA adapter to use. None: the model's own weights alone are used.
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
        """The slot of the request's adapter, or -1 if it has none."""
        return -1 if self.adapter is None else self.adapter.slot

    @property
    def prefix_owner(self) -> tuple[str | None, LoadedAdapter | None]:
        """Requests may share a cached prefix if this value is the same."""
        return self.salt, self.adapter

    @property
    def reports_prompt(self) -> bool:
        """Whether the request needs results for tokens of its prompt, from `logits_from` on."""
        return self.prompt_logits or self.hidden


@dataclass
class Output:
    """New results of a request.

    The last output of a request has a `finish_reason` or an `error`. An aborted request has no last
    output.
    """

    request_id: int
    text: str = ""  # new text of the completion, which later tokens cannot change
    token_ids: list[int] = field(default_factory=list)  # the new tokens
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids, if requested
    # fp32, a row for each of the next n tokens of the prompt: logits [n, vocabulary size] or hidden
    # states [n, model dimension], if requested.
    prompt_logits: Tensor | None = None
    hidden: Tensor | None = None
    finish_reason: str | None = None  # as in `Completion`
    error: Exception | None = None  # why the request failed
    # The whole completion. It is in the last output, if the request generates tokens.
    completion: Completion | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None
