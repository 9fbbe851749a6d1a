"""Answers POST /v1/moderations, and moderates the prompts and completions of other endpoints."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from mistral_ext.engine.request import Request
from mistral_ext.serve import asgi, fields
from mistral_ext.serve.calls import Call
from mistral_ext.serve.errors import failed
from mistral_ext.serve.protocol import check_fields
from mistral_ext.serve.service import Service
from mistral_ext.text.guardrails import CATEGORIES, Moderation

_REQUEST = fields.request_schema(fields.MODERATION, ("input",))


async def judge(
    call: Call,
    service: Service,
    requests: Sequence[Request],
    kind: str,
    ping: Callable[[], Awaitable[None]] | None = None,
) -> list[Moderation]:
    """Lets the model judge contents.

    Args:
        call: the call for which the model judges.
        service: the state that all requests share.
        requests: the result of `Service.moderation_requests`.
        kind: the kind of the contents for the metrics: "input", "output" or "request".
        ping: a function that keeps the client's connection open. It is called from time to time
            while the model judges. None: nothing is called.

    Returns:
        The judgements, in the order of the requests.

    Raises:
        ApiError: 500, the model's logits are NaN.
    """
    found: dict[int, Moderation] = {}
    async with aclosing(call.read_prompts(requests)) as outputs:
        async for come in outputs:
            if come is None:
                if ping:
                    await ping()
            elif come[1].prompt_logits is not None and len(come[1].prompt_logits):
                try:
                    found[come[0]] = service.llm.moderation_of(come[1].prompt_logits[-1])
                except ValueError as error:
                    raise failed(error) from error
    for moderation in found.values():
        service.metrics.moderated(kind, moderation.category)
    return [found[i] for i in range(len(requests))]


class ModerationCall(Call):
    """A request to /v1/moderations. The arguments are those of `Call`."""

    def __init__(self, service: Service, path: str, send: asgi.Send) -> None:
        super().__init__(service, f"modr-{secrets.token_hex(12)}", path, send)

    async def answer(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        service = self._service
        given = check_fields(await self.read(scope, receive), _REQUEST)
        service.expect_writer()
        adapter = service.adapter_of(given.get("model"))
        asked = given["input"]
        contents = [asked] if isinstance(asked, str) else asked
        with service.reading_places(len(contents)):
            work = self._judge(contents, given.get("cache_salt"), adapter)
            found = await asgi.until_disconnect(receive, work)
        self.record.reason = ",".join(sorted({moderation.category for moderation in found}))
        await self._send_json(
            {
                "id": self.record.request_id,
                "model": adapter or service.settings.model_name,
                "results": [_result(moderation) for moderation in found],
            }
        )

    async def _judge(
        self, contents: Sequence[str], salt: str | None, adapter: str | None
    ) -> list[Moderation]:
        requests = await self._service.moderation_requests(contents, "input", salt, adapter=adapter)
        self.record.prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        return await judge(self, self._service, requests, "request")


def _result(moderation: Moderation) -> dict[str, Any]:
    return {
        "flagged": moderation.flagged,
        "categories": {name: name == moderation.category for name in CATEGORIES},
        "category_scores": dict(moderation.scores),
    }
