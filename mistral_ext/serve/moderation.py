"""POST /v1/moderations, and the moderation of what other endpoints are asked and answer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from mistral_ext.serve import asgi, fields
from mistral_ext.serve.calls import Call
from mistral_ext.serve.protocol import check_fields
from mistral_ext.serve.service import Service
from mistral_ext.text.guardrails import CATEGORIES, Moderation

_REQUEST = fields.request_schema(fields.MODERATION, ("input",))


async def moderate(
    call: Call, service: Service, contents: Sequence[Any], param: str, kind: str
) -> list[Moderation]:
    """What the model thinks of contents.

    Args:
        call: for which it is asked.
        service: the state that requests share.
        contents: texts, or conversations whose last message is meant.
        param: the field of the request that they come from.
        kind: of the contents, for the figures: "input", "output" or "request".

    Raises:
        ApiError: 400 for a content that is too long.
    """
    generation = call.generation(await service.moderation_requests(contents, param))
    with service.running(generation):
        async for _ in call.outputs(generation):
            pass
    completions = [p.completion for p in generation.progress if p.completion]
    found = [service.llm.moderation_of(completion) for completion in completions]
    for moderation in found:
        service.metrics.moderated(kind, moderation.category)
    return found


class ModerationCall(Call):
    """A request to the endpoint. The arguments are those of `Call`."""

    def __init__(self, service: Service, path: str, send: asgi.Send) -> None:
        super().__init__(service, f"modr-{secrets.token_hex(12)}", path, send)

    async def answer(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        service = self._service
        given = check_fields(await self.read(scope, receive), _REQUEST)
        service.expect_no_adapter(given.get("model"))
        asked = given["input"]
        contents = [asked] if isinstance(asked, str) else asked
        with service.reading_places(len(contents)):
            work = moderate(self, service, contents, "input", "request")
            found = await asgi.until_disconnect(receive, work)
        self.record.reason = ",".join(sorted({moderation.category for moderation in found}))
        await self._send_json(
            {
                "id": self.record.request_id,
                "model": service.settings.model_name,
                "results": [_result(moderation) for moderation in found],
            }
        )


def _result(moderation: Moderation) -> dict[str, Any]:
    return {
        "flagged": moderation.flagged,
        "categories": {name: name == moderation.category for name in CATEGORIES},
        "category_scores": dict(moderation.scores),
    }
