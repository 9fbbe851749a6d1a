"""How a server is set up: keys, origins, logs, options that make no sense."""

from __future__ import annotations

import json
import os
import stat
import subprocess

import httpx
import openai
import pytest
from servers import CLI, serving


def test_api_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("from-file\n\n another \n")
    variable = {**os.environ, "MISTRAL_EXT_API_KEY": "from-variable"}
    options = ("--api-key", "given", "--api-key-file", str(keys), "--cors-origin", "https://a.org")
    with serving(*options, env=variable) as server:
        for key in ("given", "from-file", "another", "from-variable"):
            assert server.client(api_key=key).models.list().data
        for key in ("give", "givenx", "x"):
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                server.client(api_key=key).models.list()
        for value in (b"given", b"Basic given", b"Bearer \xff", b"Bearer", b""):
            wrong = server.http.get("/v1/models", headers={b"authorization": value})
            assert wrong.status_code == 401
        for path in ("/v1/models", "/metrics", "/nothing"):
            response = httpx.get(server.url + path)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        assert server.http.get("/health").status_code == 200
        # A browser asks first, and has no key then.
        asks = {"origin": "https://a.org", "access-control-request-method": "POST"}
        assert server.http.options("/v1/completions", headers=asks).status_code == 200
        assert "given" not in "".join(server.lines)


def test_other_origins_are_let_in_only_if_asked_for(demo):
    asks = {"origin": "https://a.org", "access-control-request-method": "POST"}
    closed = demo.http.options("/v1/completions", headers=asks)
    assert "access-control-allow-origin" not in closed.headers
    with serving("--cors-origin", "https://a.org") as server:
        answer = server.http.options("/v1/completions", headers=asks)
        assert answer.headers["access-control-allow-origin"] == "https://a.org"
        asks["origin"] = "https://b.org"
        answer = server.http.options("/v1/completions", headers=asks)
        assert "access-control-allow-origin" not in answer.headers


def test_requests_are_written_only_if_asked_for(tmp_path):
    file = tmp_path / "requests.jsonl"
    with serving("--log-requests", str(file)) as server:
        texts = [
            server.chat("A secret \N{SNOWMAN}", max_tokens=3, n=2, stream=s) for s in (False, True)
        ]
        assert server.chat("A secret", n=0).status_code == 400
        assert server.stop() == 0
        assert "secret" not in "".join(server.lines)
    whole, stream, wrong = map(json.loads, file.read_text().splitlines())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert whole["request"]["messages"][0]["content"] == "A secret \N{SNOWMAN}"
    assert whole["texts"] == [c["message"]["content"] for c in texts[0].json()["choices"]]
    assert (whole["status"], whole["reason"]) == (200, "length,length")
    assert stream["completion_tokens"] == 6
    assert len(stream["texts"]) == 2
    assert wrong["status"] == 400


def test_a_name_that_is_not_utf_8():
    """The name of a model is that of its path, and such paths exist."""
    name = os.fsdecode(b"caf\xe9")
    with serving("--served-model-name", name) as server:
        whole = server.chat(max_tokens=2)
        stream = server.chat(max_tokens=2, stream=True)
        first, *_, end, _ = stream.text.split("\n\n")
        assert end == "data: [DONE]"
        assert json.loads(first.removeprefix("data: "))["model"] == whole.json()["model"] == name


def test_a_warning_where_everyone_may_come_in():
    with serving("--host", "0.0.0.0") as server:
        assert server.http.get("/health").is_success
        assert "anyone who can reach 0.0.0.0 may use it" in "".join(server.lines)
    with serving("--host", "0.0.0.0", "--api-key", "k") as server:
        server.http.get("/health")
        assert "anyone" not in "".join(server.lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "--port is 70000, expected 0 to 65535"),
        (["--drafts", "8"], "--drafts is 8, expected an integer from 0 to 7"),
        (["--max-queue", "-1"], "--max-queue is -1, expected an integer of 0 or more"),
        (["--max-batch", "0"], "--max-batch is 0"),
        (
            ["--moderate", "prompts"],
            "--moderate has 'prompts', expected input, output or",
        ),
        (["--ping-seconds", "0"], "--ping-seconds is 0.0, expected a number above 0"),
        (["--api-key-file", "/no/such/file"], "/no/such/file: No such file"),
        (["--log-requests", "/no/such/folder/x"], "/no/such/folder/x: No such file"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--draft-model", "/no/such/draft"], "/no/such/draft"),
    ],
)
def test_options_that_make_no_sense(options, words):
    done = subprocess.run([*CLI, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("mistral-ext: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_base_model_completes_but_cannot_chat():
    from mistral_ext.llm import DEMO_MODEL

    with serving("--model", str(DEMO_MODEL), "--served-model-name", "base") as server:
        response = server.chat(max_tokens=1)
        assert response.status_code == 400
        assert "base model" in response.json()["error"]["message"]
        assert server.post("/v1/completions", {"prompt": "Once", "model": "base"}).is_success
