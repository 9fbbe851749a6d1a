"""Load for a server with OpenAI's API, for serve.py: who asks for what and when, and what comes."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

WORDS = "the king had a daughter who lived in a tower by the sea and sang of gold".split()  # noqa: SIM905

_ENDLESS = 2048  # tokens; the context of a peer may be no longer


@dataclass
class Call:
    """A request, and when its tokens came. Times are of `time.perf_counter`."""

    began: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in itertools.pairwise(self.times)]


@dataclass(frozen=True)
class Target:
    """A server.

    Args:
        url: the address of the server.
        fields: further fields of each request, such as the server's way to ignore the end of a
            text.
    """

    url: str
    fields: dict[str, Any]


def prompt(words: int, seed: int) -> str:
    """A text that no other seed begins with."""
    choose = random.Random(seed)
    return " ".join(choose.choices(WORDS, k=words))


async def complete(
    client: httpx.AsyncClient, target: Target, text: str, tokens: int, call: Call | None = None
) -> Call:
    """Streams one completion, and notes in `call` what comes."""
    call = call or Call()
    body = {
        "prompt": text,
        "max_tokens": tokens,
        "temperature": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.fields,
    }
    try:
        async with client.stream("POST", f"{target.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                call.error = f"status {response.status_code}"
                return call
            async for line in _lines(response):
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    call.error = event["error"]["message"]
                elif event["choices"] and event["choices"][0]["text"]:
                    call.times.append(time.perf_counter())
                elif event.get("usage"):
                    call.tokens = event["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        call.error = repr(error)
    if not (call.times or call.error):
        call.error = "no token came"
    return call


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a stream of events. httpx also ends lines at characters such as U+2028, which
    texts may have."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line


async def closed_loop(
    clients: int, requests: int, ask: Callable[[int], Awaitable[Call]]
) -> list[Call]:
    """Runs `clients` clients. Each asks again as soon as it has its answer."""
    numbers, calls = iter(range(requests)), []

    async def client() -> None:
        for number in numbers:
            calls.append(await ask(number))

    await asyncio.gather(*(client() for _ in range(clients)))
    return calls


async def poisson(rate: float, requests: int, ask: Callable[[int], Awaitable[Call]]) -> list[Call]:
    """Makes requests at random times, `rate` a second on average. They do not wait for others to
    end."""
    choose, tasks = random.Random(0), []
    for number in range(requests):
        tasks.append(asyncio.ensure_future(ask(number)))
        await asyncio.sleep(choose.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The percentiles p50, p90 and p99 of values. Empty if there are no values."""
    if not values:
        return {}
    cuts = statistics.quantiles([*values, *values[:1]], n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def summary(calls: Sequence[Call], seconds: float, most_first: float, most_gap: float) -> dict:
    """Figures of a run.

    Args:
        seconds: the seconds that the run took.
        most_first, most_gap: the limits of a good request: seconds to the first token, and seconds
            between tokens on average.
    """
    done = [call for call in calls if not call.error]
    tokens = sum(call.tokens for call in done)
    good = [
        call
        for call in done
        if call.first <= most_first and statistics.fmean(call.gaps or [0]) <= most_gap
    ]
    return {
        "requests": len(calls),
        "errors": sorted({call.error for call in calls if call.error}),
        "failed": len(calls) - len(done),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "good_per_second": len(good) / seconds,
        "first": percentiles([call.first for call in done]),
        "gap": percentiles([gap for call in done for gap in call.gaps]),
    }


async def gap_beside_long_prompt(
    client: httpx.AsyncClient, target: Target, words: int
) -> dict[str, float]:
    """Gaps of a stream, alone and while another client's long prompt is read.

    Args:
        words: the number of words of the long prompt.
    """
    call = Call()
    stream = asyncio.ensure_future(complete(client, target, prompt(8, -1), _ENDLESS, call))
    await _wait_for_tokens(call, 32)
    long = await complete(client, target, prompt(words, -2), 1)
    await _wait_for_tokens(call, len(call.times) + 32)
    stream.cancel()
    if long.error:
        raise RuntimeError(long.error)
    begin, end = long.began, long.times[0]
    pairs = list(itertools.pairwise(call.times))
    during = [b - a for a, b in pairs if b > begin and a < end]
    alone = [b - a for a, b in pairs if b <= begin or a >= end]
    return {
        "prompt_seconds": end - begin,
        "median_gap_alone": statistics.median(alone),
        "p99_gap_beside": percentiles(during)["p99"],
    }


async def _wait_for_tokens(call: Call, count: int) -> None:
    while len(call.times) < count:
        if call.error:
            raise RuntimeError(call.error)
        await asyncio.sleep(0.001)
