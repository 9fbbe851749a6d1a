"""Bad input. The numbers are those of complaints about other servers."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

ONCE = {"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 2}
USER = ONCE["messages"][0]


def chat(**fields):
    return "/v1/chat/completions", {**ONCE, **fields}


def text(**fields):
    return "/v1/completions", {"prompt": "Once", "max_tokens": 2, **fields}


WRONG = {
    "no fields": (chat(messages=None), "messages is missing"),
    "no messages": (chat(messages=[]), "messages is []"),
    "messages are text": (chat(messages="Hello"), "messages"),
    "role": (chat(messages=[{"role": "king", "content": "a"}]), 'role is "king"'),
    "no role": (chat(messages=[{"content": "a"}]), "messages[0].role is missing"),
    "content": (chat(messages=[{"role": "user", "content": 3}]), "messages[0].content is 3"),
    "picture": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        "messages[0].content",
    ),
    "surrogate": (chat(messages=[{"role": "user", "content": "\ud800"}]), "surrogate"),
    "the reply is there": (chat(messages=[USER, {"role": "assistant", "content": "a"}]), "user's"),
    "tool calls": (
        chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}, USER]),
        "messages[0].tool_calls[0].type is missing",
    ),
    "top_logprobs": (chat(logprobs=True, top_logprobs=21), "top_logprobs is 21"),
    "top_logprobs alone": (chat(top_logprobs=2), "without logprobs: true"),
    "logprobs": (text(logprobs=21), "logprobs is 21"),
    "n": (chat(n=0), "n is 0"),
    "huge n": (chat(n=10**30), "n is 1000"),
    "n is true": (chat(n=True), "n is true"),
    "n is text": (chat(n="2"), 'n is "2"'),
    "half an n": (chat(n=1.5), "n is 1.5"),
    "max_tokens": (chat(max_tokens=0), "max_tokens is 0"),
    "temperature": (chat(temperature=-0.1), "temperature is -0.1"),
    "infinite temperature": (chat(temperature=10**400), "temperature is 1000"),
    "top_p": (chat(top_p=0), "top_p is 0, expected a number above 0, at most 1"),
    "seed": (chat(seed="a"), "seed"),
    "stop": (chat(stop=["a"] * 17), "stop is"),
    "long stop": (chat(stop="a" * 100_000), "stop is"),
    "empty stop": (chat(stop=""), "stop is"),
    "logit_bias": (chat(logit_bias={"1": 101}), "logit_bias.1 is 101"),
    "huge logit_bias": (chat(logit_bias={str(i): 1 for i in range(2000)}), "logit_bias is"),
    "logit_bias of words": (chat(logit_bias={"king": 1}), "'king'"),
    "logit_bias of no token": (chat(logit_bias={"2048": 1}), "2048"),
    "stop_token_ids": (chat(stop_token_ids=[-1]), "stop_token_ids[0] is -1"),
    "stream": (chat(stream="yes"), "stream is"),
    "stream_options": (chat(stream_options={"include_usage": True}), "without stream: true"),
    "stream_options of another kind": (
        chat(stream=True, stream_options={"usage": True}),
        "stream_options.usage",
    ),
    "unknown": (chat(temprature=1), "'temprature'"),
    "no schema": (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    "a schema of nothing": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
        "response_format.json_schema.schema is missing",
    ),
    "a schema for an object": (
        chat(response_format={"type": "json_object", "json_schema": {"schema": {}}}),
        "goes with type json_schema",
    ),
    "format": (chat(response_format={"type": "yaml"}), "response_format.type is"),
    "two constraints": (text(guided_regex="a", guided_json={}), "guided_json and guided_regex"),
    "two outputs": (text(structured_outputs={"regex": "a", "choice": ["a"]}), "expected one of"),
    "unknown output": (text(structured_outputs={"structural_tag": "a"}), "unknown field"),
    "no choice": (text(guided_choice=[]), "guided_choice"),
    "tools": (chat(tools=[{"type": "function"}]), "tools[0].function is missing"),
    "tool_choice": (chat(tool_choice="required"), "tool_choice is 'required'"),
    "audio": (chat(modalities=["text", "audio"]), "modalities is not supported"),
    "empty prompt": (text(prompt=""), "prompt"),
    "no ids": (text(prompt=[]), "prompt"),
    "an empty list of ids": (text(prompt=[[]]), "prompt"),
    "mixed prompts": (text(prompt=["a", 1]), "prompt"),
    "ids out of the vocabulary": (text(prompt=[1, 2048]), "2048"),
    "a huge id": (text(prompt=[1, 10**30]), "prompt"),
    "a negative id": (text(prompt=[-1]), "prompt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_14_bad_fields_are_named(demo, name):
    (path, body), words = WRONG[name]
    response = demo.post(path, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] is None or isinstance(error["code"], str)
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b"\xff",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 10000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"}",
        # Python reads so many levels, but may fail to write them into the error.
        *(b'{"stop": ' + b"[" * n + b"]" * n + b"}" for n in range(940, 990, 3)),
        b'{"prompt": "a", "user": ' + b'{"a": ' * 900 + b"1" + b"}" * 901,
    ],
)
def test_14_bodies_that_are_no_object(demo, body):
    headers = {"content-type": "application/json"}
    response = demo.http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_14_content_types(demo):
    url, body = f"{demo.url}/v1/chat/completions", json.dumps(ONCE)

    def status(kind: str | None, **more: str) -> int:
        headers = {"content-type": kind, **more} if kind else more
        return httpx.post(url, content=body, headers=headers, timeout=100).status_code

    assert status("application/json; charset=utf-8") == 200
    assert status(None) == 200
    assert status("text/plain") == 400
    assert status("multipart/form-data") == 400
    # What `curl -d` says of every body; and so might any web page that a browser has open.
    assert status("application/x-www-form-urlencoded") == 200
    assert status("application/x-www-form-urlencoded", origin="https://example.org") == 400
    assert status(None, origin="https://example.org") == 400
    assert status("application/json", origin="https://example.org") == 200


def _raw(server, version: str, *headers: str, **fields) -> bytes:
    """The answer to a completion of 2 tokens, as it comes over the socket."""
    body = json.dumps({"prompt": "Once", "max_tokens": 2, **fields}).encode()
    lines = (f"POST /v1/completions HTTP/{version}", "Host: x", f"Content-Length: {len(body)}")
    head = "\r\n".join((*lines, "Connection: close", *headers, "", "")).encode()
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=100) as connection:
        connection.sendall(head + body)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_streams_of_http_1_0_have_no_chunks(demo):
    head, _, body = _raw(demo, "1.0", stream=True).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body.startswith(b"data: {")
    assert body.endswith(b"\n\ndata: [DONE]\n\n")


def test_an_offer_of_http_2_keeps_the_body(demo):
    """Java's HttpClient makes this offer with its first request."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQ")
    head, _, body = _raw(demo, "1.1", *offer).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["usage"]["completion_tokens"] == 2


