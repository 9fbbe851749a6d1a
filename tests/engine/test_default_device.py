"""Another default device of torch, which is the caller's affair, changes nothing that is ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from chat_templates import MISTRAL_V1
from checkpoints import TOKENIZERS, write_checkpoint
from gguf_files import write_model

from mistral_ext import Mistral
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.ops import Quantized
from mistral_ext.weights.quantize import quantize
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

SAMPLING = {
    "max_tokens": 6,
    "temperature": 1.0,
    "seed": 3,
    "repetition_penalty": 1.2,
    "logit_bias": {7: 4.0, 9: -100.0},
    "logprobs": 2,
    "n": 2,
}


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(params=[default_device, lambda: torch.device("meta")], ids=["default", "with"])
def elsewhere(request):
    """A context in which tensors without a device would hold nothing."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, vocab_size=32000, intermediate_size=256)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": MISTRAL_V1}))
    return folder


def answers(llm: Mistral) -> dict:
    """What every public function says."""
    completions = llm.generate(["Once", [1, 5, 9]], **SAMPLING)
    chat = llm.start_chat()
    return {
        "generate": [(c.token_ids, c.text, c.logprobs) for c in completions],
        "greedy": llm.generate("Once", max_tokens=20, ignore_eos=True)[0].text,
        "stream": list(llm.stream("Once", max_tokens=6)),
        "chat": llm.chat([{"role": "user", "content": "Hi"}], max_tokens=4).text,
        "start_chat": ["".join(chat.send(text, max_tokens=4)) for text in ("Hi", "And?")],
        "logits": llm.logits(range(20)).tolist(),
        "perplexity": perplexity(llm, "Once upon a time there was").value,
    }


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_model(folder, elsewhere, quantize):
    expected = answers(Mistral.from_pretrained(folder, quantize=quantize))
    with elsewhere():
        llm = Mistral.from_pretrained(folder, quantize=quantize)
        assert answers(llm) == expected
    assert answers(llm) == expected


@pytest.mark.parametrize("type_name", ["Q4_0", "Q6_K"])
def test_a_gguf_file(elsewhere, tmp_path, type_name):
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    model = write_checkpoint(tmp_path / "hf", sliding_window=None, **sizes)
    file = tmp_path / "model.gguf"
    write_model(file, model, {"norm": "F32", "": type_name})
    expected = Mistral.from_pretrained(file).logits([1, 5, 9]).tolist()
    with elsewhere():
        assert Mistral.from_pretrained(file).logits([1, 5, 9]).tolist() == expected


def test_old_checkpoints(folder, elsewhere, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    expected = Mistral.from_pretrained(folder).logits([1, 5, 9]).tolist()
    with elsewhere():
        assert Mistral.from_pretrained(tmp_path / "old").logits([1, 5, 9]).tolist() == expected


def test_a_quantised_folder(folder, elsewhere, tmp_path):
    quantize_checkpoint(folder, tmp_path / "a", 4, 32)
    with elsewhere():
        quantize_checkpoint(folder, tmp_path / "b", 4, 32)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_a_quantised_weight(elsewhere, generator):
    weight = torch.randn(3, 64, generator=generator)
    for form in ("int8", "q8_0", "int4", "iq4_nl"):
        expected = quantize(weight, form)
        with elsewhere():
            quantized = quantize(weight, form)
            assert isinstance(quantized, Quantized)
            assert torch.equal(quantized.dequantize(), expected.dequantize())
