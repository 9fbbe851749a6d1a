"""Answers POST /tokenize and POST /detokenize, which have the same form as vLLM's."""

from __future__ import annotations

import secrets
from typing import Any

from mistral_ext.serve import asgi, fields
from mistral_ext.serve.calls import Call
from mistral_ext.serve.errors import bad_request
from mistral_ext.serve.protocol import check_fields, context_length, conversation_of
from mistral_ext.serve.service import Service

_TOKENIZE = fields.request_schema(fields.TOKENIZE)
_DETOKENIZE = fields.request_schema(fields.DETOKENIZE, ("tokens",))


class TokensCall(Call):
    """A request to /tokenize or /detokenize.

    Args:
        service, path, send: as in `Call`.
        backwards: whether to turn tokens into text. If False, text is turned into tokens.
    """

    def __init__(self, service: Service, backwards: bool, path: str, send: asgi.Send) -> None:
        super().__init__(service, f"tok-{secrets.token_hex(12)}", path, send)
        self._convert = self._detokenize if backwards else self._tokenize

    async def answer(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        await self._send_json(await self._convert(await self.read(scope, receive)))

    async def _tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        given = check_fields(body, _TOKENIZE)
        self._service.adapter_of(given.get("model"))
        if ("prompt" in given) == ("messages" in given):
            raise bad_request("expected either prompt or messages", "prompt")
        if "messages" in given:
            messages = conversation_of(given)
            ids = await self._service.encode(messages, is_chat=True, tools=given.get("tools"))
        else:
            ids = await self._service.encode(given["prompt"], is_chat=False)
            if not given.get("add_special_tokens", True):
                ids = ids[len(self._service.tokenizer.start) :]
        length = context_length(self._service.llm)
        return {"count": len(ids), "max_model_len": length, "tokens": ids}

    async def _detokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        given = check_fields(body, _DETOKENIZE)
        self._service.adapter_of(given.get("model"))
        try:
            text = self._service.tokenizer.decode(map(int, given["tokens"]))
        except ValueError as error:
            raise bad_request(str(error), "tokens") from error
        return {"prompt": text}
