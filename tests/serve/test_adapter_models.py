"""Adapters as models of the server: chosen by name, loaded and removed while it runs."""

from __future__ import annotations

import asyncio
import shutil
import threading

import openai
import pytest
import torch
from adapters import write_peft
from checkpoints import TOKENIZERS, write_checkpoint
from servers import serving

from mistral_ext import Mistral
from mistral_ext.serve.engine_thread import EngineThread
from mistral_ext.serve.errors import ApiError
from mistral_ext.serve.generation import Generation
from mistral_ext.serve.log import RequestLog
from mistral_ext.serve.metrics import Metrics
from mistral_ext.serve.protocol import (
    completion_job,
    embedding_requests,
    moderation_requests,
    requests_of,
)
from mistral_ext.serve.service import Service
from mistral_ext.serve.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Instruct model, and two adapters in the folders a and b."""
    root = tmp_path_factory.mktemp("models")
    folder = root / "tiny-Instruct"
    sizes = {"vocab_size": 32768, "hidden_size": 64, "sliding_window": None}
    write_checkpoint(folder, **sizes)
    shutil.copy(TOKENIZERS["v3"], folder / "tokenizer.model.v3")
    for name in "ab":
        write_peft(write_checkpoint(root / "base", **sizes), folder / name, seed=ord(name))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    args = ["--model", str(folder), "--served-model-name", "tiny", "--adapter-updates"]
    with serving(*args, "--adapter", f"a={folder / 'a'}") as server:
        yield server


@pytest.fixture(scope="module")
def expected(folder):
    """What the library writes for each model."""
    given = {name: folder / name for name in "ab"}
    llm = Mistral.from_pretrained(folder, adapters=given)
    options = {"max_tokens": 12, "ignore_eos": True}
    chats = {
        model: llm.chat([{"role": "user", "content": "Hi"}], adapter=name, **options).text
        for model, name in (("tiny", None), ("a", "a"), ("b", "b"))
    }
    assert len(set(chats.values())) == 3
    return chats


def said(server, model):
    reply = server.chat("Hi", model=model, max_tokens=12, temperature=0, ignore_eos=True)
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == (model or "tiny")
    return reply.json()["choices"][0]["message"]["content"]


def update(server, verb, **fields):
    return server.post(f"/v1/{verb}_lora_adapter", fields)


def test_adapters_are_models(server):
    client = server.client()
    assert [(m.id, m.parent) for m in client.models.list().data] == [("tiny", None), ("a", "tiny")]
    assert client.models.retrieve("a").parent == "tiny"
    with pytest.raises(openai.NotFoundError, match="expected 'tiny' or 'a'"):
        client.models.retrieve("b")


def test_a_request_chooses_by_model(server, expected):
    assert said(server, "a") == expected["a"]
    assert said(server, "tiny") == expected["tiny"]
    assert said(server, None) == expected["tiny"]
    assert server.chat("Hi", model="b").json()["error"]["code"] == "model_not_found"


def test_a_text_is_read_with_the_adapter(server, folder):
    llm = Mistral.from_pretrained(folder, adapters={"a": folder / "a"})
    for model, name in (("tiny", None), ("a", "a")):
        reply = server.post("/v1/embeddings", {"model": model, "input": "Hi"}).json()
        assert reply["model"] == model
        found = torch.tensor(reply["data"][0]["embedding"])
        torch.testing.assert_close(found, llm.embed("Hi", adapter=name)[0], rtol=1e-3, atol=1e-4)
        reply = server.post("/v1/moderations", {"model": model, "input": "Hi"}).json()
        assert reply["model"] == model
        expected = pytest.approx(dict(llm.moderate("Hi", adapter=name).scores), rel=1e-3)
        assert reply["results"][0]["category_scores"] == expected


def test_a_stream_and_a_completion_choose_too(server, expected):
    client = server.client()
    chunks = client.chat.completions.create(
        model="a",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=12,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = [(chunk.model, chunk.choices[0].delta.content or "") for chunk in chunks]
    assert {model for model, _ in pieces} == {"a"}
    assert "".join(text for _, text in pieces) == expected["a"]
    texts = {
        client.completions.create(model=model, prompt="Hi", temperature=0).choices[0].text
        for model in ("tiny", "a")
    }
    assert len(texts) == 2


def test_tokens_are_those_of_the_model(server):
    tiny, a = (server.post("/tokenize", {"model": m, "prompt": "Hi"}).json() for m in ("tiny", "a"))
    assert tiny == a


def test_load_and_unload_while_it_runs(server, folder, expected):
    loaded = update(server, "load", lora_name="b", lora_path=str(folder / "b"))
    assert (loaded.status_code, loaded.json()) == (200, {"models": ["tiny", "a", "b"]})
    assert said(server, "b") == expected["b"]
    assert said(server, "a") == expected["a"]
    again = update(server, "load", lora_name="b", lora_path=str(folder / "b"))
    assert again.status_code == 400
    assert "adapter 'b' is loaded already" in again.json()["error"]["message"]
    removed = update(server, "unload", lora_name="b")
    assert removed.json() == {"models": ["tiny", "a"]}
    for reply, verb in ((loaded, "load"), (again, "load"), (removed, "unload")):
        line = server.next_line(0, reply.headers["x-request-id"])
        assert f" /v1/{verb}_lora_adapter {reply.status_code} " in line
    assert server.chat("Hi", model="b").status_code == 404
    assert said(server, "a") == expected["a"]


@pytest.mark.parametrize("kind", ["completion", "embedding", "moderation"])
def test_an_adapter_that_is_removed_meanwhile_is_no_model_any_more(folder, kind):
    """After the name was looked up, and before the request reaches the engine."""
    llm = Mistral.from_pretrained(folder)
    make = {
        "completion": lambda: requests_of(completion_job({"prompt": "Hi"}), [[1]], llm, "gone"),
        "embedding": lambda: embedding_requests(llm, ["Hi"], None, "last", None, "gone"),
        "moderation": lambda: moderation_requests(llm, None, ["Hi"], "input", None, adapter="gone"),
    }
    with pytest.raises(ApiError, match="the model was removed: adapter is 'gone'") as error:
        make[kind]()
    expect_no_model(error.value)


def test_an_adapter_that_is_removed_before_its_request_starts_is_no_model_any_more(folder):
    """Requests wait for those before them: see `Call.read_prompts`."""
    llm = Mistral.from_pretrained(folder, adapters={"a": folder / "a"})
    requests = embedding_requests(llm, ["Hi"], None, "last", None, "a")
    llm.unload_adapter("a")

    async def start():
        engine = EngineThread(llm.engine, llm.model.device, lambda: None)
        metrics = Metrics(lambda: llm.engine.load)
        Generation(engine, requests, 0.0, metrics, None, lambda: None).start()

    with pytest.raises(ApiError, match="the model was removed: adapter 'a' was removed") as error:
        asyncio.run(start())
    expect_no_model(error.value)


def expect_no_model(error):
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


def test_requests_do_not_wait_for_an_adapter(folder, monkeypatch):
    """Its files may come over a network."""
    llm, has_come = Mistral.from_pretrained(folder), threading.Event()
    monkeypatch.setattr(llm, "load_adapter", lambda path, name: has_come.wait(60))

    async def load() -> None:
        service = Service(llm, Settings("tiny"), RequestLog(None))
        service.start()
        loading = asyncio.create_task(service.load_adapter("a", "a"))
        await asyncio.sleep(0.05)
        try:
            assert await asyncio.wait_for(service.encode("Hi", is_chat=False), 20)
            assert not loading.done()
        finally:
            has_come.set()
            await loading
            service.stop()

    asyncio.run(load())


@pytest.mark.parametrize(
    ("verb", "fields", "status", "message"),
    [
        ("load", {"lora_name": "tiny", "lora_path": "x"}, 400, "which is the model's name"),
        ("load", {"lora_name": "c", "lora_path": "./no/such"}, 400, "no adapter in 'no/such'"),
        ("load", {"lora_name": "c"}, 400, "lora_path"),
        ("unload", {"lora_name": "c"}, 404, "adapter is 'c', expected one of a"),
        ("unload", {"lora_name": "tiny"}, 404, "adapter is 'tiny'"),
        ("unload", {"lora_name": "a", "extra": 1}, 400, "extra"),
    ],
)
def test_wrong_updates(server, verb, fields, status, message):
    reply = update(server, verb, **fields)
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]
    assert [model.id for model in server.client().models.list().data] == ["tiny", "a"]


def test_updates_are_described(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} <= paths.keys()


def test_updates_have_to_be_permitted(demo):
    assert update(demo, "load", lora_name="a", lora_path="x").status_code == 404
    assert "/v1/load_lora_adapter" not in demo.http.get("/openapi.json").json()["paths"]
