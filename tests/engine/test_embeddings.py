"""Embeddings against transformers' hidden states."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext import Mistral, SamplingParams, Stream
from mistral_ext.engine.prefix_cache import common_length
from mistral_ext.evaluate.compare import compare
from mistral_ext.evaluate.likelihood import likelihoods
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

TEXTS = ["A short text", "A much longer text, " * 12 + "which has several pieces.", "Ein Text 🙂"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random model with a window, and transformers' model of the same weights."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    oracle = transformers.MistralModel.from_pretrained(folder, attn_implementation="eager")
    return Mistral.from_pretrained(folder, prefill_chunk=48), oracle


@torch.no_grad()
def expected(models, text: str, pooling: str) -> torch.Tensor:
    llm, oracle = models
    ids = llm.tokenizer.encode(text) + ([llm.tokenizer.eos_id] if pooling == "last" else [])
    (hidden,) = oracle(torch.tensor([ids])).last_hidden_state
    pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
    return pooled / pooled.norm()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_those_of_transformers(models, pooling):
    found = models[0].embed(TEXTS, pooling=pooling)
    assert found.dtype == torch.float32
    for text, row in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(row, expected(models, text, pooling), rtol=1e-4, atol=1e-5)
    assert found.requires_grad is False
    found += 1  # an ordinary tensor


def test_a_text_of_all_positions(models):
    """Nothing follows it, so it needs no room for a completion."""
    limits = {"sliding_window": None, "max_positions": 12}
    llm = Mistral.from_pretrained(models[0].folder, progress=False, **limits)
    ids = list(range(5, 17))
    torch.testing.assert_close(llm.embed([ids]), models[0].embed([ids]))
    with pytest.raises(ValueError, match=r"texts\[0\] has 13 tokens, expected up to 12"):
        llm.embed([[*ids, 5]])


def test_an_embedding_model(models, tmp_path):
    """As e5-mistral: without a head, and with names that do not begin with "model."."""
    llm, oracle = models
    oracle.save_pretrained(tmp_path)
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    own = Mistral.from_pretrained(tmp_path)
    torch.testing.assert_close(own.embed(TEXTS), llm.embed(TEXTS), rtol=1e-4, atol=1e-5)
    writers = [
        own.generate,
        own.moderate,
        lambda text: own.logits([1]),
        lambda text: perplexity(own, text),
        lambda text: list(likelihoods(own, [([1], [2])])),
        lambda text: compare(llm, own, [text]),
    ]
    for write in writers:
        with pytest.raises(ValueError, match=r"is an embedding model \(MistralModel\), which does"):
            write("a")
    with pytest.raises(ValueError, match="is an embedding model, expected a model that writes"):
        quantize_checkpoint(tmp_path, tmp_path / "quantised", 8)


def test_instructions(models):
    llm = models[0]
    asked = llm.embed("a", instruction="Find it")
    assert torch.equal(asked, llm.embed(["Instruct: Find it\nQuery: a"]))
    assert not torch.equal(asked, llm.embed("a"))
    ids = [*llm.tokenizer.encode("a"), llm.tokenizer.eos_id]
    assert torch.equal(llm.embed([ids]), llm.embed("a"))


def test_beside_completions(models):
    """One pass reads the prompts of both."""
    llm = models[0]
    request = llm.request(llm.tokenizer.encode(TEXTS[1]), SamplingParams(max_tokens=4))
    alone = Stream(llm.engine.outputs([request])).read().token_ids
    request = llm.request(llm.tokenizer.encode(TEXTS[0]), SamplingParams(max_tokens=4))
    other = Stream(llm.engine.outputs([request])).read().token_ids
    outputs = llm.engine.outputs(
        [
            llm.request(llm.tokenizer.encode(text), SamplingParams(max_tokens=4))
            for text in TEXTS[:2]
        ]
        + llm.embedding_requests(TEXTS)
    )
    tokens = {i: [] for i in outputs.request_ids}
    last = {}
    for output in outputs:
        tokens[output.request_id] += output.token_ids
        if output.hidden is not None:
            last[output.request_id] = output.hidden[-1]
    first, second, *others = outputs.request_ids
    assert (tokens[first], tokens[second]) == (other, alone)
    for text, request_id in zip(TEXTS, others, strict=True):
        pooled = last[request_id] / last[request_id].norm()
        torch.testing.assert_close(pooled, expected(models, text, "last"), rtol=1e-4, atol=1e-5)


def test_the_last_token_alone_is_asked_for(models):
    """So what texts have in common is read once."""
    llm, _ = models
    instruction = "Given a question, retrieve passages that answer it. " * 6
    alone = [llm.embed(text, instruction) for text in TEXTS]
    llm = Mistral(llm.config, llm.model, llm.tokenizer, llm.folder, prefill_chunk=48)
    read, pieces = llm.engine.runner.begin, []
    llm.engine.runner.begin = lambda given: pieces.extend(given) or read(given)
    assert torch.equal(llm.embed(TEXTS, instruction), torch.cat(alone))
    assert sum(piece.logits for piece in pieces) == len(TEXTS)
    prompts = [r.prompt_ids for r in llm.embedding_requests(TEXTS, instruction)]
    saved = sum(map(len, prompts)) - sum(len(piece.token_ids) for piece in pieces)
    common = min(common_length(prompts[0], other, 1000) for other in prompts[1:])
    assert saved >= 2 * (common - 32) > 64


def test_many_texts(models, monkeypatch):
    """The engine has a few of them at a time."""
    llm, _ = models
    add, waiting = llm.engine.add, []

    def count(*args):
        request_id = add(*args)
        waiting.append(len(llm.engine._sequences))
        return request_id

    monkeypatch.setattr(llm.engine, "add", count)
    texts = [f"Text {i}" for i in range(100)]
    found = llm.embed(texts)
    assert (len(waiting), max(waiting)) == (100, 64)
    assert not llm.engine.has_work
    torch.testing.assert_close(found[97:98], llm.embed(texts[97]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["a", ""], {}, r"texts\[1\] is empty, expected some text"),
        ([3], {}, r"texts\[0\] is 3, expected text or a list"),
        ("a", {"pooling": "max"}, "pooling is 'max', expected last or mean"),
    ],
)
def test_wrong_texts(models, texts, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        models[0].embed(texts, **options)
