"""What is around completions: the model, tokens, health, figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import openai
import pytest

from mistral_ext.engine.engine import Load
from mistral_ext.engine.request import Completion, Timing
from mistral_ext.serve.metrics import Metrics


def test_models(demo):
    client = demo.client()
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert model.max_model_len == 32768
    assert client.models.retrieve("demo") == model
    with pytest.raises(openai.NotFoundError, match="expected 'demo'"):
        client.models.retrieve("other/model")


def test_another_model_is_not_found(demo):
    reply = demo.chat(model="gpt-x")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"


def test_tokenize_and_back(demo):
    text = "Once upon a time, \N{SNOWMAN}"
    found = demo.post("/tokenize", {"prompt": text}).json()
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 32768
    bare = demo.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == found["tokens"][1:]
    assert demo.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}


def test_tokens_of_a_conversation_are_those_that_are_read(tiny):
    messages = [{"role": "user", "content": "Hello"}]
    count = tiny.post("/tokenize", {"messages": messages}).json()["count"]
    usage = tiny.chat("Hello", max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == count


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}),
        ("/tokenize", {"prompt": 3}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [2048]}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_wrong_tokens(demo, path, body):
    assert demo.post(path, body).status_code == 400


def test_health(demo):
    response = demo.http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)],
)
def test_no_such_thing(demo, method, path, status):
    response = httpx.request(method, demo.url + path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert path in error["message"]


def test_metrics_count_what_happens(demo):
    names = "generation_tokens_total", "prompt_tokens_total", "request_success_total"
    names += "time_to_first_token_seconds_count", "inter_token_latency_seconds_count"
    names += "e2e_request_latency_seconds_count", "request_queue_time_seconds_count"
    before = [demo.metric(name) for name in names]
    usage = demo.chat(max_tokens=10, n=2, ignore_eos=True).json()["usage"]
    added = [demo.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert added == [20, 2 * usage["prompt_tokens"], 2, 2, 18, 2, 2]
    wrong = demo.metric("http_requests_total", status="400")
    demo.chat(n=0)
    assert demo.metric("http_requests_total", status="400") == wrong + 1
    assert demo.load == (0, 0)
    assert demo.metric("kv_cache_usage_perc") == 0


def test_drafts_are_counted():
    timing = Timing(4, 0.1, 9, 0.1, drafted_tokens=7, accepted_tokens=5)
    metrics = Metrics(lambda: Load(running=0, waiting=0, preemptions=0, cache_share=0.0))
    metrics.ended(Completion("text", [1] * 10, "stop", None, timing), 4, 0.2)
    shown = metrics.render()[0].decode()
    assert "\nmistral_ext_spec_decode_num_draft_tokens_total 7.0\n" in shown
    assert "\nmistral_ext_spec_decode_num_accepted_tokens_total 5.0\n" in shown


def test_each_request_has_a_line_without_its_text(demo):
    reply = demo.chat("Once upon a secret time", max_tokens=5, ignore_eos=True)
    line = demo.next_line(0, reply.json()["id"])
    assert "/v1/chat/completions 200 length" in line
    assert "completion=5" in line
    wrong = demo.chat(messages=[], max_tokens=5)
    assert "400 invalid" in demo.next_line(0, wrong.headers["x-request-id"])
    assert "secret" not in "".join(demo.lines)


def test_the_dashboard_asks_for_figures_that_there_are(demo):
    dashboard = json.loads((Path(__file__).parents[2] / "examples/grafana.json").read_text())
    demo.chat(max_tokens=2)
    demo.chat(n=0)
    shown = demo.http.get("/metrics").text
    there_are = {*re.findall(r"^# TYPE (\S+)", shown, re.M), *re.findall(r"^(\w+)", shown, re.M)}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"mistral_ext_\w+", query)}
    assert len(asked) > 10
    # No request has been broken off yet, perhaps: then this figure has no sample.
    assert asked - there_are <= {"mistral_ext_request_aborts_total"}
