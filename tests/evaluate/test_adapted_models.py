"""What reads texts reads them with an adapter, too: the result is that of the merged model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapters import write_peft
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext import Mistral
from mistral_ext.cli import main
from mistral_ext.evaluate import humaneval, moderation
from mistral_ext.evaluate.compare import compare
from mistral_ext.evaluate.harness import harness_model
from mistral_ext.evaluate.likelihood import likelihoods
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.weights.merge import merge_adapter

TEXT = "Once upon a time there was a king who had three sons."
PROBLEM = humaneval.Problem("test/0", "def f():\n", "f", "def check(f): pass")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random Instruct model, and the same merged with its adapter, which is in `adapter`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-Instruct"
    model = write_checkpoint(folder, vocab_size=32768, hidden_size=64)
    shutil.copy(TOKENIZERS["v3"], folder / "tokenizer.model.v3")
    write_peft(model, folder / "adapter")
    return folder, merge_adapter(folder, folder / "adapter", folder.with_name("merged-Instruct"))


@pytest.fixture(scope="module")
def models(folders):
    """The model with the adapter loaded, and the merged one."""
    folder, merged = folders
    llm = Mistral.from_pretrained(folder, adapters={"a": folder / "adapter"})
    return llm, Mistral.from_pretrained(merged)


def likelihood(llm, **adapter):
    ((_, result),) = likelihoods(llm, [([1, 500, 600], [700, 800])], progress=False, **adapter)
    return result.logprob


def rolling(llm, adapter=None):
    model = harness_model(llm, progress=False, adapter=adapter)
    return model._loglikelihood_tokens([(None, [1, 500], [600, 700])])[0][0]


READERS = {
    "embed": lambda llm, **adapter: llm.embed([TEXT, "A king"], **adapter),
    "moderate": lambda llm, **adapter: list(llm.moderate(TEXT, **adapter).scores.values()),
    "moderate cases": lambda llm, **adapter: [
        list(found.scores.values())
        for _, found in moderation.moderate(
            llm, [moderation.Case(TEXT, "acceptable")], progress=False, **adapter
        )
    ],
    "perplexity": lambda llm, **adapter: perplexity(llm, TEXT, progress=False, **adapter).nll,
    "likelihoods": likelihood,
    "harness": rolling,
}


@pytest.mark.parametrize("name", READERS)
def test_it_is_read_as_by_the_merged_model(models, name):
    llm, merged = models
    read = READERS[name]
    expected, plain = torch.as_tensor(read(merged)), torch.as_tensor(read(llm))
    torch.testing.assert_close(
        torch.as_tensor(read(llm, adapter="a")), expected, rtol=1e-3, atol=1e-4
    )
    assert (plain - expected).abs().max() > 1e-2
    with pytest.raises(ValueError, match="adapter is 'b', expected one of a"):
        read(llm, adapter="b")


def test_programs_are_written_with_it(models):
    llm, merged = models
    texts = [
        humaneval.complete(model, [PROBLEM], max_tokens=12, progress=False, **adapter)[0].completion
        for model, adapter in ((llm, {"adapter": "a"}), (merged, {}), (llm, {}))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_each_of_two_models_has_its_own(models):
    llm, merged = models
    same = compare(llm, merged, [TEXT], progress=False, adapters=("a", None))
    assert same.divergences.max() < 1e-4
    other = compare(llm, llm, [TEXT], progress=False, adapters=(None, "a"))
    expected = compare(llm, merged, [TEXT], progress=False)
    torch.testing.assert_close(other.divergences, expected.divergences, rtol=1e-2, atol=1e-4)
    assert other.divergences.mean() > 1e-3


def test_commands(models, folders, tmp_path, capsys):
    llm, _ = models
    folder = str(folders[0])
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    given = f"a={folders[0] / 'adapter'}"
    read = ["--file", str(text), "--json"]
    assert main(["perplexity", "--model", folder, "--adapter", given, *read]) == 0
    found = json.loads(capsys.readouterr().out)["nll"]
    assert found == pytest.approx(perplexity(llm, TEXT, progress=False, adapter="a").nll, rel=1e-4)
    assert main(["compare", folder, "--adapter-b", given, *read]) == 0
    expected = compare(llm, llm, [TEXT], progress=False, adapters=(None, "a"))
    found = json.loads(capsys.readouterr().out)["kl_mean"]
    assert found == pytest.approx(expected.divergences.mean().item(), rel=1e-2)
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"text": TEXT, "category": "acceptable"}))
    output = tmp_path / "scores.json"
    options = ["--model", folder, "--adapter", given, "--output", str(output)]
    assert main(["eval", "--moderation", str(cases), *options]) == 0
    scores = json.loads(output.read_text())["contents"][0]["scores"]
    assert scores == pytest.approx(dict(llm.moderate(TEXT, adapter="a").scores), rel=1e-3)
