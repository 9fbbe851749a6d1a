"""What is measured of matrices in 4 bits is what they cost, in nats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from mistral_ext import Mistral
from mistral_ext.llm import DEMO_MODEL, read_tokenizer
from mistral_ext.model.transformer import Transformer
from mistral_ext.weights.checkpoint import Checkpoint, load_weights, tensor_shapes
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.quantize import Quantization
from mistral_ext.weights.sensitivity import Sensitivities, random_tokens

HELD_OUT = Path(__file__).resolve().parents[1] / "data" / "held_out.txt"


def measure(folder, token_ids) -> dict[str, float]:
    read = read_folder(folder)
    weights = Checkpoint(read, torch.float32)
    return Sensitivities(weights.read, read.config).measure(token_ids, progress=False)


def test_divergence_is_foreseen():
    """The demo: the divergence with a single matrix in 4 bits, measured by a whole pass."""
    read = read_folder(DEMO_MODEL)
    ids = read_tokenizer(read).encode(HELD_OUT.read_text()[:2000])[:256]
    found = measure(DEMO_MODEL, ids)
    exact = load_weights(read, torch.float32, progress=False)
    matrices = [n for n, shape in tensor_shapes(read.config).items() if n[0] == "l" and shape[1:]]
    assert list(found) == matrices
    assert max(found.values()) > 10 * min(found.values())

    def logarithms(weights):
        llm = Mistral(read.config, Transformer(read.config, weights), None, DEMO_MODEL)
        return llm.logits(ids).double().log_softmax(-1)

    expected, four = logarithms(exact), Quantization.from_bits(4)
    for name in matrices[::2]:  # 256 tokens leave errors of up to 60 %
        rounded = four.quantize(name, exact[name], name).dequantize()
        got = logarithms(exact | {name: rounded})
        divergence = (expected.exp() * (expected - got)).sum(-1).mean().item()
        assert 0.5 < found[name] / divergence < 2, name


def test_a_matrix_that_4_bits_hold_loses_nothing(tmp_path):
    model = write_checkpoint(tmp_path / "model", intermediate_size=256)
    name, projection = "layers.1.attention.wk.weight", model.model.layers[1].self_attn.k_proj
    projection.weight.data[:, 32:] = 0
    projection.weight.data[:, :32] = 1
    model.save_pretrained(tmp_path / "model")
    found = measure(tmp_path / "model", random_tokens(131))
    assert found[name] < 1e-3 * min(loss for other, loss in found.items() if other != name)


def test_what_is_kept_is_of_one_text_and_one_model(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    read, ids = read_folder(tmp_path / "model"), random_tokens(131)

    def measure_once(token_ids, config, folder=read):
        sensitivities = Sensitivities(Checkpoint(folder, torch.float32).read, config)
        return sensitivities.measure_once(token_ids, tmp_path / "kept", progress=False)

    found = measure_once(ids, read.config)
    assert measure_once(ids, read.config) == found
    others = replace(read.config, rope_theta=2 * read.config.rope_theta)
    for token_ids, config in (([*ids, 5], read.config), (ids, others)):
        with pytest.raises(ValueError, match="of another calibration"):
            measure_once(token_ids, config)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)  # as if an adapter was merged
    model.save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match="of another calibration"):
        measure_once(ids, read.config, read_folder(tmp_path / "merged"))
    with pytest.raises(ValueError, match="token_ids has"):
        measure_once([*ids, 131], read.config)


def test_tied_embeddings_are_the_output(tmp_path):
    tied = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    apart = write_checkpoint(tmp_path / "apart")
    state = tied.state_dict()
    apart.load_state_dict(state)
    apart.save_pretrained(tmp_path / "apart")
    ids = random_tokens(131)
    assert measure(tmp_path / "tied", ids) == measure(tmp_path / "apart", ids)


def test_random_tokens_are_always_the_same():
    assert random_tokens(131) == random_tokens(131)
    assert len(set(random_tokens(131))) > 100
    assert 0 <= min(random_tokens(131)) <= max(random_tokens(131)) < 131


@pytest.mark.parametrize("name", ["lm_head", "model.layers.1.mlp.down_proj"])
def test_not_a_number_is_named(tmp_path, name):
    model = write_checkpoint(tmp_path / "model")
    model.get_submodule(name).weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    ours = {"lm_head": "output"}.get(name, "layers.1.feed_forward.w2")
    with pytest.raises(ValueError, match=f"tensor '{ours}.weight' holds NaN or infinity"):
        measure(tmp_path / "model", [3, 4, 5])


def test_tokens_of_no_vocabulary_are_named(tmp_path):
    write_checkpoint(tmp_path / "model")
    for ids in ([], [131], [-1]):
        with pytest.raises(ValueError, match=f"token_ids has {len(ids)} tokens of a vocabulary of"):
            measure(tmp_path / "model", ids)
