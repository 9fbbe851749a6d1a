"""Checks the API keys of requests."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from mistral_ext.serve import asgi
from mistral_ext.serve.errors import ApiError

# Paths that need no key, because browsers and load balancers request them without one.
_OPEN = ("/", "/health", "/openapi.json")
_OPEN_FOLDER = "/page/"


class KeyCheck:
    """Answers HTTP requests without a valid API key with 401, except those for open paths. Passes
    all others on to an application.

    Args:
        app: the application.
        keys: the valid keys.
    """

    def __init__(self, app: asgi.App, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope) and not self._has_key(scope):
            error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            await asgi.send_error(send, error, www_authenticate="Bearer")
        else:
            await self._app(scope, receive, send)

    def _is_open(self, scope: asgi.Scope) -> bool:
        return scope["path"] in _OPEN or scope["path"].startswith(_OPEN_FOLDER)

    def _has_key(self, scope: asgi.Scope) -> bool:
        scheme, _, key = (asgi.header(scope, "authorization") or "").partition(" ")
        digest = _digest(key.strip())
        # All keys are compared, as digests of equal length, so the time reveals nothing about the
        # keys.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()
