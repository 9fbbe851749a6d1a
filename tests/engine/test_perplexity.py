"""mistral_ext.evaluate.perplexity: against transformers, for every way of cutting texts; and the
quality of quantised weights, which it measures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext import Mistral
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.llm import DEMO_MODEL

HELD_OUT = (Path(__file__).parents[1] / "data" / "held_out.txt").read_text()
TEXTS = [HELD_OUT[:3000], HELD_OUT[30000:30500], HELD_OUT[40000:40010]]


@pytest.fixture(scope="module")
def demo():
    return Mistral.from_pretrained(DEMO_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs():
    return transformers.MistralForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, attn_implementation="eager"
    )


@torch.inference_mode()
def nll_of_each(model, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


@pytest.fixture(scope="module")
def expected(demo, theirs):
    """The negative log-likelihoods of the tokens of each of TEXTS."""
    return [nll_of_each(theirs, demo.tokenizer.encode(text)) for text in TEXTS]


@pytest.mark.parametrize("chunk", [1, 64, 100, 512, 5000])
def test_a_text_far_past_the_window(expected, chunk):
    demo = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.float32, prefill_chunk=chunk)
    text, nll = TEXTS[0], expected[0]
    result = perplexity(demo, text)
    assert result.tokens == len(nll) > 2 * demo.config.sliding_window
    assert result.segments == 1
    assert result.nll == pytest.approx(nll.mean().item(), rel=1e-6)
    assert result.value == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert result.rate == pytest.approx(result.tokens / result.seconds)


@pytest.mark.parametrize("chunk", [3, 64, 512])
def test_texts_together_are_each_alone(expected, chunk):
    demo = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.float32, prefill_chunk=chunk)
    result = perplexity(demo, TEXTS)
    assert result.segments == 3
    assert result.tokens == sum(map(len, expected))
    assert result.nll == pytest.approx(torch.cat(expected).mean().item(), rel=1e-6)


def test_short_texts_share_a_pass(monkeypatch):
    demo = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.float32, prefill_chunk=100)
    step, sizes = demo.model.step, []

    def counted(ids, table, *args, **options):
        sizes.append((len(ids), len(table)))
        return step(ids, table, *args, **options)

    monkeypatch.setattr(demo.model, "step", counted)
    texts = [[5 + i] * (20 + i % 3) for i in range(24)]
    together = perplexity(demo, texts)
    assert sizes == [(sum(20 + i % 3 for i in range(n, n + 4)), 4) for n in range(0, 24, 4)]
    alone = [perplexity(demo, [text]) for text in texts]
    mean = sum(one.nll * one.tokens for one in alone) / together.tokens
    assert together.nll == pytest.approx(mean, rel=1e-6)


def test_first_tokens_only(demo, expected):
    result = perplexity(demo, TEXTS[:2], max_tokens=90)
    assert result.tokens == 180
    mean = torch.cat([nll[:90] for nll in expected[:2]]).mean().item()
    assert result.nll == pytest.approx(mean, rel=1e-6)


def test_segments_without_a_window(tmp_path):
    """All positions that the model knows are used, and no token is left out."""
    theirs = write_checkpoint(tmp_path, sliding_window=None, max_position_embeddings=40)
    llm = Mistral.from_pretrained(tmp_path)
    ids = torch.randint(3, 131, (95,), generator=torch.Generator().manual_seed(0)).tolist()
    pieces = [ids[:40], ids[40:80], ids[80:]]
    nll = torch.cat([nll_of_each(theirs, [1, *piece]) for piece in pieces])
    result = perplexity(llm, [ids])
    assert result.tokens == 95
    assert result.segments == 3
    assert result.nll == pytest.approx(nll.mean().item(), rel=1e-6)


@pytest.mark.parametrize("length", [79, 80, 81, 82])
def test_segments_without_a_first_token(tmp_path, length):
    """A last segment of one token has nothing to predict."""
    sizes = {"vocab_size": 32000, "max_position_embeddings": 40}
    theirs = write_checkpoint(tmp_path, sliding_window=None, **sizes)
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    llm = Mistral.from_pretrained(tmp_path)
    llm.tokenizer.adds_bos = False
    ids = torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    pieces = [ids[i : i + 40] for i in range(0, length, 40)]
    nll = torch.cat([nll_of_each(theirs, piece) for piece in pieces if len(piece) > 1])
    result = perplexity(llm, [ids])
    assert result.tokens == len(nll)
    assert result.segments == 2 + (length > 81)
    assert result.nll == pytest.approx(nll.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("", {}, ValueError, r"texts\[0\] is empty"),
        (["x", []], {}, ValueError, r"texts\[1\] is empty"),
        ([], {}, ValueError, "texts is empty"),
        ([b"Once"], {}, TypeError, r"texts\[0\] is b'Once', expected text or a list of token ids"),
        ([[True]], {}, TypeError, r"texts\[0\] is \[True\], expected text or a list of token ids"),
        ([[5, 2048]], {}, ValueError, r"texts\[0\] has token id 2048, expected 0 to 2047"),
        ("x", {"max_tokens": 0}, ValueError, "max_tokens is 0"),
        ("\ud800", {}, ValueError, "valid Unicode"),
    ],
)
def test_bad_arguments_are_named(demo, texts, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(demo, texts, **options)


def test_text_without_a_tokenizer(tmp_path):
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        perplexity(Mistral.from_pretrained(tmp_path), "text")


@pytest.mark.parametrize(("quantize", "allowed"), [("int8", 0.005), ("int4", 0.05)])
def test_quality_of_quantised_weights(quantize, allowed):
    """On text that the demo model has never seen. A small model suffers more than a large one."""
    stored = perplexity(Mistral.from_pretrained(DEMO_MODEL), HELD_OUT)
    rounded = perplexity(Mistral.from_pretrained(DEMO_MODEL, quantize=quantize), HELD_OUT)
    assert stored.tokens == rounded.tokens > 18000
    assert rounded.value <= stored.value * (1 + allowed)
