"""Makes the ASGI application of the server: its routes, middleware and handlers of errors."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from mistral_ext.serve import asgi
from mistral_ext.serve.adapters import AdapterCall
from mistral_ext.serve.asgi import send_bytes, send_error, send_json
from mistral_ext.serve.auth import KeyCheck
from mistral_ext.serve.calls import Endpoint
from mistral_ext.serve.completions import CompletionCall
from mistral_ext.serve.embeddings import EmbeddingCall
from mistral_ext.serve.errors import ApiError
from mistral_ext.serve.moderation import ModerationCall
from mistral_ext.serve.openapi import description
from mistral_ext.serve.page_files import Page
from mistral_ext.serve.protocol import context_length
from mistral_ext.serve.service import Service
from mistral_ext.serve.tokens import TokensCall

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

Lifespan: TypeAlias = Callable[[Any], AbstractAsyncContextManager[None]]
_Answer: TypeAlias = Callable[[asgi.Scope, asgi.Send], Awaitable[None]]


def build_app(service: Service, lifespan: Lifespan | None = None) -> asgi.App:
    """The ASGI application of a service.

    Args:
        service: the service.
        lifespan: a context manager that starts and stops the service. None: the caller starts and
            stops the service.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Route

    settings = service.settings
    middleware = []
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )
    if settings.api_keys:
        middleware.append(Middleware(KeyCheck, keys=settings.api_keys))
    plain, page = _Plain(service), Page()
    chat = Endpoint(partial(CompletionCall, service, True))
    text = Endpoint(partial(CompletionCall, service, False))
    embeddings = Endpoint(partial(EmbeddingCall, service))
    tokenize = Endpoint(partial(TokensCall, service, False))
    detokenize = Endpoint(partial(TokensCall, service, True))
    moderations = Endpoint(partial(ModerationCall, service))
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", text, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/moderations", moderations, methods=["POST"]),
        Route("/v1/models", _Get(plain.models), methods=["GET"]),
        Route("/v1/models/{model:path}", _Get(plain.model), methods=["GET"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        *(_adapter_routes(service) if settings.adapter_updates else ()),
        Route("/health", _Get(plain.health), methods=["GET"]),
        Route("/metrics", _Get(plain.metrics), methods=["GET"]),
        Route("/openapi.json", _Get(plain.openapi), methods=["GET"]),
        Route("/", _Get(page.index), methods=["GET"]),
        Route("/page/{name}", _Get(page.file), methods=["GET"]),
    ]
    return Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _no_route, Exception: _bug},
    )


def _adapter_routes(service: Service) -> list[Route]:
    from starlette.routing import Route

    load = Endpoint(partial(AdapterCall, service, True))
    unload = Endpoint(partial(AdapterCall, service, False))
    return [
        Route("/v1/load_lora_adapter", load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
    ]


class _Plain:
    """Endpoints that answer at once, without the engine."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def models(self, scope: asgi.Scope, send: asgi.Send) -> None:
        models = [self._model(name) for name in self._service.models]
        await send_json(send, {"object": "list", "data": models})

    async def model(self, scope: asgi.Scope, send: asgi.Send) -> None:
        name = scope["path_params"]["model"]
        self._service.adapter_of(name)
        await send_json(send, self._model(name))

    async def health(self, scope: asgi.Scope, send: asgi.Send) -> None:
        status = self._service.status
        await send_json(send, {"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, scope: asgi.Scope, send: asgi.Send) -> None:
        await send_bytes(send, *self._service.metrics.render())

    async def openapi(self, scope: asgi.Scope, send: asgi.Send) -> None:
        await send_json(send, description(self._service.settings.adapter_updates))

    def _model(self, name: str) -> dict[str, Any]:
        base = self._service.settings.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "mistral_ext",
            "parent": None if name == base else base,
            "max_model_len": context_length(self._service.llm),
        }


class _Get:
    """An endpoint that answers without reading a body. It is an ASGI application."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        try:
            await self._answer(scope, send)
        except ApiError as error:
            await send_error(send, error)


async def _no_route(request: Request, error: Exception) -> Response:
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException)
    path = request.url.path
    text = {404: f"there is no {path}", 405: f"{request.method} is not for {path}"}
    wrong = ApiError(error.status_code, text.get(error.status_code, error.detail))
    return _response(wrong, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return _response(ApiError(500, "the server failed, its log says where", code="bug"), None)


def _response(error: ApiError, headers: Mapping[str, str] | None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(error.body(), error.status, headers)
