"""The options of a server, and the limits of its requests."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY_VARIABLE = "MISTRAL_EXT_API_KEY"  # the environment variable that may hold an API key
TEMPLATES = ("v1", "v2", "v3", "plain")

# The options that do not fit a server of several replicas on a Ray cluster, and the reasons.
UNFIT_FOR_REPLICAS = {
    "adapter_updates": "a client would reach one replica only",
    "max_unread": "Ray's proxy reads replies ahead of the client",
    "log_requests": "each replica would write to the file",
}

# The demo model has its own defaults. It is not a chat model, so its template only joins messages.
# Its tales have no end, so its replies have a limit.
_DEMO: dict[str, Any] = {"model_name": "demo", "template": "plain", "max_tokens": 256}


@dataclass(frozen=True)
class Settings:
    """Options of a server.

    Raises:
        ValueError: an option is not in its range. The message names the option.
    """

    model_name: str  # the name by which clients ask for the model
    host: str = "127.0.0.1"
    port: int = 8000
    template: str | None = None  # chat template: v1, v2, v3 or plain; None: the model's own
    adapter_updates: bool = False  # clients may load and unload adapters
    max_tokens: int | None = None  # the default for the most tokens of a reply; None: all that fit
    max_queue: int = 64  # the most completions that may wait, besides the running ones
    max_unread: int = 1024  # a client that leaves so many tokens of a stream unread is cut off
    max_body: int = 4 * 2**20  # the most bytes of a request's body
    request_seconds: float = 600.0  # the most seconds from a request's arrival to its last token
    # A stream without output for so many seconds sends a comment, so that proxies keep it open.
    ping_seconds: float = 10.0
    drain_seconds: float = 30.0  # the seconds that requests have to end when the server stops
    # Each of these keys gives access to the server. If there are none, anyone has access.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()  # origins of web pages that may call the server; "*": all
    moderate: tuple[str, ...] = ()  # what the model judges: "input" (prompts), "output" or both
    log_requests: Path | None = None  # the file for requests and answers; None: they are not kept

    def __post_init__(self) -> None:
        if not (isinstance(self.model_name, str) and self.model_name):
            raise ValueError(f"model_name is {self.model_name!r}, expected some text")
        for name, least in (("max_queue", 0), ("max_unread", 2), ("max_body", 1)):
            expect_integer(name, getattr(self, name), least)
        if self.max_tokens is not None:
            expect_integer("max_tokens", self.max_tokens, 1)
        for name in ("request_seconds", "ping_seconds", "drain_seconds"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"{name} is {value!r}, expected a number above 0")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}, expected 0 to 65535")
        if self.template not in (None, *TEMPLATES):
            raise ValueError(f"template is {self.template!r}, expected one of {TEMPLATES}")
        for kind in self.moderate:
            if kind not in ("input", "output"):
                raise ValueError(f"moderate has {kind!r}, expected input, output or input,output")
        for origin in self.cors_origins:
            if not (isinstance(origin, str) and origin):
                raise ValueError(f"cors_origins has {origin!r}, expected some text")
        if not all(map(_is_key, self.api_keys)):
            text = "an API key is empty or not printable ASCII, expected text for a header"
            raise ValueError(text)


def settings_for(model: str | None, **given: Any) -> Settings:
    """Makes the settings of a server for a model.

    Args:
        model: a path or hub id. It is also the name of the model for clients, unless `given` has
            another name. None: the demo model.
        given: the fields of `Settings`. A field that is None gets its default. Some defaults of the
            demo model are different.
    """
    defaults = _DEMO if model is None else {"model_name": model}
    chosen = {name: value for name, value in given.items() if value is not None}
    return Settings(**{**defaults, **chosen})


def keys_of_environment() -> tuple[str, ...]:
    """The API key in the environment variable, or no key if the variable is not set. An empty
    variable gives an empty key, which `Settings` refuses: if it were ignored, anyone could use the
    server."""
    return (os.environ[KEY_VARIABLE],) if KEY_VARIABLE in os.environ else ()


def texts_of(name: str, given: object) -> tuple[str, ...]:
    """Reads the field `api_keys`, `cors_origins` or `moderate` from a list of texts or from one
    text. Commas separate several values in a text for `moderate`. For the others a text is one
    value.

    Raises:
        ValueError: `given` is neither a text nor a list. The message does not show `given`, because
            it may be a key.
    """
    if isinstance(given, str):
        return tuple(given.split(",")) if name == "moderate" else (given,)
    if not isinstance(given, list | tuple):
        text = f"{name} is of type {type(given).__name__}, expected some text or a list of texts"
        raise ValueError(text)
    return tuple(given)


def expect_own_names(model_name: str, adapters: Iterable[str]) -> None:
    """Raises ValueError if an adapter has the name of the model or of another adapter."""
    names = [model_name, *adapters]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"an adapter has the name {name!r}, expected a name of its own")


def expect_integer(name: str, value: object, least: int) -> None:
    """Raises ValueError unless a value is an integer of `least` or more. The message names the
    option."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of {least} or more")


def _is_key(key: object) -> bool:
    return isinstance(key, str) and key != "" and key.isascii() and key.isprintable()
