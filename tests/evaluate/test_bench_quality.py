"""bench/quality.py and quality_peers.py: options, and the ways to round a model, side by side."""

from __future__ import annotations

import sys

import pytest
import quality
import quality_peers
import torch
import transformers
from gguf_files import write_model
from quality import compare
from quality_peers import OURS, made_here, measure_peers, of_file

from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder


@pytest.fixture(scope="module")
def exact():
    return load_weights(read_folder(DEMO_MODEL), torch.float32, progress=False)


def test_only_layers_are_rounded(exact):
    eight, four, steps = (made_here(exact, quantization) for quantization in OURS.values())
    # Rows of 256 take 4.25 bits in 4, others 4.5.
    assert (eight.bits, steps.bits) == (8.5, 4.25)
    assert 4.25 <= four.bits <= 4.5
    for name, weight in exact.items():
        error = (four.weights[name] - weight).norm() / weight.norm()
        is_rounded = name.startswith("layers.") and weight.dim() == 2
        assert 0.05 < error < 0.1 if is_rounded else error == 0


def test_layers_of_a_file(exact, tmp_path):
    """Matrices that are multiplied in blocks, that are decoded, and that are plain."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    types = {"attn_q.": "Q8_0", "ffn_up.": "Q5_0"}
    write_model(tmp_path / "model.gguf", model, types | {"token_embd": "Q8_0"})
    read = of_file(exact, tmp_path / "model.gguf")
    bits = {"attention.wq": 8.5, "feed_forward.w3": 5.5}
    matrices = [name for name, w in exact.items() if name.startswith("layers.") and w.dim() == 2]
    in_all = sum(
        exact[name].numel() * bits.get(name.split(".", 2)[2].removesuffix(".weight"), 32)
        for name in matrices
    )
    assert read.bits == pytest.approx(in_all / sum(exact[name].numel() for name in matrices))
    expected = model.model.layers[1].mlp.up_proj.weight  # rounded by write_model
    assert torch.equal(read.weights["layers.1.feed_forward.w3.weight"], expected)
    assert torch.equal(read.weights["tok_embeddings.weight"], exact["tok_embeddings.weight"])


def test_rows_of_a_model(exact, tmp_path, monkeypatch):
    monkeypatch.setattr(quality_peers, "available", lambda: [])
    ids = Tokenizer.from_folder(DEMO_MODEL).encode("Once upon a time there was a king who had")
    config = read_folder(DEMO_MODEL).config
    rows = measure_peers(DEMO_MODEL, config, ids, ids, tmp_path, compare, mixed=[5.2])
    mixed = ["mixed to 5.2", "mixed to 5.2, calibrated"]
    assert list(rows) == ["fp32", *OURS, "int4, calibrated", *mixed]
    assert rows["int4, calibrated"]["bits"] == rows["int4"]["bits"]
    assert 0 < rows["int8"]["kl"] < rows["int4"]["kl"] / 10
    # Another text calibrates worse than the text itself.
    assert 0 < rows["int4, calibrated"]["kl"] < rows["int4"]["kl"]
    for name, whole in zip(mixed, ("int4", "int4, calibrated"), strict=True):
        assert 5.1 < rows[name]["bits"] <= 5.2
        assert 0 < rows[name]["kl"] < 0.75 * rows[whole]["kl"]
    assert rows["int8"]["perplexity"] == pytest.approx(rows["fp32"]["perplexity"], rel=0.01)


def options(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["quality.py", *given])
    return quality.parse_options()


def test_parts_of_a_run(monkeypatch):
    assert options(monkeypatch).only == set(quality.PARTS)
    peers = ("--only", "peers")
    more = ("--calibrate", "8", "--mixed", "4.8,5")
    given = options(monkeypatch, "--model", "m", *peers, *peers, *more)
    assert (given.only, given.mixed) == ({"peers"}, [4.8, 5.0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--only peers", "--only peers needs --model"),
        ("--only ways --only peers", "--only peers needs --model"),
        ("--calibrate 8", "--calibrate needs --model, and the part peers"),
        ("--mixed 5", "--mixed needs --model, and the part peers"),
        ("--mixed 5 --model m --only ways", "--mixed needs --model, and the part peers"),
        ("--calibrate 8 --model m --only ways", "--calibrate needs --model, and the part peers"),
    ],
)
def test_options_that_would_be_ignored(monkeypatch, capsys, given, message):
    with pytest.raises(SystemExit):
        options(monkeypatch, *given.split())
    assert message in capsys.readouterr().err
