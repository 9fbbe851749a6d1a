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
    """How long the phases of a completion took, in seconds of wall clock."""

    prompt_tokens: int  # prompt tokens read; the rest of the prompt was in the cache
    prompt_seconds: float  # from the first step of the request to its first token
    decode_tokens: int  # tokens generated after the first token
    decode_seconds: float
    cached_tokens: int = 0  # prompt tokens that were in the cache
    queue_seconds: float = 0.0  # from the arrival of the request to its first step
    drafted_tokens: int = 0  # drafts that were checked (`engine.drafts`)
    accepted_tokens: int = 0  # drafts that were right; each saved a decode step

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
    token_ids: list[int]  # sampled tokens, including an end-of-text token
    finish_reason: str  # "stop": end of text, a stop string, or the end of what has to match;
    # "length": max_tokens or the limit; "tool_calls": end of text after calls
    logprobs: list[TokenLogprob] | None  # one for each token id, if requested
    timing: Timing
    tool_calls: Sequence[ToolCall] = ()

    def divided(self, parser: ToolParser) -> Completion:
        """Returns this completion with tool calls apart from its text. `parser` has read all
        outputs of the completion."""
        reason = parser.reason(self.finish_reason)
        return replace(self, text=parser.content, finish_reason=reason, tool_calls=parser.calls)


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how to complete it.

    Args:
        prompt_ids: at least one token id.
        params: how to choose tokens. None: only read the prompt, for its logits, and generate
            nothing.
        max_length: the most tokens of prompt and completion together.
        eos_ids: tokens that end the completion.
        index: which of the prompt's n completions this is.
        text: turns the token ids of the completion into text. None: there is no tokenizer.
        prompt_logits: also give the logits that follow each token of the prompt, from the token
            `logits_from` on. The tokens before it may come from the cache.
        hidden: give hidden states, after the last norm, instead of these logits.
        chunk: the number of prompt tokens to read in each pass (in the last perhaps fewer), without
            other prompts. None: the engine decides.
        salt: a cached prefix serves only requests with the same salt.
        reuse_completions: also reuse generated tokens in the cache, not only tokens of prompts.
            Then the replies of a conversation need not be read again. But the keys and values of a
            generated token differ in their last bits from those of a prompt token, so the text may
            depend on what is still in the cache.
        grammar: the constraint of the completion. None: it need not match anything.
        adapter: the adapter to use. None: use only the model's own weights.
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

    The last output of a request has a `finish_reason` or an `error`, unless it was aborted.
    """

    request_id: int
    text: str = ""  # text of the completion that became final
    token_ids: list[int] = field(default_factory=list)  # the new tokens
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids, if requested
    prompt_logits: Tensor | None = None  # [n, V] fp32, after the next n tokens of the prompt
    hidden: Tensor | None = None  # [n, E] fp32, of the next n tokens of the prompt
    finish_reason: str | None = None
    error: Exception | None = None
    completion: Completion | None = None  # the whole completion; set with finish_reason if the
    # request generates tokens

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None
