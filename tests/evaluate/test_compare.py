"""Two models on the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext.cli import main
from mistral_ext.evaluate.compare import compare
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.llm import DEMO_MODEL, Mistral

STORY = "Once upon a time there was a king who had three sons."
HELD_OUT = Path(__file__).parent.parent / "data" / "held_out.txt"
TEXT = HELD_OUT.read_text()[:2500]  # more than two pieces


@pytest.fixture(scope="module")
def int4() -> Mistral:
    return Mistral.from_pretrained(DEMO_MODEL, dtype=torch.float32, quantize="int4", progress=False)


def test_figures_are_those_of_the_logits(llm, int4):
    result = compare(llm, int4, [TEXT, STORY], progress=False)
    p, q, nlls = [], [], []
    for text in (TEXT, STORY):
        ids = llm.tokenizer.encode(text)
        for model, found in ((llm, p), (int4, q)):
            found.append(model.logits(ids[:-1]).double().log_softmax(1))
        nlls += [-x[-1][range(len(ids) - 1), ids[1:]] for x in (p, q)]
    p, q = torch.cat(p), torch.cat(q)
    assert len(p) > 2 * 256
    expected = (p.exp() * (p - q)).sum(1)
    torch.testing.assert_close(result.divergences, expected, rtol=1e-3, atol=1e-5)
    # Near ties may fall otherwise.
    agrees = p.argmax(1) == q.argmax(1)
    assert (result.agrees == agrees).double().mean() > 0.995
    assert 0.5 < result.agreement < 1
    assert result.quantile(0.5) < result.divergences.mean() < result.quantile(0.99)
    for model, value in zip((llm, int4), result.perplexities, strict=True):
        mine = perplexity(model, [TEXT, STORY], progress=False).value
        assert value == pytest.approx(mine, rel=1e-4)


def test_pieces_as_of_generated_tokens(llm, int4):
    ids = llm.tokenizer.encode(TEXT[:300])
    p, q = (each.logits(ids[:-1], chunk=8).double().log_softmax(1) for each in (llm, int4))
    result = compare(llm, int4, [TEXT[:300]], progress=False, chunk=8)
    expected = (p.exp() * (p - q)).sum(1)
    torch.testing.assert_close(result.divergences, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="chunk is 0, expected 1 or more"):
        compare(llm, int4, [STORY], chunk=0)


def test_a_model_is_no_way_from_itself(llm):
    result = compare(llm, llm, [STORY], progress=False)
    assert not result.divergences.any()
    assert result.agreement == 1
    assert result.nlls[0] == result.nlls[1]


def test_models_with_other_tokens_are_refused(llm, tmp_path):
    with pytest.raises(ValueError, match=r"texts\[0\] is empty"):
        compare(llm, llm, [""])
    with pytest.raises(ValueError, match="texts is empty"):
        compare(llm, llm, [])
    folder = tmp_path / "other"
    write_checkpoint(folder, vocab_size=32000)
    (folder / "tokenizer.model").write_bytes(TOKENIZERS["v1"].read_bytes())
    other = Mistral.from_pretrained(folder, dtype=torch.float32, progress=False)
    with pytest.raises(ValueError, match="expected models with the same tokenizer"):
        compare(llm, other, [STORY])


def test_the_command(tmp_path, capsys):
    text, png = tmp_path / "text.txt", tmp_path / "kl.png"
    text.write_text(STORY)
    given = [str(DEMO_MODEL), "--quantize-b", "int4", "--file", str(text)]
    assert main(["compare", *given, "--json", "--png", str(png)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["perplexity_a"] != shown["perplexity_b"]
    assert 0 < shown["kl_50%"] <= shown["kl_90%"] <= shown["kl_100%"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()].count("kl.png.part") == 0
    assert main(["compare", *given, "--json", "--chunk", "8"]) == 0
    by_eight = json.loads(capsys.readouterr().out)
    llm, int4 = (Mistral.from_pretrained(DEMO_MODEL, quantize=q) for q in (None, "int4"))
    result = compare(llm, int4, [STORY], progress=False, chunk=8)
    assert by_eight["kl_mean"] == pytest.approx(result.divergences.mean().item(), rel=1e-6)
    assert by_eight["kl_mean"] != shown["kl_mean"]
    assert main(["compare", *given, "--chunk", "0"]) == 1
    assert "--chunk is 0, expected 1 or more" in capsys.readouterr().err
    assert main(["compare", *given, "--png", str(tmp_path / "none" / "kl.png")]) == 1
    assert "expected a file in a folder that exists" in capsys.readouterr().err
