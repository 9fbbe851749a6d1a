"""`quantize_checkpoint(calibration=...)`: less error where the model looks, and resumption."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from mistral_ext import Mistral
from mistral_ext.cli import main
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.ops import Quantized
from mistral_ext.weights import calibrate, error_feedback, kept, new_folder
from mistral_ext.weights.calibrate import CalibratedLayers
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.quantize import quantize
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

DATA = Path(__file__).resolve().parents[1] / "data"
STORY = "Once upon a time there was a mouse who lived with a bird in a small house. " * 12


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "model", intermediate_size=192)
    return tmp_path / "model"


@pytest.fixture
def token_ids(generator):
    return torch.randint(3, 131, (400,), generator=generator).tolist()


def weights_of(folder):
    parts = {}
    for name, weight in load_weights(read_folder(folder)).items():
        parts[name] = (
            weight
            if isinstance(weight, torch.Tensor)
            else torch.cat([part.contiguous().view(torch.uint8).flatten() for part in weight[:2]])
        )
    return parts


def same(a, b) -> bool:
    a, b = weights_of(a), weights_of(b)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_diverges_less(tmp_path):
    """The demo model on a text that it was not calibrated with."""
    original = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.float32, progress=False)
    ids = original.tokenizer.encode((DATA / "held_out.txt").read_text()[:10000])
    text, held_out = ids[256:], ids[:256]
    exact, found = original.logits(held_out), []
    for name, calibration in (("plain", None), ("calibrated", text)):
        quantize_checkpoint(DEMO_MODEL, tmp_path / name, 4, calibration=calibration)
        llm = Mistral.from_pretrained(tmp_path / name, dtype=torch.float32, progress=False)
        found.append(divergence(exact, llm.logits(held_out)))
    assert found[1] < 0.8 * found[0]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["calibrated", "plain"]


def test_blocks_make_up_for_the_errors_of_earlier_blocks(generator):
    """Every column of the second block depends on a column of the first."""
    weight = torch.randn(16, 512, generator=generator)
    hessian = torch.eye(512)
    hessian[:256, 256:] = hessian[256:, :256] = 0.95 * torch.eye(256)
    made, x = Quantized.empty(weight.shape, "iq4_xs"), torch.linalg.cholesky(hessian, upper=True)
    error_feedback.round_by(error_feedback.factor_of([x]), weight, made)

    def loss(found: torch.Tensor) -> float:
        difference = found - weight
        return ((difference @ hessian) * difference).sum().item()

    assert loss(made.dequantize()) < 0.8 * loss(quantize(weight, "iq4_xs").dequantize())


def stop_after_a_layer(folder, target, token_ids) -> None:
    rounded = CalibratedLayers.rounded

    def interrupted(self, index, layer):
        if index == 1:
            raise KeyboardInterrupt
        return rounded(self, index, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibratedLayers, "rounded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(folder, target, 4, calibration=token_ids)
    assert not target.exists()


def test_a_run_goes_on_where_it_was(folder, tmp_path, token_ids, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    whole = quantize_checkpoint(folder, tmp_path / "whole", 4, calibration=token_ids)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not same(whole, quantize_checkpoint(folder, tmp_path / "plain", 4))
    stop_after_a_layer(folder, tmp_path / "new", token_ids)
    with pytest.raises(ValueError, match=r"new.calibration' is of another calibration, expected"):
        quantize_checkpoint(folder, tmp_path / "new", 4, calibration=token_ids[1:])

    done, factor_of = [], error_feedback.factor_of
    monkeypatch.setattr(
        calibrate, "factor_of", lambda x, sizes: done.append(len(x)) or factor_of(x, sizes)
    )
    quantize_checkpoint(folder, tmp_path / "new", 4, calibration=token_ids)
    assert len(done) == 4  # the four inputs of one layer of two
    assert same(tmp_path / "new", whole)
    assert not (tmp_path / "new.calibration").exists()


@pytest.mark.parametrize("changed", ["self_attn.k_proj", "input_layernorm"])
def test_a_run_does_not_go_on_with_another_model(tmp_path, token_ids, changed):
    """As if an adapter was merged: the embeddings and the configuration are the same."""
    model = write_checkpoint(tmp_path / "model")
    stop_after_a_layer(tmp_path / "model", tmp_path / "new", token_ids)
    model.model.layers[0].get_submodule(changed).weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"new.calibration' is of another calibration, expected"):
        quantize_checkpoint(tmp_path / "merged", tmp_path / "new", 4, calibration=token_ids)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["hidden.pt", "0.pt"])
def test_a_damaged_file_is_named(folder, tmp_path, token_ids, name):
    stop_after_a_layer(folder, tmp_path / "new", token_ids)
    file = tmp_path / "new.calibration" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=rf"{name}' is missing or damaged: remove '\S+new\.cal"
    ) as e:
        quantize_checkpoint(folder, tmp_path / "new", 4, calibration=token_ids)
    assert "\n" not in str(e.value)


def test_states_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("sync"))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("name") or replace(*names))
    kept.save_state({"identity": "a"}, tmp_path / "0.pt")
    assert done[:2] == ["sync", "name"]
    assert kept.load_state(tmp_path / "0.pt", "a") == {"identity": "a"}


def test_files_of_others_stay(folder, tmp_path, token_ids):
    kept_here = tmp_path / "new.calibration"
    kept_here.mkdir()
    for name in ("notes.txt", "1.pt.txt", "x1.pt"):
        (kept_here / name).write_text("mine")
    (kept_here / "7.part").write_text("left by a run that was killed")
    quantize_checkpoint(folder, tmp_path / "new", 4, calibration=token_ids)
    assert sorted(e.name for e in kept_here.iterdir()) == ["1.pt.txt", "notes.txt", "x1.pt"]


def test_a_model_that_is_complete_is_no_failure(folder, tmp_path, token_ids, monkeypatch, caplog):
    def busy(file):
        raise PermissionError("in use")

    monkeypatch.setattr(Path, "unlink", busy)
    quantize_checkpoint(folder, tmp_path / "new", 4, calibration=token_ids)
    monkeypatch.undo()
    assert "new.calibration is not needed any more, but cannot be removed: in use" in caplog.text
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_errors_count_relative_to_the_residual_stream(folder, tmp_path, token_ids, monkeypatch):
    """Errors of wo and w2 do, because the next norm divides by the size of the residual stream."""
    found, factor_of = [], error_feedback.factor_of
    monkeypatch.setattr(
        calibrate, "factor_of", lambda x, sizes: found.append(sizes) or factor_of(x, sizes)
    )
    quantize_checkpoint(folder, tmp_path / "new", 4, calibration=token_ids)
    config, weights = read_folder(folder).config, load_weights(read_folder(folder))
    embedded = weights["tok_embeddings.weight"][token_ids].float()
    assert len(found) == 4 * config.n_layers
    assert [found[0], found[2]] == [None, None]  # wq, wk and wv; w1 and w3
    (of_wo,), (of_w2,) = found[1], found[3]
    expected = (embedded.square().mean(1) + config.norm_eps).sqrt()
    torch.testing.assert_close(of_wo, expected)
    assert of_w2.shape == of_wo.shape
    assert not torch.equal(of_w2, of_wo)


def test_a_hessian_without_a_factor_is_damped_more(generator, monkeypatch):
    x, cholesky, failures = torch.randn(64, 512, generator=generator), torch.linalg.cholesky, [1]

    def fail_once(block):
        if failures:
            raise torch.linalg.LinAlgError(f"failure {failures.pop()}")
        return cholesky(block)

    monkeypatch.setattr(torch.linalg, "cholesky", fail_once)
    found = error_feedback.factor_of([x])
    monkeypatch.setattr(error_feedback, "_DAMPING", 10 * error_feedback._DAMPING)
    expected = error_feedback.factor_of([x])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_hessian_without_a_factor_is_named(folder, tmp_path, monkeypatch):
    """One token leaves a Hessian of rank 1."""
    monkeypatch.setattr(error_feedback, "_DAMPING", 0.0)
    named = (
        "tensor 'layers.0.attention.wq.weight' cannot be calibrated with this text: .* no factor"
    )
    with pytest.raises(ValueError, match=named):
        quantize_checkpoint(folder, tmp_path / "new", 4, calibration=[5])


def test_finished_layers_are_kept_until_the_model_is_safe(folder, tmp_path, token_ids, monkeypatch):
    whole = quantize_checkpoint(folder, tmp_path / "whole", 4, calibration=token_ids)

    def full(folder):
        raise OSError("no space left")

    monkeypatch.setattr(new_folder, "sync_files", full)
    with pytest.raises(OSError, match="no space left"):
        quantize_checkpoint(folder, tmp_path / "new", 4, calibration=token_ids)
    monkeypatch.undo()
    monkeypatch.setattr(calibrate, "factor_of", None)  # no layer is rounded again
    assert same(quantize_checkpoint(folder, tmp_path / "new", 4, calibration=token_ids), whole)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "new", "whole"]


def test_command(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(STORY)
    given = ["quantize", str(DEMO_MODEL), str(tmp_path / "new"), "--bits", "4"]
    assert main([*given, "--calibrate", str(text)]) == 0
    tokens = Mistral.from_pretrained(DEMO_MODEL, progress=False).tokenizer.encode(STORY)
    expected = quantize_checkpoint(DEMO_MODEL, tmp_path / "expected", 4, calibration=tokens)
    assert same(tmp_path / "new", expected)


@pytest.mark.parametrize(
    ("value", "problem"), [(1e9, "holds magnitudes up to 1e\\+09 and"), (float("nan"), "holds NaN")]
)
def test_weights_that_cannot_be_rounded_are_named(tmp_path, token_ids, value, problem):
    model = write_checkpoint(tmp_path / "model")
    model.model.layers[0].self_attn.v_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"tensor 'layers.0.attention.wv.weight' {problem}"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "new", 4, calibration=token_ids)


def test_wrong_arguments_are_named(folder, tmp_path):
    for bits, group in ((8, None), (4, 64)):
        with pytest.raises(ValueError, match=f"calibration is given with bits {bits} and group"):
            quantize_checkpoint(folder, tmp_path / "x", bits, group, calibration=[5])
    for ids in ([], [10**6], [-1]):
        with pytest.raises(ValueError, match=f"token_ids has {len(ids)} tokens of a vocabulary"):
            quantize_checkpoint(folder, tmp_path / "x", 4, calibration=ids)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
