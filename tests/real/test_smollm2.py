"""A real instruct model, from its GGUF file: what it writes, and what transformers computes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import mistral_ext
from mistral_ext.evaluate.perplexity import perplexity

TEXT = (Path(__file__).parents[1] / "data/held_out.txt").read_text(encoding="utf-8")
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


# Transformers does not round activations, and this small model's choices are close.
pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.mark.parametrize(
    "prompt", ["The capital of France is", "Once upon a time", "def fibonacci(n):\n"]
)
def test_greedy_text_is_that_of_transformers(prompt, llm, oracle):
    ids = torch.tensor([llm.tokenizer.encode(prompt)])
    with torch.inference_mode():
        expected = oracle.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)
    (completion,) = llm.generate(prompt, max_tokens=24)
    assert completion.token_ids == expected[0, ids.shape[1] :].tolist()


def test_chat(llm):
    completion = llm.chat(CAPITAL, max_tokens=40)
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"


def test_the_template_is_the_files_own(llm):
    text = llm.tokenizer.decode(llm.encode_chat(CAPITAL))
    ids = llm.encode_chat(CAPITAL)
    assert text.endswith("user\nWhat is the capital of France?\nassistant\n")
    assert ids[0] == llm.tokenizer.control_ids["<|im_start|>"]
    assert ids.count(llm.tokenizer.control_ids["<|im_end|>"]) == 2


def test_a_stream_is_the_same_text(llm):
    prompt = "Once upon a time"
    (completion,) = llm.generate(prompt, max_tokens=20)
    pieces = list(llm.stream(prompt, max_tokens=20))
    assert "".join(pieces) == completion.text
    assert len(pieces) > 10


def test_stop(llm):
    completion = llm.chat(CAPITAL, max_tokens=40, stop=[" of France"])
    assert completion.text == "The capital"
    assert completion.finish_reason == "stop"


@pytest.mark.timeout(900)  # a minute of one core
def test_a_long_prompt(smollm2):
    """The model continues at the end of 4,160 tokens a passage from their beginning.

    The model has 8,192 positions, but from about 5,000 on it does not always copy. After 7,960
    tokens transformers chooses the same wrong tokens.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    llm = mistral_ext.Mistral.from_pretrained(smollm2, progress=False)
    ids = llm.tokenizer.encode(TEXT)
    passage, filler = ids[:100], ids[100:4100]
    (completion,) = llm.generate([[*passage, *filler, *passage[:60]]], max_tokens=12)
    assert completion.token_ids == passage[60:72]


def test_perplexity(llm, oracle):
    ids = llm.tokenizer.encode(TEXT)[:600]
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids])).logits[0, :-1]
    expected = cross_entropy(logits, torch.tensor(ids[1:])).item()
    result = perplexity(llm, [ids], progress=False)
    assert result.tokens == 599
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.value < 30
