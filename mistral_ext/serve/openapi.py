"""Makes the description of the API for /openapi.json, from `fields`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral_ext import __version__
from mistral_ext.serve import fields

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}

_INTEGER = {"type": "integer"}
_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}

_USAGE = {
    "type": "object",
    "properties": {
        "prompt_tokens": _INTEGER,
        "completion_tokens": _INTEGER,
        "total_tokens": _INTEGER,
        "prompt_tokens_details": {
            "type": "object",
            "properties": {"cached_tokens": _INTEGER},
            "required": ["cached_tokens"],
        },
    },
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
}


_MODERATED = {
    "type": "object",
    "properties": {
        "flagged": {"type": "boolean"},
        "categories": {"type": "object", "additionalProperties": {"type": "boolean"}},
        "category_scores": {"type": "object", "additionalProperties": {"type": "number"}},
    },
    "required": ["flagged", "categories", "category_scores"],
}


_EMBEDDING = {
    "type": "object",
    "properties": {
        "object": {"type": "string", "enum": ["embedding"]},
        "index": _INTEGER,
        "embedding": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "number"}}]},
    },
    "required": ["object", "index", "embedding"],
}


def description(adapter_updates: bool) -> dict[str, Any]:
    """Returns the description, an OpenAPI 3.1 document.

    Args:
        adapter_updates: whether clients may load and unload adapters.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mistral_ext",
            "version": __version__,
            "description": "OpenAI's API of a Mistral model. A stream is server-sent events.",
        },
        "components": {
            "schemas": {"Error": _ERROR, "Usage": _USAGE},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": _post(
                "Reply to a conversation",
                fields.request_schema(fields.CHAT, ("messages",)),
                _answer("chat.completion", {"message": _OBJECT}),
                streams=True,
            ),
            "/v1/completions": _post(
                "Complete a text",
                fields.request_schema(fields.COMPLETION, ("prompt",)),
                _answer("text_completion", {"text": _TEXT}),
                streams=True,
            ),
            "/v1/embeddings": _post(
                "Embed texts",
                fields.request_schema(fields.EMBEDDING, ("input",)),
                _strict(
                    {
                        "object": {"type": "string", "enum": ["list"]},
                        "data": {"type": "array", "items": _EMBEDDING},
                        "model": _TEXT,
                        "usage": _strict({"prompt_tokens": _INTEGER, "total_tokens": _INTEGER}),
                    }
                ),
            ),
            "/v1/moderations": _post(
                "Have the model judge contents",
                fields.request_schema(fields.MODERATION, ("input",)),
                _strict(
                    {"id": _TEXT, "model": _TEXT, "results": {"type": "array", "items": _MODERATED}}
                ),
            ),
            "/v1/models": _get("The model and its adapters", _list_of(_model())),
            "/v1/models/{model}": _get("The model, or an adapter", _model(), of_model=True),
            "/tokenize": _post(
                "Token ids of a text or a conversation",
                fields.request_schema(fields.TOKENIZE),
                _strict(
                    {
                        "count": _INTEGER,
                        "max_model_len": _INTEGER,
                        "tokens": {"type": "array", "items": _INTEGER},
                    }
                ),
            ),
            "/detokenize": _post(
                "The text of token ids",
                fields.request_schema(fields.DETOKENIZE, ("tokens",)),
                _strict({"prompt": _TEXT}),
            ),
            "/health": _get("Whether it can serve", _strict({"status": _TEXT}), (503,)),
            "/metrics": _get("Figures for Prometheus", None),
            **(_adapter_updates() if adapter_updates else {}),
        },
    }


def _adapter_updates() -> dict[str, Any]:
    models = _strict({"models": {"type": "array", "items": _TEXT}})
    load = fields.request_schema(fields.LOAD_ADAPTER, ("lora_name", "lora_path"))
    unload = fields.request_schema(fields.UNLOAD_ADAPTER, ("lora_name",))
    return {
        "/v1/load_lora_adapter": _post("Load a LoRA adapter", load, models),
        "/v1/unload_lora_adapter": _post("Remove a LoRA adapter", unload, models),
    }


def _strict(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object that must have all of these properties."""
    return {"type": "object", "properties": dict(properties), "required": list(properties)}


def _answer(kind: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    choices = _strict({"index": _INTEGER, "finish_reason": _TEXT, **choice})
    return _strict(
        {
            "id": _TEXT,
            "object": {"type": "string", "enum": [kind]},
            "created": _INTEGER,
            "model": _TEXT,
            "choices": {"type": "array", "items": choices},
            "usage": {"$ref": "#/components/schemas/Usage"},
        }
    )


def _model() -> dict[str, Any]:
    return _strict(
        {
            "id": _TEXT,
            "object": {"type": "string", "enum": ["model"]},
            "created": _INTEGER,
            "owned_by": _TEXT,
            "parent": {
                "type": ["string", "null"],
                "description": "the model that an adapter changes; null: it is no adapter",
            },
            "max_model_len": _INTEGER,
        }
    )


def _list_of(item: Mapping[str, Any]) -> dict[str, Any]:
    return _strict(
        {"object": {"type": "string", "enum": ["list"]}, "data": {"type": "array", "items": item}}
    )


def _post(
    summary: str, request: Mapping[str, Any], answer: Mapping[str, Any], streams: bool = False
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    errors = (400, 401, 404, 408, 413, 429, 500, 503, 504)
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
            "responses": {"200": {"description": "OK", "content": content}, **_errors(errors)},
        }
    }


def _get(
    summary: str,
    answer: Mapping[str, Any] | None,
    others: tuple[int, ...] = (),
    of_model: bool = False,
) -> dict[str, Any]:
    kind = "application/json" if answer else "text/plain"
    ok = {"description": "OK", "content": {kind: {"schema": answer or _TEXT}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": ok, **_errors((401, 404) if of_model else (401,))},
    }
    for status in others:
        operation["responses"][str(status)] = {**ok, "description": "Not now"}
    if of_model:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": _TEXT}
        ]
    return {"get": operation}


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": "An error", "content": content} for status in statuses}
