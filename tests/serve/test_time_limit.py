"""The time that a request has, whatever its phases."""

from __future__ import annotations

import asyncio
import time

import pytest

from mistral_ext.llm import DEMO_MODEL, Mistral
from mistral_ext.serve.errors import ApiError
from mistral_ext.serve.generation import Generation
from mistral_ext.serve.log import RequestLog
from mistral_ext.serve.service import Service
from mistral_ext.serve.settings import Settings


@pytest.mark.parametrize("age", [0, 99])
def test_it_counts_from_the_arrival(age):
    llm = Mistral.from_pretrained(DEMO_MODEL)
    service = Service(llm, Settings("demo", request_seconds=90), RequestLog(None))

    async def first_output():
        service.start()
        requests = llm.embedding_requests(["king " * 2000])
        began = time.perf_counter() - age
        generation = Generation(service.engine, requests, began, service.metrics, None, print)
        with service.running(generation):
            return await generation.next(60)

    try:
        if age:
            with pytest.raises(ApiError, match="longer than 90 s"):
                asyncio.run(first_output())
        else:
            assert asyncio.run(first_output())[1].hidden is not None
    finally:
        service.stop()
