"""Answers GET / and GET /page/... with the files of the chat page, which belong to the package."""

from __future__ import annotations

from pathlib import Path

from mistral_ext.serve import asgi
from mistral_ext.serve.errors import ApiError

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Browsers may only use scripts and styles from files of this server, and load nothing from another
# server. So nothing that a model writes can run as a script.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Page:
    """The files of the page. The constructor reads them into memory."""

    def __init__(self) -> None:
        self._files = {
            path.name: (path.read_bytes(), _TYPES[path.suffix])
            for path in _FOLDER.iterdir()
            if path.suffix in _TYPES
        }

    async def index(self, scope: asgi.Scope, send: asgi.Send) -> None:
        """Sends the page itself."""
        await self._send("index.html", send)

    async def file(self, scope: asgi.Scope, send: asgi.Send) -> None:
        """Sends a file of the page. Raises ApiError 404 if there is no such file."""
        await self._send(scope["path_params"]["name"], send)

    async def _send(self, name: str, send: asgi.Send) -> None:
        if name not in self._files:
            raise ApiError(404, f"there is no /page/{name}")
        data, kind = self._files[name]
        await asgi.send_bytes(
            send,
            data,
            kind,
            cache_control="no-cache",
            content_security_policy=_POLICY,
            x_content_type_options="nosniff",
            referrer_policy="no-referrer",
        )
