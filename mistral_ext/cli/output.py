"""Prints timings and log-probabilities, for several commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mistral_ext.engine.params import TokenLogprob
    from mistral_ext.engine.request import Completion
    from mistral_ext.llm import Mistral


def report(llm: Mistral, completion: Completion | None) -> None:
    """Prints the timing of a completion to stderr, and its log-probabilities if they were
    requested. Prints nothing for None, which stands for an interrupted completion."""
    if completion is None:
        return
    print_timing(completion)
    if completion.logprobs is not None:
        _print_logprobs(llm, completion.logprobs)


def print_timing(completion: Completion) -> None:
    """Prints the timing of a completion to stderr."""
    timing = completion.timing
    line = (
        f"[prompt {timing.prompt_tokens} tokens, {timing.prompt_rate:.1f} tokens/s; "
        f"completion {len(completion.token_ids)} tokens"
    )
    if timing.decode_tokens:
        line += f", {timing.decode_rate:.1f} tokens/s"
    print(f"{line}; {completion.finish_reason}]", file=sys.stderr)


def _print_logprobs(llm: Mistral, logprobs: list[TokenLogprob]) -> None:
    tokenizer = llm.require_tokenizer()

    def show(token_id: int, logprob: float) -> str:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")
        return f"{text!r} {logprob:.3f}"

    for token in logprobs:
        others = "  ".join(show(i, logprob) for i, logprob in token.top.items())
        print(f"{show(token.token_id, token.logprob):24} {others}".rstrip(), file=sys.stderr)
