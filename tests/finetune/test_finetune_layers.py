"""Gradients of an adapter in packed passes."""

from __future__ import annotations

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

from mistral_ext import Mistral
from mistral_ext.finetune.batches import Pass, passes, step_samples
from mistral_ext.finetune.data import Sample
from mistral_ext.finetune.layers import TrainedAdapter, loss
from mistral_ext.finetune.options import TARGETS
from mistral_ext.ops.cross_entropy import IGNORED
from mistral_ext.weights.adapters import write_adapter

LENGTHS = [19, 2, 9, 8, 30]  # the window is 8


def random_samples(vocab: int, lengths=LENGTHS) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    samples = []
    for n in lengths:
        ids = torch.randint(0, vocab, (n,), generator=generator, dtype=torch.int32)
        weights = torch.randint(0, 3, (n,), generator=generator).float() / 2
        weights[0], weights[-1] = 0, 1
        samples.append(Sample(ids, weights))
    return samples


def random_adapter(llm, targets=TARGETS) -> TrainedAdapter:
    adapter = TrainedAdapter.new(llm.config, 4, 1.5, targets, 0, llm.model.device)
    with torch.no_grad():
        for _, b in adapter.pairs.values():
            b.copy_(0.2 * torch.randn(b.shape, generator=torch.Generator().manual_seed(len(b))))
    return adapter


def gradients(adapter: TrainedAdapter, value: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(value, list(adapter.parameters.values()))
    return dict(zip(adapter.parameters, found, strict=True))


@pytest.mark.parametrize("targets", [TARGETS, ("wk", "w3")])
def test_loss_and_gradients_are_those_of_peft(llm, oracle, tmp_path, targets):
    """Packed samples with weights, against each sample by itself and eager attention."""
    samples = random_samples(llm.config.vocab_size)
    adapter = random_adapter(llm, targets)
    (batch,) = passes(samples, 100)
    value = loss(llm.model, adapter, batch)
    found = gradients(adapter, value)

    write_adapter(tmp_path / "adapter", adapter.low_ranks())
    model = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter", is_trainable=True)
    expected = torch.tensor(0.0)
    for ids, weights in samples:
        logits = model(ids[None, :-1].long()).logits[0]
        losses = cross_entropy(logits, ids[1:].long(), reduction="none")
        expected = expected + (losses * weights[1:]).sum()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    modules = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
    modules |= {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    theirs = dict(model.named_parameters())
    assert len(found) == 2 * len(targets) * llm.config.n_layers
    for name, gradient in found.items():
        _, layer, _, weight, matrix = name.split(".")
        (key,) = (
            k
            for k in theirs
            if f"layers.{layer}." in k and f"{modules[weight]}.lora_{matrix.upper()}" in k
        )
        scale = theirs[key].grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradient, theirs[key].grad, rtol=1e-3, atol=1e-5 * scale + 1e-6)


def test_samples_do_not_see_each_other(llm):
    """The other samples of a pass, and their order, change nothing."""
    samples = random_samples(llm.config.vocab_size)
    adapter = random_adapter(llm)
    alone = [loss(llm.model, adapter, passes([sample], 100)[0]) for sample in samples]
    (batch,) = passes(samples, 100)
    packed = loss(llm.model, adapter, batch)
    torch.testing.assert_close(packed, sum(alone), rtol=1e-5, atol=1e-5)
    first = gradients(adapter, alone[0])
    one_counts = [samples[0], *(Sample(s.ids, 0 * s.weights) for s in samples[1:])]
    (batch,) = passes(one_counts, 100)
    for name, gradient in gradients(adapter, loss(llm.model, adapter, batch)).items():
        torch.testing.assert_close(gradient, first[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights(tiny, quantize, exact_products):
    """The gradients are those with the dequantised weights: QLoRA."""
    llm = Mistral.from_pretrained(tiny[0], dtype=torch.float32, quantize=quantize, progress=False)
    plain = Mistral.from_pretrained(tiny[0], dtype=torch.float32, progress=False)
    for name in ("embeddings", "output"):
        weight = getattr(llm.model, name)
        setattr(
            plain.model, name, weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        )
    for layer, quantised in zip(plain.model.layers, llm.model.layers, strict=True):
        for group in ("qkv", "wo", "gate_up", "w2"):
            weight = getattr(quantised, group)
            many = [
                part.dequantize() for part in (weight if isinstance(weight, list) else [weight])
            ]
            setattr(layer, group, many if isinstance(weight, list) else many[0])
    (batch,) = passes(random_samples(llm.config.vocab_size), 100)
    adapter = random_adapter(llm)
    value, expected = (loss(m.model, adapter, batch) for m in (llm, plain))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    found, wanted = gradients(adapter, value), gradients(adapter, expected)
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_weights_of_the_model_stay(llm):
    assert not llm.model.norm.requires_grad
    (batch,) = passes(random_samples(llm.config.vocab_size), 100)
    before = llm.model.layers[0].wo.clone()
    loss(llm.model, random_adapter(llm), batch).backward()
    torch.testing.assert_close(llm.model.layers[0].wo, before, rtol=0, atol=0)
    assert llm.model.layers[0].wo.grad is None


def test_only_inputs_of_layers_are_kept(llm):
    """Activation checkpointing: what backward needs does not grow with what a layer computes."""
    (batch,) = passes(random_samples(llm.config.vocab_size), 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss(llm.model, random_adapter(llm), batch)
    of_tokens = [
        x for x in kept if x.ndim and len(x) == len(batch.token_ids) and x.is_floating_point()
    ]
    assert of_tokens
    assert all(x.shape[1:] in [(64,), ()] for x in of_tokens)  # E; the hidden dimension is 128


def test_packing():
    samples = random_samples(50, lengths=[5, 9, 2, 4, 9, 3])
    found = passes(samples, 10)
    assert [len(batch.token_ids) for batch in found] == [10, 9, 7]
    for batch in found:
        assert isinstance(batch, Pass)
        first, count, position, row, capacity = batch.sequences.T
        assert first.tolist() == [0, *count.cumsum(0)[:-1].tolist()]
        assert (position == 0).all()
        assert (row == 0).all()
        assert torch.equal(capacity, count)
    together = {tuple(s.ids[:-1].tolist()): s for s in samples}
    for batch in found:
        for first, count, *_ in batch.sequences.tolist():
            part = slice(first, first + count)
            sample = together.pop(tuple(batch.token_ids[part].tolist()))
            expected = [
                int(i) if w else IGNORED
                for i, w in zip(sample.ids[1:], sample.weights[1:], strict=True)
            ]
            assert batch.targets[part].tolist() == expected
            assert torch.equal(batch.weights[part], sample.weights[1:])
    assert not together


def test_every_epoch_reads_every_sample_in_another_order():
    epochs = [[i for s in range(3) for i in step_samples(11, 4, 3 * e + s, seed=5)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert epochs[0] != epochs[1]
    assert step_samples(11, 4, 0, seed=6) != epochs[0][:4]
