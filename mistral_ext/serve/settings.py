"""The options of a server, and the limits of its requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Options of a server."""

    model_name: str  # by which clients ask for the model
    host: str = "127.0.0.1"
    port: int = 8000
    template: str | None = None  # of chats: v1, v2, v3 or plain; None: the model's own
    adapter_updates: bool = False  # clients may load and unload adapters
    max_tokens: int | None = None  # of a reply if the request has no limit; None: all that fit
    max_queue: int = 64  # completions that may wait, beyond those that run
    max_unread: int = 1024  # tokens that a client may leave unread
    body_bytes: int = 4 * 2**20
    request_seconds: float = 600.0  # from a request's arrival to its last token
    ping_seconds: float = 10.0  # silence after which a stream sends a comment
    drain_seconds: float = 30.0  # that requests get to end when the server is told to stop
    api_keys: tuple[str, ...] = ()  # any of which opens the server; none: it is open
    cors_origins: tuple[str, ...] = ()  # of web pages that may call it, "*" for all
    moderate: tuple[str, ...] = ()  # "input", "output" or both: the model judges them first
    log_requests: Path | None = None  # where requests and answers are written
