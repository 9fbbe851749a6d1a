"""Handles HTTP over ASGI: reads bodies, sends JSON and event streams, notices clients that hang
up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, NoReturn, TypeAlias, TypeVar

from mistral_ext.serve.errors import ApiError, bad_request

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

T = TypeVar("T")

# The most seconds that a client may take to send a body.
_BODY_SECONDS = 60.0

# The most levels of objects and lists in a body. Python's functions for JSON fail at about 1000.
_MOST_LEVELS = 256


class DisconnectedError(Exception):
    """The client has hung up."""


class SlowReaderError(Exception):
    """The client does not read its answer."""


def header(scope: Scope, name: str) -> str | None:
    """The value of a header of the request, or None if the request has no such header."""
    wanted = name.encode()
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == wanted), None)


async def read_object(scope: Scope, receive: Receive, most: int) -> dict[str, Any]:
    """Reads the body of a request, which must be a JSON object.

    Args:
        most: the most bytes that the body may have.

    Raises:
        ApiError: 413 if the body is larger, 408 if it comes too slowly, 400 if it is not a JSON
            object or has another content type.
        DisconnectedError: the client hung up before the end of the body.
    """
    _check_content_type(scope)
    try:
        data = await asyncio.wait_for(_read_body(scope, receive, most), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took longer than {_BODY_SECONDS:g} s") from None
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad_request(f"the body is {_short(body)}, expected a JSON object")
    if _is_deeper(body, _MOST_LEVELS):
        raise bad_request(f"the body has more than {_MOST_LEVELS} levels")
    return body


def _check_content_type(scope: Scope) -> None:
    """Raises ApiError 400 for a body with a content type other than JSON.

    The content type of a form is allowed, because `curl -d` gives it to every body, and so is none
    at all. But if the request has an Origin header, it comes from a browser, and both are refused:
    a page of another site could send such bodies without permission.
    """
    kind = (header(scope, "content-type") or "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or kind.endswith("+json")
    is_allowed = kind in ("", "application/x-www-form-urlencoded")
    if not (is_json or (is_allowed and header(scope, "origin") is None)):
        raise bad_request(f"content-type is {kind or 'missing'}, expected application/json")


async def _read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
    length = header(scope, "content-length") or "0"
    if length.isdigit() and int(length) > most:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_large
        if not message.get("more_body"):
            return b"".join(parts)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested deeper than `levels`."""
    containers = [value]  # those of one level
    for _ in range(levels):
        found: list[Any] = []
        for one in containers:
            items = one.values() if isinstance(one, dict) else one
            # There may be a million token ids, so their types are looked at together.
            if not {dict, list}.isdisjoint(map(type, items)):
                found += [item for item in items if isinstance(item, (dict, list))]
        containers = found
        if not containers:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _short(value: object) -> str:
    return f"{json.dumps(value):.40}"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, or cancels `work` when the client hangs up. The body must have
    been read before, because this function discards all other messages of the client.

    Raises:
        DisconnectedError: the client hung up.
        SlowReaderError: `work` was cancelled, as a `Generation` does if the client does not read
            its answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise DisconnectedError
        if task.cancelled():
            raise SlowReaderError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_bytes(
    send: Send, data: bytes, content_type: str, status: int = 200, **headers: str
) -> None:
    """Sends a whole answer. In the names of `headers`, underscores stand for hyphens."""
    fields = {"content-type": content_type, "content-length": str(len(data))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(fields)})
    await send({"type": "http.response.body", "body": data})


async def send_json(send: Send, body: Mapping[str, Any], status: int = 200, **headers: str) -> None:
    """Sends a JSON object as an answer."""
    await send_bytes(send, json.dumps(body).encode(), "application/json", status, **headers)


async def send_error(send: Send, error: ApiError, **headers: str) -> None:
    """Sends an error as an answer."""
    await send_json(send, error.body(), error.status, **{**error.headers, **headers})


class EventStream:
    """An answer of server-sent events. Its status and headers are sent with the first event.

    Attributes:
        has_begun: whether the status, 200, has been sent.
    """

    def __init__(self, send: Send, **headers: str) -> None:
        self.has_begun = False
        self._send = send
        self._headers = headers

    async def data(self, body: Mapping[str, Any]) -> None:
        """Sends an event."""
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        await self._write(f"data: {text}\n\n")

    async def ping(self) -> None:
        """Sends a comment. Clients ignore it, and proxies keep the connection open."""
        await self._write(": ping\n\n")

    async def end(self) -> None:
        """Sends the last event."""
        await self._write("data: [DONE]\n\n", more=False)

    async def fail(self, error: ApiError) -> None:
        """Sends an error instead of the remaining events."""
        await self._write(f"data: {json.dumps(error.body())}\n\n")
        await self.end()

    async def _write(self, text: str, more: bool = True) -> None:
        if not self.has_begun:
            self.has_begun = True
            fields = {"content-type": "text/event-stream; charset=utf-8"}
            fields |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
            fields |= {name.replace("_", "-"): value for name, value in self._headers.items()}
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": _encoded(fields)}
            )
        # The name of a model may have lone surrogates, such as that of a path that is not UTF-8.
        # This writes them as JSON does, so answers and streams are the same.
        data = text.encode("utf-8", "backslashreplace")
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _encoded(fields: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
