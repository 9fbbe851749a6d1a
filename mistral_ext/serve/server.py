"""Runs a service on a socket, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator

from mistral_ext.llm import Mistral
from mistral_ext.serve import errors
from mistral_ext.serve.app import build_app
from mistral_ext.serve.log import RequestLog
from mistral_ext.serve.service import Service
from mistral_ext.serve.settings import Settings

_log = logging.getLogger("mistral_ext.serve")

# Limits for a client that does not read its answer. The operating system buffers about this many
# bytes for it, and ends the connection after this many milliseconds.
_UNSENT_BYTES = 2**16
_UNSENT_MS = 60_000


class Server:
    """Serves a model on an address. The constructor binds the address and opens the log, so their
    errors come before a model is loaded.

    Args:
        settings: the options.

    Raises:
        OSError: the address cannot be bound, or the log cannot be opened.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._log = RequestLog(settings.log_requests)
        self._listener = bind(settings.host, settings.port)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._log.close()

    def run(self, llm: Mistral) -> int:
        """Serves until SIGTERM or SIGINT, and then finishes the requests that have come. A second
        signal ends these requests at once.

        Args:
            llm: the model, with a tokenizer.

        Returns:
            The status to exit with.
        """
        service = Service(llm, self._settings, self._log)
        return asyncio.run(_serve(service, self._listener))


async def _serve(service: Service, listener: socket.socket) -> int:
    import uvicorn

    class UvicornServer(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn would close the socket before requests end, so `_serve` handles signals.
            yield

    settings = service.settings
    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        # uvicorn would take httptools if it is installed. With it, streams to clients of HTTP/1.0
        # have chunks, and the body is lost if a client offers HTTP/2, as Java's does.
        http="h11",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = UvicornServer(config)
    service.start()
    listener.listen(1024)
    announce(settings, *listener.getsockname()[:2])
    status = 0
    ending: asyncio.Task[None] | None = None

    async def end() -> None:
        await service.drain()
        server.should_exit = True

    def on_signal(number: int) -> None:
        nonlocal status, ending
        if ending:
            service.end_all(errors.shutting_down())
            server.should_exit = True
            return
        _log.info("ending: requests have %g s to finish", settings.drain_seconds)
        status = 130 if number == signal.SIGINT else 0
        ending = asyncio.ensure_future(end())

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await server.serve(sockets=[listener])
    finally:
        service.end_all(errors.shutting_down())
        service.stop()
    return status


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket, which does not listen yet.

    Raises:
        OSError: the socket cannot be bound. The message names the address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot listen at {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these options. Systems without the options have their own limits.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNSENT_MS)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from error
    return listener


def announce(settings: Settings, host: str, port: int) -> None:
    """Logs the address of the server, and warns if anyone may use it.

    Args:
        settings: the options.
        host, port: the address that is bound, in numbers.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    shown = f"[{host}]" if address.version == 6 else host
    _log.info("serving %s at http://%s:%d", settings.model_name, shown, port)
    if not (settings.api_keys or address.is_loopback):
        _log.warning("anyone who can reach %s may use it: give --api-key", host)
