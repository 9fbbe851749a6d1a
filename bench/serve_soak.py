"""Many requests of all kinds, of which many hang up: for serve.py."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable

import httpx
from serve_load import closed_loop, prompt

_CLIENTS = 24


async def soak(url: str, requests: int, memory: Callable[[], float]) -> dict:
    """Sends requests, and says what came of them and what is left.

    Args:
        url: the address of the server.
        requests: the number of requests.
        memory: a function that returns the server's memory in MiB.

    Raises:
        RuntimeError: there were errors other than those that were provoked, or a slot was lost.
    """
    outcomes: Counter[str] = Counter()
    choose = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits, base_url=url) as client:

        async def ask(number: int) -> None:
            body = {
                "prompt": prompt(choose.randrange(1, 60), choose.randrange(50)),
                "max_tokens": choose.randrange(1, 12),
                "n": choose.choice([1, 1, 1, 2]),
                "stream": choose.random() < 0.5,
                "temperature": choose.choice([0, 1]),
                "presence_penalty": choose.choice([0, 1]),
                "logprobs": choose.choice([None, 2]),
            }
            patience = choose.expovariate(5) if choose.random() < 1 / 3 else None
            outcomes[await _send(client, body, patience)] += 1

        await closed_loop(_CLIENTS, requests // 10, ask)  # till what grows at first has grown
        before, began = memory(), time.perf_counter()
        await closed_loop(_CLIENTS, requests - requests // 10, ask)
        seconds = time.perf_counter() - began
        lost = await _what_is_left(client)
        health = (await client.get("/health")).status_code
    result = {
        "outcomes": dict(outcomes),
        "requests_per_second": (requests - requests // 10) / seconds,
        "resident_mib_before": before,
        "resident_mib_after": memory(),
        "slots_lost": lost,
    }
    print("  " + ", ".join(f"{name} {value}" for name, value in result.items()))
    wrong = {*outcomes} - {"done", "hung up", "status 429"}
    if wrong or lost or health != 200:
        raise RuntimeError(f"errors {wrong}, {lost} slots lost, health {health}")
    return result


async def _send(client: httpx.AsyncClient, body: dict, patience: float | None) -> str:
    async def read() -> str:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            text = await response.aread()
            if response.status_code != 200:
                return f"status {response.status_code}"
            if body["stream"] and not text.endswith(b"data: [DONE]\n\n"):
                return "a stream without an end"
            return "an error in a stream" if b'{"error"' in text else "done"

    try:
        return await asyncio.wait_for(read(), patience)
    except asyncio.TimeoutError:
        return "hung up"
    except httpx.HTTPError as error:
        return type(error).__name__


async def _what_is_left(client: httpx.AsyncClient) -> float:
    """The number of completions that still run or wait a little after the last request."""
    await asyncio.sleep(1)
    text = (await client.get("/metrics")).text
    found = re.findall(r"^mistral_ext_num_requests_(?:running|waiting) (\S+)$", text, re.M)
    return sum(map(float, found))
