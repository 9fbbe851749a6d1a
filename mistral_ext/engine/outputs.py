"""Gives the outputs of many requests. The engine gets only a few of the requests at a time, because
each output costs it a search among the requests that it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from mistral_ext.engine.engine import Engine
from mistral_ext.engine.request import Output, Request

# The number of requests that the engine gets at a time. Even if prompts are short, so many fill a
# pass.
_UNDER_WAY = 64


def outputs_of(engine: Engine, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
    """Yields the outputs of many requests, each with the number of its request, from 0 on. Requests
    are given to the engine a few at a time, as earlier ones end.

    Raises:
        ValueError: `Engine.add` refuses a request. The other requests are aborted.
        Exception: the error of a failed request. The other requests are aborted.
    """
    waiting = enumerate(requests)
    outputs = engine.outputs([])
    numbers: dict[int, int] = {}

    def add(count: int) -> None:
        for number, request in islice(waiting, count):
            outputs.add(request)
            numbers[outputs.request_ids[-1]] = number

    try:
        add(_UNDER_WAY)
        for output in outputs:
            if output.error:
                raise output.error
            yield numbers[output.request_id], output
            if output.is_last:
                del numbers[output.request_id]
                add(1)
    finally:
        outputs.close()
