"""The server inside Starlette's BaseHTTPMiddleware, as `mistral-ext serve` would run it."""

from __future__ import annotations

import sys

from starlette.middleware.base import BaseHTTPMiddleware

from mistral_ext.cli import main
from mistral_ext.serve import server

_build = server.build_app


class _Middleware(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


server.build_app = lambda service: _Middleware(_build(service))
sys.exit(main(["serve", *sys.argv[1:]]))
