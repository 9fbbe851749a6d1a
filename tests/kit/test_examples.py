"""The examples do what they say, on the demo model."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import reference
import torch
from chat_templates import MISTRAL_V1
from checkpoints import TOKENIZERS, write_checkpoint

import mistral_ext
from mistral_ext.llm import DEMO_MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"
ONCE = "Once upon a time"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as `python examples/NAME.py ARGUMENTS`: what it printed, its variables."""

    def run_example(name: str, *arguments: str) -> tuple[str, dict]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        variables = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, variables

    return run_example


def test_all_are_run_and_short():
    examples = {file.stem: file.read_text() for file in EXAMPLES.glob("*.py")}
    assert len(examples) >= 8
    tests = Path(__file__).read_text()
    for name, source in examples.items():
        assert f'run("{name}"' in tests
        assert 10 <= source.count("\n") <= 35, name


def test_generate(run):
    assert run("generate")[0] == ONCE + mistral_ext.generate(ONCE, max_tokens=60) + "\n"
    assert run("generate", "The wolf", str(DEMO_MODEL))[0].startswith("The wolf")


def test_stream(run):
    out, variables = run("stream")
    text, count = re.fullmatch(r"(.*)\n\[(\d+) tokens, \d+ a second\]\n", out, re.DOTALL).groups()
    assert text == variables["completion"].text
    assert int(count) == len(variables["completion"].token_ids)


def test_batch(run):
    out, variables = run("batch")
    assert len(variables["completions"]) == 6
    assert out.count(ONCE) >= 2
    assert len(re.findall(r"\[(stop|length)\]\n\n", out)) == 6


def test_chat(run, tmp_path):
    folder = tmp_path / "random-instruct"
    write_checkpoint(folder, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": MISTRAL_V1}))
    out, variables = run("chat", str(folder), "Hello", "And then?")
    assert [m["role"] for m in variables["conversation"].messages] == ["user", "assistant"] * 2
    assert out.startswith("> Hello\n")
    assert "\n> And then?\n" in out


def test_logits(run):
    out, variables = run("logits")
    (completion,) = variables["llm"].generate(variables["ids"], max_tokens=1, logprobs=0)
    assert variables["tokens"][0] == completion.token_ids[0]
    expected = torch.tensor(completion.logprobs[0].logprob).exp()
    torch.testing.assert_close(variables["probabilities"][0], expected.float())
    assert re.fullmatch(r"( *[\d.]+%  ['\"].*['\"]\n){5}", out)


def test_perplexity(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The king's daughter went into the wood. " * 5)
    out, variables = run("perplexity", str(text))
    assert out.startswith(f"perplexity {variables['result'].value:.3f} over ")
    assert run("perplexity", str(text), str(DEMO_MODEL))[0] == out


def test_ops_in_your_model(run):
    _, given = run("ops_in_your_model")
    x = given["tokens"]
    normed = reference.rms_norm(x, given["norm"], 1e-5)
    q, k, v = ((normed @ given[w].T).unflatten(1, (-1, given["D"])) for w in ("wq", "wk", "wv"))
    q, k = (reference.rotate(a, torch.arange(len(x)), given["turns"]) for a in (q, k))
    h = x + reference.attention(q, k, v, given["WINDOW"]).flatten(1) @ given["wo"].T
    normed = reference.rms_norm(h, given["norm"], 1e-5)
    h = h + reference.swiglu(normed @ given["gate"].T, normed @ given["up"].T) @ given["down"].T
    torch.testing.assert_close(given["h"], h[-1:], rtol=1e-4, atol=1e-4)


def test_transformers_attention(run):
    out, variables = run("transformers_attention")
    assert out.startswith("[42 modules of MistralForCausalLM run on mistral_ext]\n" + ONCE)
    # Each token is sdpa's choice too, or as good as that in bfloat16.
    model, batch, out = variables["model"], variables["batch"], variables["out"]
    model.set_attn_implementation("sdpa")
    padding = torch.nn.functional.pad(batch["attention_mask"], (0, 30), value=1)
    with torch.no_grad():
        logits = model(out[:, :-1], attention_mask=padding[:, :-1]).logits[:, -30:].float()
    chosen = logits.gather(2, out[:, -30:, None]).squeeze(2)
    assert (logits.amax(2) - chosen <= 0.25).all()


def test_quantize_and_load(run, tmp_path):
    out, _ = run("quantize_and_load", str(tmp_path / "int4"))
    sizes = [float(size) for size in re.findall(r"^([\d.]+) MB: ", out, re.MULTILINE)]
    assert len(sizes) == 2
    assert sizes[1] < sizes[0] / 2
    assert len(re.findall(r"MB: ['\"].{20}", out)) == 2
