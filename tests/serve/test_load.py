"""More than there is room for, slow readers, and the end. The numbers are those of complaints about
other servers."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from servers import serving, wait_until
from test_cancelling import LONG, ONCE, hanging_request, long_prompt


@pytest.fixture(scope="module")
def narrow():
    """A server of two slots and a queue of two."""
    options = ("--max-batch", "2", "--max-queue", "2", "--max-unread", "50", "--max-body", "100000")
    with serving(*options, "--ping-seconds", "0.1") as server:
        yield server


def test_10_overflow_is_refused_before_anything_is_done(narrow):
    with hanging_request(narrow, **LONG, n=3):
        narrow.wait_for_load(2, 1)
        assert narrow.chat(max_tokens=1, n=2).status_code == 429  # n counts n
        # A prompt that no tokenizer would take is not even looked at.
        refused = narrow.post("/v1/completions", {"prompt": ["\ud800", "b"]})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            narrow.client().chat.completions.create(model="demo", messages=ONCE, n=2)
    narrow.wait_for_load(0)
    assert narrow.chat(max_tokens=1, n=4).status_code == 200
    never = narrow.chat(max_tokens=1, n=5)
    assert never.status_code == 400
    assert "n is 5 in all, expected at most 4" in never.json()["error"]["message"]


def test_10_clients_that_come_again_get_their_turn(narrow):
    client = narrow.client(max_retries=30)
    replies = []

    def run() -> None:
        replies.append(client.chat.completions.create(model="demo", messages=ONCE, max_tokens=20))

    threads = [threading.Thread(target=run) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 10


def test_11_a_reader_that_stalls_loses_its_request(narrow):
    seen = len(narrow.lines)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = urlsplit(narrow.url).netloc.split(":")
        connection.connect((host, int(port)))
        body = {"messages": ONCE, **LONG, "stream": True, "logprobs": True, "top_logprobs": 20}
        data = json.dumps(body).encode()
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        narrow.wait_for_load(1)
        narrow.wait_for_load(0)
        line = narrow.next_line(seen, "499 slow_reader")
        assert narrow.chat(max_tokens=2).status_code == 200
        assert int(line.partition("completion=")[2].split()[0]) < 2000


def test_11_a_body_over_the_limit(narrow):
    text = "a" * 200_000
    assert narrow.chat(text).status_code == 413

    def parts():
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"a" * 2000
        yield b'"}'

    answer = narrow.http.post("/v1/completions", content=parts())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert narrow.chat(max_tokens=1).status_code == 200


def test_12_a_stream_goes_on_while_a_long_prompt_is_read(narrow):
    """Between two pieces of the prompt, of 32 tokens, there is a token of the stream."""
    with hanging_request(narrow, **LONG, stream=True) as connection:
        connection.recv(10)
        before = narrow.metric("generation_tokens_total")
        body = {"prompt": long_prompt(1600), "max_tokens": 1, "stream": True}
        narrow.post("/v1/completions", body)
        assert narrow.metric("generation_tokens_total") - before >= 1600 / 32
    narrow.wait_for_load(0)


def test_a_stream_says_that_it_lives_while_it_waits(narrow):
    with hanging_request(narrow, **LONG, n=2):
        narrow.wait_for_load(2)
        body = {"messages": ONCE, "max_tokens": 1, "stream": True}
        with narrow.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
    narrow.wait_for_load(0)


def test_a_request_has_its_time():
    with serving("--request-seconds", "0.5") as server:
        late = server.chat(**LONG)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        text = server.chat(**LONG, stream=True).text
        assert '"code": "timeout"' in text.split("\n\n")[-3]
        server.wait_for_load(0)


def test_13_sigterm_lets_requests_finish():
    with serving("--drain-seconds", "250") as server:
        replies = []
        work = {"max_tokens": 800, "ignore_eos": True}
        threads = [
            threading.Thread(target=lambda s=s: replies.append(server.chat(**work, stream=s)))
            for s in (False, True)
        ]
        for thread in threads:
            thread.start()
        server.wait_for_load(2)
        with httpx.Client() as other:
            other.get(f"{server.url}/health")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: other.get(f"{server.url}/health").status_code == 503)
            refused = other.post(
                f"{server.url}/v1/chat/completions", json={"messages": ONCE, "max_tokens": 1}
            )
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
        for thread in threads:
            thread.join()
        (whole,) = (r.json() for r in replies if r.headers["content-type"] == "application/json")
        (stream,) = (r.text for r in replies if r.headers["content-type"] != "application/json")
        assert whole["usage"]["completion_tokens"] == 800
        assert stream.endswith('"finish_reason":"length","delta":{}}]}\n\ndata: [DONE]\n\n')
        assert server.process.wait(60) == 0


@pytest.mark.parametrize("twice", [False, True])
def test_13_what_does_not_finish_in_time_is_ended(twice):
    with serving("--drain-seconds", "600" if twice else "0.5") as server:
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.chat(**LONG)))
        thread.start()
        server.wait_for_load(1)
        server.process.send_signal(signal.SIGTERM)
        if twice:
            server.next_line(0, "ending")
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        thread.join()
        assert replies[0].status_code == 503


def test_an_idle_server_ends_at_once_also_with_open_connections():
    with serving() as server, httpx.Client() as client:
        client.get(f"{server.url}/health")
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 130
        assert time.monotonic() - began < 60


def test_a_port_that_is_taken():
    from servers import CLI

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([*CLI, "--port", port], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == (
        f"mistral-ext: cannot listen at 127.0.0.1, port {port}: Address already in use\n"
    )
