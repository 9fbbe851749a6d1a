"""Does what all endpoints that read a body have in common: errors, metrics and the log."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from mistral_ext.engine.request import Output, Request
from mistral_ext.serve import asgi
from mistral_ext.serve.asgi import DisconnectedError, SlowReaderError
from mistral_ext.serve.errors import ApiError
from mistral_ext.serve.generation import Generation
from mistral_ext.serve.log import Record
from mistral_ext.serve.service import Service

# nginx logs this status if a client hangs up. We also log it if a client does not read its answer.
_CLOSED = 499


class Endpoint:
    """An endpoint as an ASGI application.

    Args:
        make_call: a function that makes a `Call` from the path of the request and a function that
            sends the answer.
    """

    def __init__(self, make_call: Callable[[str, asgi.Send], Call]) -> None:
        self._make_call = make_call

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        await self._make_call(scope["path"], send).run(scope, receive)


class Call(ABC):
    """One HTTP request. Each endpoint has a subclass, whose `answer` does the work.

    Args:
        service: the state that all requests share.
        request_id: an id that no other request has.
        path: the path of the endpoint.
        send: a function that sends the answer.

    Attributes:
        record: the facts about this request for the log.
    """

    def __init__(self, service: Service, request_id: str, path: str, send: asgi.Send) -> None:
        self.record = Record(request_id, path)
        self._service = service
        self._send = send

    @abstractmethod
    async def answer(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        """Reads the request and sends its answer."""

    async def run(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        """Answers the request, and writes to the log and the metrics how it ended. If `answer`
        raises an ApiError, sends the error to the client. If the client has gone or does not read,
        nothing more is sent. Other exceptions are raised again, and so is a cancellation."""
        record = self.record
        try:
            await self.answer(scope, receive)
        except ApiError as error:
            record.status, record.reason = error.status, error.code or "invalid"
            await self._fail(error)
        except DisconnectedError:
            record.status, record.reason = _CLOSED, "disconnected"
        except asyncio.CancelledError:  # Ray's server cancels the task if a client hangs up
            record.status, record.reason = _CLOSED, "disconnected"
            raise
        except SlowReaderError:
            record.status, record.reason = _CLOSED, "slow_reader"
        except BaseException:
            record.status, record.reason = 500, "error"
            raise
        finally:
            self._note()

    async def read(self, scope: asgi.Scope, receive: asgi.Receive) -> dict[str, Any]:
        """Reads the request's body, a JSON object, and notes it in `record`. Raises the errors of
        `asgi.read_object`."""
        body = await asgi.read_object(scope, receive, self._service.settings.max_body)
        self.record.body = body
        return body

    def generation(self, requests: Sequence[Request], max_unread: int | None = None) -> Generation:
        """Makes a `Generation` that runs requests to the engine for this call. The current task is
        cancelled if the client reads so slowly that `max_unread` outputs wait. None: any number may
        wait."""
        task = asyncio.current_task()
        assert task
        service = self._service
        return Generation(
            service.engine, requests, self.record.began, service.metrics, max_unread, task.cancel
        )

    async def outputs(self, generation: Generation) -> AsyncIterator[tuple[int, Output] | None]:
        """Yields all outputs of a generation, each with the place of its request in the generation.
        Yields None whenever there was no output for `Settings.ping_seconds`, so that the caller can
        send a ping."""
        left = len(generation.progress)
        while left:
            come = await generation.next(self._service.settings.ping_seconds)
            yield come
            left -= come is not None and come[1].is_last

    async def read_prompts(
        self, requests: Sequence[Request]
    ) -> AsyncGenerator[tuple[int, Output] | None, None]:
        """Runs requests that only read their prompts, and yields their outputs as `outputs` does.
        At most `max_batch` of them run at a time, so that a long list does not fill the queue
        (`Service.reading_places`)."""
        service = self._service
        size = service.llm.max_batch
        for begin in range(0, len(requests), size):
            generation = self.generation(requests[begin : begin + size])
            with service.running(generation):
                async for come in self.outputs(generation):
                    yield come and (begin + come[0], come[1])

    async def _send_json(self, body: dict[str, Any]) -> None:
        await asgi.send_json(self._send, body, x_request_id=self.record.request_id)

    async def _fail(self, error: ApiError) -> None:
        """Sends an error."""
        await asgi.send_error(self._send, error, x_request_id=self.record.request_id)

    def _note(self) -> None:
        """Counts the request, and writes its line in the log."""
        record, metrics = self.record, self._service.metrics
        metrics.answered(record.path, record.status)
        if record.status == _CLOSED:
            metrics.broken_off(record.reason)
        self._service.log.write(record)
