"""Turns outputs of the engine into the JSON of answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mistral_ext.engine.request import Completion, Output
from mistral_ext.serve.logprobs import LogprobWriter
from mistral_ext.serve.protocol import Job
from mistral_ext.serve.tools import delta_of
from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.text.tool_parser import ToolParser


class Answer:
    """Writes the answer to one job, whole or in chunks.

    Args:
        job: the request's job.
        prompts: the token ids of the job's prompts.
        model: the name of the model.
        tokenizer: the tokenizer of the model.
        answer_id: the id of the answer and of all its chunks.
    """

    def __init__(
        self,
        job: Job,
        prompts: Sequence[Sequence[int]],
        model: str,
        tokenizer: Tokenizer,
        answer_id: str,
    ) -> None:
        self._answer_id = answer_id
        self._job = job
        self._prompts = prompts
        self._model = model
        self._created = int(time.time())
        self._echo = [_echo(job, i, prompts, tokenizer) for i in range(job.count)]
        self._logprobs = [LogprobWriter(tokenizer, job.is_chat, len(e)) for e in self._echo]
        forms = [job.tools.form] * job.count if job.tools else []
        self._parsers = [ToolParser(form) for form in forms]  # one parser for each completion
        self._completions: dict[int, Completion] = {}

    @property
    def completions(self) -> list[Completion]:
        """The completions that have ended, in the order of their numbers. Tool calls have been
        taken out of their texts."""
        return [completion for _, completion in sorted(self._completions.items())]

    def take(self, index: int, output: Output) -> None:
        """Takes an output, which becomes a part of the answer that `whole` returns."""
        self._deltas(index, output)

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        kind = "chat.completion" if self._job.is_chat else "text_completion"
        choices = [self._whole_choice(i, c) for i, c in enumerate(self.completions)]
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """The chunks before any text, in the order of the completions."""
        for index in range(self._job.count):
            if self._job.is_chat:
                content = None if self._parsers else ""  # there may be calls without text
                yield self._chunk(index, delta={"role": "assistant", "content": content})
            elif self._echo[index]:
                yield self._chunk(index, text=self._echo[index])

    def chunks(self, index: int, output: Output) -> Iterator[dict[str, Any]]:
        """The chunks for an output. There are none if the output has nothing to show yet."""
        logprobs = None
        if output.logprobs:
            writer = self._logprobs[index]
            write = writer.chat if self._job.is_chat else writer.text
            logprobs = write(output.logprobs)
        deltas = self._deltas(index, output)
        if logprobs and not deltas:
            deltas = [self._shown("")]
        for delta in deltas:
            yield self._chunk(index, logprobs=logprobs, **delta)
            logprobs = None  # only the first chunk has them
        if output.is_last:
            reason = self._completions[index].finish_reason
            yield self._chunk(index, finish_reason=reason, **self._shown(""))

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """The chunks after all text."""
        if self._job.include_usage:
            head = self._head(self._chunk_kind)
            yield {**head, "choices": [], "usage": self._usage()}

    def _deltas(self, index: int, output: Output) -> list[dict[str, Any]]:
        """Returns the new text and tool calls of an output, as the fields of chunks: an element for
        each chunk. If the output has the completion, keeps it for `completions`."""
        if output.completion:
            self._completions[index] = output.completion
        if not self._parsers:
            return [self._shown(output.text)] if output.text else []
        parser = self._parsers[index]
        pieces = list(parser.push(output.token_ids, output.text, output.is_last))
        if output.completion:
            self._completions[index] = output.completion.divided(parser)
        return [
            self._shown(piece)
            if isinstance(piece, str)
            else {"delta": {"tool_calls": [delta_of(piece)]}}
            for piece in pieces
        ]

    def _shown(self, text: str) -> dict[str, Any]:
        if not self._job.is_chat:
            return {"text": text}
        return {"delta": {"content": text} if text else {}}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._job.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._answer_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    def _chunk(self, index: int, **choice: Any) -> dict[str, Any]:
        whole = {"index": index, "logprobs": None, "finish_reason": None, **choice}
        chunk = {**self._head(self._chunk_kind), "choices": [whole]}
        return {**chunk, "usage": None} if self._job.include_usage else chunk

    def _whole_choice(self, index: int, completion: Completion) -> dict[str, Any]:
        text = completion.text or ""
        writer = self._logprobs[index]
        choice: dict[str, Any] = {"index": index, "finish_reason": completion.finish_reason}
        tokens = completion.logprobs
        if self._job.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            if completion.tool_calls:
                calls = [call.as_message() for call in completion.tool_calls]
                choice["message"] |= {"content": text or None, "tool_calls": calls}
            choice["logprobs"] = None if tokens is None else writer.chat(tokens)
        else:
            choice["text"] = self._echo[index] + text
            choice["logprobs"] = None if tokens is None else writer.text(tokens)
        return choice

    def _usage(self) -> dict[str, Any]:
        completions = self.completions
        prompt = sum(map(len, self._prompts))
        generated = sum(len(completion.token_ids) for completion in completions)
        # A prompt with n completions counts once. So do its cached tokens, which are those that the
        # first of the n completions found.
        cached = sum(c.timing.cached_tokens for c in completions[:: self._job.params.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def new_id(is_chat: bool) -> str:
    """An id that no other answer has."""
    return f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"


def _echo(job: Job, index: int, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> str:
    """The text of a completion's prompt if the request has `echo`, else ""."""
    if not job.echo:
        return ""
    prompt = job.prompts[index // job.params.n]
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompts[index // job.params.n])
