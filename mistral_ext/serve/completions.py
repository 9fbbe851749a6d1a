"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mistral_ext.engine.request import Completion
from mistral_ext.serve import asgi
from mistral_ext.serve.asgi import DisconnectedError, EventStream, SlowReaderError
from mistral_ext.serve.errors import ApiError
from mistral_ext.serve.generation import Generation
from mistral_ext.serve.log import Record
from mistral_ext.serve.protocol import Job, chat_job, completion_job, requests_of
from mistral_ext.serve.responses import Answer, new_id
from mistral_ext.serve.service import Service

_CLOSED = 499  # what nginx writes into its log for a client that hung up


class Completions:
    """The endpoint, an ASGI application.

    Args:
        service: the state that requests share.
        is_chat: prompts are conversations.
    """

    def __init__(self, service: Service, is_chat: bool) -> None:
        self._service = service
        self._is_chat = is_chat

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        call = _Call(self._service, self._is_chat, scope["path"], send)
        record = call.record
        try:
            await call.answer(scope, receive)
        except ApiError as error:
            record.status, record.reason = error.status, error.code or "invalid"
            await call.fail(error)
        except DisconnectedError:
            record.status, record.reason = _CLOSED, "disconnected"
        except SlowReaderError:
            record.status, record.reason = _CLOSED, "slow_reader"
        except BaseException:
            record.status, record.reason = 500, "error"
            raise
        finally:
            call.note()


class _Call:
    """One request to the endpoint."""

    def __init__(self, service: Service, is_chat: bool, path: str, send: asgi.Send) -> None:
        self.record = Record(new_id(is_chat), path)
        self._service = service
        self._is_chat = is_chat
        self._send = send
        self._events = EventStream(send, x_request_id=self.record.request_id)
        self._generation: Generation | None = None

    async def answer(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        """Reads the request and sends its answer."""
        service, settings = self._service, self._service.settings
        body = await asgi.read_object(scope, receive, settings.body_bytes)
        self.record.body = body
        given = {name: value for name, value in body.items() if value is not None}
        body = {**service.llm.sampling_defaults, **given}
        if self._is_chat:
            job = chat_job(body, settings.max_tokens, service.tool_format)
        else:
            job = completion_job(body)
        adapter = service.adapter_of(body.get("model"))
        with service.places(job.count):
            await asgi.until_disconnect(receive, self._complete(job, adapter))

    async def fail(self, error: ApiError) -> None:
        """Sends an error, in the stream if that has begun."""
        if self._events.has_begun:
            await self._events.fail(error)
        else:
            await asgi.send_error(self._send, error, x_request_id=self.record.request_id)

    def note(self) -> None:
        """Counts the request, and writes its line of the log."""
        record, metrics, generation = self.record, self._service.metrics, self._generation
        metrics.answered(record.path, record.status)
        if record.status == _CLOSED:
            metrics.broken_off(record.reason)
        if generation:
            firsts = [p.first for p in generation.progress if p.first is not None]
            if firsts:
                record.first_token_seconds = min(firsts) - record.began
            record.completion_tokens = sum(p.tokens for p in generation.progress)
        self._service.log.write(record)

    async def _complete(self, job: Job, adapter: str | None) -> None:
        service = self._service
        await service.compile(job)
        tools = job.tools.tools if job.tools else None
        prompts = [await service.encode(prompt, self._is_chat, tools) for prompt in job.prompts]
        self.record.prompt_tokens = sum(map(len, prompts))
        task = asyncio.current_task()
        assert task
        generation = self._generation = Generation(
            service.engine,
            requests_of(job, prompts, service.llm, adapter),
            self.record.began,
            service.metrics,
            service.settings.max_unread if job.stream else None,
            on_overflow=task.cancel,
        )
        model = adapter or service.settings.model_name
        answer = Answer(job, prompts, model, service.tokenizer, self.record.request_id)
        with service.running(generation):
            if job.stream:
                await self._stream(answer, generation)
            else:
                await self._collect(answer, generation)
        completions = answer.divided(_completions(generation))
        self._note_completions(job, prompts, completions)
        if not job.stream:
            whole = answer.whole(completions)
            await asgi.send_json(self._send, whole, x_request_id=self.record.request_id)

    async def _collect(self, answer: Answer, generation: Generation) -> None:
        """Waits until all completions have ended."""
        left = len(generation.progress)
        while left:
            come = await generation.next(self._service.settings.ping_seconds)
            if come is not None:
                answer.take(*come)
                left -= come[1].is_last

    async def _stream(self, answer: Answer, generation: Generation) -> None:
        """Sends the outputs of all completions as they come."""
        events, left, has_text = self._events, len(generation.progress), False
        while left:
            come = await generation.next(self._service.settings.ping_seconds)
            if come is None:
                await events.ping()
                continue
            if not has_text:
                has_text = True
                for chunk in answer.first_chunks():
                    await events.data(chunk)
            for chunk in answer.chunks(*come):
                await events.data(chunk)
            left -= come[1].is_last
        for chunk in answer.last_chunks(_completions(generation)):
            await events.data(chunk)
        await events.end()

    def _note_completions(
        self, job: Job, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]
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


def _completions(generation: Generation) -> list[Completion]:
    return [progress.completion for progress in generation.progress if progress.completion]
