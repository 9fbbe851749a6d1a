"""Embeddings, by OpenAI's client."""

from __future__ import annotations

import shutil

import pytest
import torch

from mistral_ext.llm import DEMO_MODEL, Mistral

TEXTS = ["Once upon a time", "The king's daughter, and the wolf"]


@pytest.fixture(scope="module")
def llm():
    return Mistral.from_pretrained(DEMO_MODEL)


def rows(answer) -> torch.Tensor:
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return torch.tensor([entry.embedding for entry in answer.data])


@pytest.mark.parametrize("kind", ["float", "base64"])
def test_they_are_those_of_python(demo, llm, kind):
    create = demo.client().embeddings.create
    answer = create(model="demo", input=TEXTS, encoding_format=kind)
    if kind == "base64":  # which the client decodes only if it has asked for it by itself
        answer = create(model="demo", input=TEXTS)
    torch.testing.assert_close(rows(answer), llm.embed(TEXTS), rtol=1e-4, atol=1e-5)
    count = sum(len(llm.tokenizer.encode(text)) + 1 for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)
    assert answer.model == "demo"
    assert " 200 stop prompt=" in demo.next_line(0, "/v1/embeddings")


def test_options(demo, llm):
    create = demo.client().embeddings.create
    short = rows(create(model="demo", input=TEXTS[0], dimensions=8))
    expected = llm.embed(TEXTS[0])[:, :8]
    torch.testing.assert_close(short, expected / expected.norm(), rtol=1e-4, atol=1e-5)
    for options in ({"pooling": "mean"}, {"instruction": "Find tales"}):
        found = rows(create(model="demo", input=TEXTS, extra_body=options))
        torch.testing.assert_close(found, llm.embed(TEXTS, **options), rtol=1e-4, atol=1e-5)
    ids = llm.tokenizer.encode(TEXTS[0])
    found = rows(create(model="demo", input=[[float(i) for i in ids]]))  # integers of JSON, too
    torch.testing.assert_close(found, llm.embed([ids]), rtol=1e-4, atol=1e-5)


def test_more_inputs_than_the_queue_has_places(demo, llm):
    texts = [f"The king has {i} towers" for i in range(100)]
    found = rows(demo.client().embeddings.create(model="demo", input=texts))
    # In bf16 a text rounds as the number of tokens in its pass has it.
    similarities = (found * llm.embed(texts)).sum(dim=1)
    torch.testing.assert_close(similarities, torch.ones(100), rtol=0, atol=1e-4)
    assert (found[0] @ found[1:].T).max() < 0.9999


def test_a_model_that_writes_no_text_says_so(tiny_folder, tmp_path):
    import transformers
    from servers import serving

    transformers.MistralModel.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    shutil.copy(f"{tiny_folder}/tokenizer.model.v3", tmp_path)
    with serving("--model", str(tmp_path), "--served-model-name", "e5") as server:
        asked = {"completions": {"prompt": "a"}, "moderations": {"input": "a"}}
        asked["chat/completions"] = {"messages": [{"role": "user", "content": "a"}]}
        for path, fields in asked.items():
            error = server.post(f"/v1/{path}", fields).json()["error"]
            assert "'e5' is an embedding model" in error["message"]
            assert "use /v1/embeddings" in error["message"]
        assert server.post("/v1/embeddings", {"input": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": ""}, "input is"),
        ({"input": [1, 2048]}, "2048"),
        ({"input": ["a"] * 2049}, "input is"),
        ({"input": "a", "dimensions": 10**6}, "dimensions is 1000000, expected at most"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format is"),
        ({"input": [5] * 40000}, "32768"),
    ],
)
def test_wrong_fields(demo, fields, words):
    response = demo.post("/v1/embeddings", fields)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
