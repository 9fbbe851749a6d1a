"""Clients that hang up. The numbers are those of complaints about other servers."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from servers import serving, wait_until

LONG = {"max_tokens": 20000, "ignore_eos": True}  # takes minutes
ONCE = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def small():
    """A server with two slots."""
    with serving("--max-batch", "2", "--max-queue", "8") as server:
        yield server


def long_prompt(tokens: int) -> list[int]:
    return [5 + i % 2000 for i in range(tokens)]


@contextmanager
def hanging_request(server, path: str = "/v1/chat/completions", **body):
    """A request that is sent; its connection is closed at the end of the block."""
    import json

    if path.endswith("chat/completions"):
        body = {"messages": ONCE, **body}
    data = json.dumps(body).encode()
    host, port = urlsplit(server.url).netloc.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        yield connection


def works(server) -> bool:
    return len(server.chat(max_tokens=3, ignore_eos=True).json()["choices"]) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_1_hang_up_while_decoding(small, stream, n):
    seen = len(small.lines)
    with hanging_request(small, **LONG, stream=stream, n=n) as connection:
        wait_until(lambda: small.load[0] == n)
        if stream:
            connection.recv(10)
    small.wait_for_load(0)
    assert small.next_line(seen, "499 disconnected")
    assert works(small)


@pytest.mark.parametrize("stream", [False, True])
def test_1_hang_up_while_queued(small, stream):
    with hanging_request(small, **LONG, n=2):
        small.wait_for_load(2)
        with hanging_request(small, **LONG, n=3, stream=stream):
            small.wait_for_load(2, 3)
        small.wait_for_load(2, 0)
    small.wait_for_load(0)


@pytest.mark.parametrize("stream", [False, True])
def test_1_hang_up_while_the_prompt_is_read(small, stream):
    prompt = long_prompt(20000)
    body = {"prompt": prompt, "max_tokens": 2, "stream": stream}
    started = small.metric("time_to_first_token_seconds_count")
    with hanging_request(small, "/v1/completions", **body):
        small.wait_for_load(1)
    small.wait_for_load(0)
    assert small.metric("time_to_first_token_seconds_count") == started


def test_2_cancelling_at_once_leaves_nothing(small):
    for delay in (0, 0, 0, 0.001, 0.002, 0.004, 0.008, 0.016):
        with hanging_request(small, **LONG, n=2):
            time.sleep(delay)
    small.wait_for_load(0)
    # If places in the queue were lost, ten would not fit any more.
    assert len(small.chat(max_tokens=1, n=10).json()["choices"]) == 10


def test_2_hang_up_in_the_middle_of_the_body(small):
    seen = len(small.lines)
    host, port = urlsplit(small.url).netloc.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        )
    assert small.next_line(seen, "/v1/completions 499 disconnected")
    assert works(small)


def test_3_cancelling_a_queued_request_leaves_the_active_ones(small):
    texts = []

    def run(seed: int) -> None:
        reply = small.chat(max_tokens=400, ignore_eos=True, seed=seed).json()
        texts.append(reply["choices"][0]["message"]["content"])

    run(1)
    threads = [threading.Thread(target=run, args=(1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    small.wait_for_load(2)
    with hanging_request(small, **LONG):
        wait_until(lambda: small.load[1] == 1)
    for thread in threads:
        thread.join()
    assert texts[0] == texts[1] == texts[2]


def test_4_abort_a_stream_while_another_prompt_is_read(small):
    body = {"prompt": long_prompt(1500), "max_tokens": 4, "temperature": 0}
    alone = small.post("/v1/completions", body).json()["choices"][0]["text"]
    found = []
    with hanging_request(small, **LONG, stream=True) as connection:
        connection.recv(10)
        thread = threading.Thread(
            target=lambda: found.append(small.post("/v1/completions", body).json())
        )
        thread.start()
        wait_until(lambda: small.load[0] == 2 or not thread.is_alive())
    thread.join()
    assert found[0]["choices"][0]["text"] == alone
    small.wait_for_load(0)


def test_5_many_time_outs_and_then_a_request_that_ends(small):
    client = small.client(timeout=0.5, max_retries=2)

    def run() -> None:
        for _ in range(10):
            with pytest.raises((openai.APITimeoutError, openai.RateLimitError)):
                client.chat.completions.create(model="demo", messages=ONCE, extra_body=LONG)

    threads = [threading.Thread(target=run) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    small.wait_for_load(0)
    assert works(small)


def test_6_with_middleware_that_wraps_requests():
    command = (sys.executable, str(Path(__file__).parent / "server_in_middleware.py"))
    with serving(command=command) as server:
        for stream in (False, True):
            with hanging_request(server, **LONG, stream=stream):
                server.wait_for_load(1)
            server.wait_for_load(0)
        assert works(server)


def test_a_client_that_goes_away_in_the_middle_of_a_stream_costs_no_error(small):
    body = {"messages": ONCE, "stream": True, **LONG}
    with small.http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    small.wait_for_load(0)
    assert not [line for line in small.lines if "Traceback" in line]
