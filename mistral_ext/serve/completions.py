"""Answers POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, TypeAlias

from mistral_ext.engine.request import Completion, Output
from mistral_ext.serve import asgi
from mistral_ext.serve.asgi import EventStream
from mistral_ext.serve.calls import Call
from mistral_ext.serve.errors import ApiError, filtered
from mistral_ext.serve.generation import Generation
from mistral_ext.serve.moderation import judge
from mistral_ext.serve.protocol import Job, chat_job, completion_job, requests_of
from mistral_ext.serve.responses import Answer, new_id
from mistral_ext.serve.service import Service
from mistral_ext.text.guardrails import Moderation

# What `Call.outputs` yields: an output with the number of its completion, or None after a pause.
_Outputs: TypeAlias = AsyncIterator[tuple[int, Output] | None]


class CompletionCall(Call):
    """A request to /v1/chat/completions or /v1/completions.

    Args:
        service, path, send: as in `Call`.
        is_chat: whether the request is to /v1/chat/completions.
    """

    def __init__(self, service: Service, is_chat: bool, path: str, send: asgi.Send) -> None:
        super().__init__(service, new_id(is_chat), path, send)
        self._is_chat = is_chat
        self._events = EventStream(send, x_request_id=self.record.request_id)
        self._generation: Generation | None = None

    async def answer(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        service = self._service
        body = await self.read(scope, receive)
        service.expect_writer()
        given = {name: value for name, value in body.items() if value is not None}
        defaults = dict(service.llm.sampling_defaults)
        default_tokens = defaults.pop("max_tokens", None)
        body = {**defaults, **given}
        if self._is_chat:
            default_tokens = service.settings.max_tokens or default_tokens
            job = chat_job(body, default_tokens, service.tool_format)
        else:
            job = completion_job(body)
        adapter = service.adapter_of(body.get("model"))
        with service.places(job.count, "n" if job.params.n > 1 else "prompt"):
            await asgi.until_disconnect(receive, self._complete(job, adapter))

    async def _fail(self, error: ApiError) -> None:
        """Sends an error. If the stream has begun, the error is an event of the stream."""
        if self._events.has_begun:
            await self._events.fail(error)
        else:
            await super()._fail(error)

    def _note(self) -> None:
        record, generation = self.record, self._generation
        if generation:
            firsts = [p.first for p in generation.progress if p.first is not None]
            if firsts:
                record.first_token_seconds = min(firsts) - record.began
            record.completion_tokens = sum(p.tokens for p in generation.progress)
        super()._note()

    async def _complete(self, job: Job, adapter: str | None) -> None:
        service, settings = self._service, self._service.settings
        await service.compile(job)
        tools = job.tools.tools if job.tools else None
        prompts = [await service.encode(prompt, self._is_chat, tools) for prompt in job.prompts]
        self.record.prompt_tokens = sum(map(len, prompts))
        requests = requests_of(job, prompts, service.llm, adapter)
        if "input" in settings.moderate:
            await self._check_prompts(job)
        self._generation = generation = self.generation(
            requests, settings.max_unread if job.stream else None
        )
        model = adapter or settings.model_name
        answer = Answer(job, prompts, model, service.tokenizer, self.record.request_id)
        with service.running(generation):
            outputs: _Outputs = self.outputs(generation)
            if "output" in settings.moderate:
                outputs = self._checked(job, outputs)
            if job.stream:
                await self._stream(answer, outputs)
            else:
                async for come in outputs:
                    if come is not None:
                        answer.take(*come)
        self._note_completions(job, prompts, answer.completions)
        if not job.stream:
            await self._send_json(answer.whole())

    async def _stream(self, answer: Answer, outputs: _Outputs) -> None:
        """Sends the outputs of all completions as they come."""
        events, has_text = self._events, False
        async for come in outputs:
            if come is None:
                await events.ping()
                continue
            if not has_text:
                has_text = True
                for chunk in answer.first_chunks():
                    await events.data(chunk)
            for chunk in answer.chunks(*come):
                await events.data(chunk)
        for chunk in answer.last_chunks():
            await events.data(chunk)
        await events.end()

    async def _check_prompts(self, job: Job) -> None:
        """Raises ApiError 400 if the model judges that a prompt is not acceptable."""
        contents = [self._content(job, i) for i in range(len(job.prompts))]
        for moderation in await self._judge(job, contents, "input"):
            if moderation.flagged:
                raise filtered(moderation.category, self._param)

    async def _checked(self, job: Job, outputs: _Outputs) -> _Outputs:
        """Holds the outputs back until all completions have ended and the model has judged them.
        Removes the texts that the model judges not acceptable."""
        held: list[tuple[int, Output]] = []
        texts: dict[int, str] = {}
        async for come in outputs:
            if come is None:
                yield None
                continue
            held.append(come)
            if come[1].completion:
                texts[come[0]] = come[1].completion.text or ""
        contents = [self._content(job, i // job.params.n, text) for i, text in texts.items()]
        found = await self._judge(job, contents, "output")
        flagged = {i for i, m in zip(texts, found, strict=True) if m.flagged}
        for index, output in held:
            if index not in flagged:
                yield index, output
            elif output.is_last:
                yield index, _withheld(output)

    async def _judge(self, job: Job, contents: Sequence[Any], kind: str) -> list[Moderation]:
        """Lets the model judge contents. `kind` is "input" or "output". If a content does not fit
        the context, only its end is judged."""
        service = self._service
        requests = await service.moderation_requests(contents, self._param, job.salt, True)
        ping = self._events.ping if job.stream else None
        return await judge(self, service, requests, kind, ping)

    @property
    def _param(self) -> str:
        return "messages" if self._is_chat else "prompt"

    def _content(self, job: Job, index: int, reply: str | None = None) -> Any:
        """Returns a prompt of the job as messages or text, for the model to judge. If a `reply` is
        given, it is appended."""
        prompt = job.prompts[index]
        if self._is_chat:
            said = [] if reply is None else [{"role": "assistant", "content": reply}]
            return [*prompt, *said]
        text = prompt if isinstance(prompt, str) else self._service.tokenizer.decode(prompt)
        return text + (reply or "")

    def _note_completions(
        self, job: Job, prompts: Sequence[Sequence[int]], completions: Collection[Completion]
    ) -> None:
        record, generation = self.record, self._generation
        assert generation
        record.reason = ",".join(completion.finish_reason for completion in completions)
        record.texts = [p.completion.text for p in generation.progress if p.completion]
        for i, completion in enumerate(completions):
            seconds = generation.progress[i].last - record.began
            length = len(prompts[i // job.params.n])
            self._service.metrics.ended(completion, length, seconds)
            if i % job.params.n == 0:
                record.cached_tokens += completion.timing.cached_tokens


def _withheld(output: Output) -> Output:
    """Returns the last output of a completion without its text, which the client must not get."""
    assert output.completion
    reason = "content_filter"
    empty = dataclasses.replace(
        output.completion, text="", finish_reason=reason, logprobs=output.completion.logprobs and []
    )
    return Output(output.request_id, finish_reason=reason, completion=empty)
