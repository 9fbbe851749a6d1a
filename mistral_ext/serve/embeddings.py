"""Answers POST /v1/embeddings."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

import torch
from torch import Tensor

from mistral_ext.engine.embedding import pool
from mistral_ext.serve import asgi, fields
from mistral_ext.serve.calls import Call
from mistral_ext.serve.errors import bad_request, failed
from mistral_ext.serve.protocol import check_fields, prompts_of
from mistral_ext.serve.service import Service

_REQUEST = fields.request_schema(fields.EMBEDDING, ("input",))


class EmbeddingCall(Call):
    """A request to /v1/embeddings. The arguments are those of `Call`."""

    def __init__(self, service: Service, path: str, send: asgi.Send) -> None:
        super().__init__(service, f"embd-{secrets.token_hex(12)}", path, send)

    async def answer(self, scope: asgi.Scope, receive: asgi.Receive) -> None:
        service = self._service
        given = check_fields(await self.read(scope, receive), _REQUEST)
        adapter = service.adapter_of(given.get("model"))
        size = int(given.get("dimensions", service.llm.config.dim))
        if size > service.llm.config.dim:
            text = f"dimensions is {size}, expected at most {service.llm.config.dim}"
            raise bad_request(text, "dimensions")
        texts = prompts_of(given["input"])
        with service.reading_places(len(texts)):
            pooled = await asgi.until_disconnect(receive, self._pool(texts, given, adapter))
        self.record.reason = "stop"
        as_base64 = given.get("encoding_format") == "base64"
        if not pooled.isfinite().all():  # infinity becomes NaN below, which JSON cannot say
            error = ValueError("an embedding is NaN or infinite: the weights may be damaged")
            raise failed(error)
        rows = torch.nn.functional.normalize(pooled[:, :size], dim=1)
        data = [
            {"object": "embedding", "index": i, "embedding": _written(row, as_base64)}
            for i, row in enumerate(rows)
        ]
        count = self.record.prompt_tokens
        await self._send_json(
            {
                "object": "list",
                "data": data,
                "model": adapter or service.settings.model_name,
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )

    async def _pool(
        self, texts: Sequence[Any], given: Mapping[str, Any], adapter: str | None
    ) -> Tensor:
        """Returns the embeddings [N, E] of N texts with E values each, not normalised yet. They are
        fp32 on the CPU.

        Args:
            texts: the texts, each as text or as token ids.
            given: the fields of the HTTP request.
            adapter: the name of a loaded adapter. None: the model is used without an adapter.
        """
        service = self._service
        pooling = given.get("pooling", "last")
        options = given.get("instruction"), pooling, given.get("cache_salt"), adapter
        requests = await service.embedding_requests(texts, *options)
        self.record.prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        pooled = torch.zeros(len(requests), service.llm.config.dim)
        async with aclosing(self.read_prompts(requests)) as outputs:
            async for come in outputs:
                if come is not None and come[1].hidden is not None:
                    pool(pooled[come[0]], come[1].hidden.cpu(), pooling)
        return pooled


def _written(row: Tensor, as_base64: bool) -> str | list[float]:
    numbers = row.numpy().astype("<f4")
    return base64.b64encode(numbers.tobytes()).decode() if as_base64 else numbers.tolist()