def test_14_and_it_still_serves(demo):
    assert demo.chat(max_tokens=2).status_code == 200
    assert not [line for line in demo.lines if "Traceback" in line]


def test_15_too_long_names_both_numbers(demo):
    ids = [5] * 32760
    response = demo.post("/v1/completions", {"prompt": ids, "max_tokens": 9})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert "32768" in error["message"]
    assert "32760" in error["message"]
    assert "32769 together" in error["message"]
    long = demo.post("/v1/chat/completions", {"messages": [{**USER, "content": "king " * 40000}]})
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_15_more_than_the_cache_holds(tiny_folder):
    from servers import serving

    with serving("--model", tiny_folder, "--cache-tokens", "100") as server:
        response = server.post("/v1/completions", {"prompt": [5] * 90, "max_tokens": 11})
        assert response.status_code == 400
        assert "100" in response.json()["error"]["message"]
        assert server.post("/v1/completions", {"prompt": [5] * 90, "max_tokens": 10}).is_success


@pytest.mark.parametrize("data", ["\N{GRINNING FACE}\N{SNOWMAN}é".encode(), bytes(range(128, 256))])
def test_16_bytes_that_are_no_text_yet(tiny, data):
    """A bias has the model write bytes: parts of characters, and what never becomes one."""
    byte_ids = {771 + byte: byte for byte in data}  # of the vocabulary v3
    spelled = tiny.post("/detokenize", {"tokens": [771 + byte for byte in data]}).json()["prompt"]
    assert spelled.encode("utf-8", "replace").decode() == data.decode("utf-8", "replace") or (
        "\ufffd" in spelled
    )
    options = {
        "model": "tiny",
        "messages": [USER],
        "max_tokens": 24,
        "logit_bias": {str(i): 100 for i in byte_ids},
        "logprobs": True,
    }
    client = tiny.client().chat.completions
    for seed in (1, 2):
        (choice,) = client.create(**options, seed=seed).choices
        written = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert {*written} <= {*data}
        assert len(written) == 24
        chunks = list(client.create(**options, seed=seed, stream=True))
        pieces = [c.choices[0].delta.content or "" for c in chunks]
        assert "".join(pieces) == choice.message.content
        replaced = written.decode("utf-8", "replace")
        assert choice.message.content.replace("\ufffd", "") == replaced.replace("\ufffd", "")
