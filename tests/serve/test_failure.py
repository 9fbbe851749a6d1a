"""The model or the engine fails. The numbers are those of complaints about other servers."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import serving

COMMAND = (sys.executable, str(Path(__file__).parent / "faulty_server.py"))


@pytest.fixture(scope="module")
def faulty():
    with serving("--ping-seconds", "0.1", command=COMMAND) as server:
        yield server


def ask(server, prompt: str, **fields):
    return server.post("/v1/completions", {"prompt": prompt, "max_tokens": 8, **fields})


@pytest.mark.parametrize("n", [1, 3])
def test_7_a_failed_pass_costs_its_requests(faulty, n):
    good = ask(faulty, "Once upon a time", temperature=0).json()["choices"]
    response = ask(faulty, "FAIL", n=n)
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["message"] == "the model failed: a planted fault"
    assert ask(faulty, "Once upon a time", temperature=0).json()["choices"] == good
    assert faulty.http.get("/health").status_code == 200
    faulty.wait_for_load(0)


def test_7_a_failure_in_the_middle_of_a_stream_is_its_last_event(faulty):
    response = ask(faulty, "FAIL LATER", stream=True, ignore_eos=True)  # so that it comes to that
    assert response.status_code == 200
    *_, error, end, nothing = response.text.split("\n\n")
    assert error.startswith('data: {"error": {"message": "the model failed')
    assert (end, nothing) == ("data: [DONE]", "")
    faulty.wait_for_load(0)


@pytest.mark.parametrize("word", ["BREAK STEP", "BREAK DEVICE"])
def test_7_beyond_repair_is_said_at_once(word):
    with serving(command=COMMAND) as server:
        others = []
        waits = threading.Thread(
            target=lambda: others.append(server.chat(max_tokens=20000, ignore_eos=True))
        )
        waits.start()
        server.wait_for_load(1)
        assert ask(server, word).status_code in (500, 503)
        waits.join()
        assert others[0].status_code in (500, 503)
        response = server.http.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": "failed"})
        refused = ask(server, "Once upon a time")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_dead"
        assert server.stop() == 0


def test_8_a_batch_of_all_kinds_of_requests(demo):
    kinds = [
        {"temperature": 0},
        {"temperature": 1, "seed": 1},
        {"temperature": 1, "seed": 2, "presence_penalty": 1, "frequency_penalty": 1},
        {"temperature": 0, "logit_bias": {"300": 5, "301": -100}},
        {"temperature": 0.7, "seed": 3, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
        {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 3},
    ]

    def text(kind) -> str:
        return ask(demo, "The old king", **{"max_tokens": 40, **kind}).json()["choices"][0]["text"]

    alone = [text(kind) for kind in kinds]
    assert len({*alone}) == len(kinds)
    together = [""] * len(kinds)

    def run(i: int) -> None:
        together[i] = text(kinds[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_9_options_of_one_request_do_not_leak_into_the_next():
    with serving("--max-batch", "1") as server:
        plain = ask(server, "The old king", temperature=0).json()["choices"]
        biased = {"logit_bias": {"300": 100}, "presence_penalty": 2, "repetition_penalty": 2}
        for _ in range(2):
            assert ask(server, "The old king", temperature=0, **biased).json()["choices"] != plain
            assert ask(server, "The old king", temperature=0).json()["choices"] == plain


@pytest.fixture(scope="module")
def damaged(tiny_folder, tmp_path_factory):
    """A server of a model whose hidden states are infinite, and whose logits are NaN."""
    folder = tmp_path_factory.mktemp("damaged") / "damaged-Instruct"
    shutil.copytree(tiny_folder, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(torch.inf)
    save_file(tensors, file)
    with serving("--model", str(folder), "--moderate", "input") as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("embeddings", {"input": "a"}),
        ("moderations", {"input": "a"}),
        ("completions", {"prompt": "a"}),
        ("completions", {"prompt": "a", "stream": True}),
    ],
)
def test_a_damaged_model_judges_and_embeds_nothing(damaged, path, body):
    response = damaged.post(f"/v1/{path}", body)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"
    assert "NaN" in response.json()["error"]["message"]
