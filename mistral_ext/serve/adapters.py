"""Answers POST /v1/load_lora_adapter and POST /v1/unload_lora_adapter, which have the same form as
vLLM's."""

from __future__ import annotations

import secrets
from typing import Any

from mistral_ext.serve import asgi, fields
from mistral_ext.serve.calls import Call
from mistral_ext.serve.errors import ApiError, bad_request
from mistral_ext.serve.protocol import check_fields
from mistral_ext.serve.service import Service

_LOAD = fields.request_schema(fields.LOAD_ADAPTER, ("lora_name", "lora_path"))
_UNLOAD = fields.request_schema(fields.UNLOAD_ADAPTER, ("lora_name",))


class AdapterCall(Call):
    """A request to /v1/load_lora_adapter or /v1/unload_lora_adapter.

    Args:
        service, path, send: as in `Call`.
        loads: whether the request loads an adapter. If False, it removes an adapter.
    """

    def __init__(self, service: Service, loads: bool, path: str, send: asgi.Send) -> None:
        super().__init__(service, f"lora-{secrets.token_hex(12)}", path, send)
        self._change = self._load if loads else self._unload

    async def answer(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        await self._change(await self.read(scope, receive))
        await self._send_json({"models": self._service.models})

    async def _load(self, body: dict[str, Any]) -> None:
        given = check_fields(body, _LOAD)
        name = given["lora_name"]
        if name == self._service.settings.model_name:
            raise bad_request(f"lora_name is {name!r}, which is the model's name", "lora_name")
        try:
            await self._service.load_adapter(given["lora_path"], name)
        except (OSError, ValueError) as error:
            raise bad_request(str(error)) from error

    async def _unload(self, body: dict[str, Any]) -> None:
        name = check_fields(body, _UNLOAD)["lora_name"]
        try:
            await self._service.unload_adapter(name)
        except ValueError as error:
            raise ApiError(404, str(error), "lora_name", "model_not_found") from error
