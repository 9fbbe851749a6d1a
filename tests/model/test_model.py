"""The whole model against transformers' MistralForCausalLM and against tests/reference.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import reference
import torch
from backends import use
from checkpoints import write_checkpoint

from mistral_ext import Mistral
from mistral_ext.engine.slots import SlotPool
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import routing
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.device import move_weights
from mistral_ext.weights.folder import read_folder

# GQA ratios 1, 2, 4, 8; windows 1, 5, 16 and none; head dimensions 64 and 128; theta of v0.1, v0.2
VARIANTS = {
    "gqa1-window16": {"num_key_value_heads": 4},
    "gqa2-window1": {"num_key_value_heads": 2, "sliding_window": 1},
    "gqa4-window5": {"num_key_value_heads": 1, "sliding_window": 5},
    "gqa8-window16": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "gqa2-window5-head128": {"head_dim": 128, "sliding_window": 5},
    "gqa4-window16-head128": {"head_dim": 128, "num_key_value_heads": 1},
    "gqa2-nowindow": {
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "gqa1-nowindow-head128": {"num_key_value_heads": 4, "head_dim": 128, "sliding_window": None},
}
LENGTH = 83  # several times every window


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, token ids [LENGTH])."""
    folder = tmp_path_factory.mktemp("model")
    theirs = write_checkpoint(folder, **VARIANTS[request.param])
    ids = torch.randint(3, 131, (LENGTH,), generator=torch.Generator().manual_seed(1))
    return theirs, Mistral.from_pretrained(folder), ids


@torch.inference_mode()
def their_logits(theirs, ids):
    return theirs(ids[None]).logits[0]


def test_logits_are_those_of_transformers(pair):
    theirs, ours, ids = pair
    expected = their_logits(theirs, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.logits(ids), expected, atol=2e-5, rtol=2e-5)


def test_greedy_tokens_are_those_of_transformers(pair):
    theirs, ours, ids = pair
    prompt = ids[:21]
    expected = theirs.generate(
        prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=60,
        use_cache=False,  # their cache keeps every key when the window is 1
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :]
    completion = ours.generate(prompt.tolist(), max_tokens=60, ignore_eos=True)[0]
    assert completion.token_ids == expected.tolist()
    assert len(set(completion.token_ids)) > 3


@pytest.mark.parametrize("chunk", [1, 4, 5, 16, 17, 40])
def test_chunked_is_one_shot(pair, chunk):
    _, ours, ids = pair
    torch.testing.assert_close(
        ours.logits(ids, chunk=chunk), ours.logits(ids), atol=2e-5, rtol=2e-5
    )


def test_unused_slots_do_not_matter(pair):
    """The same with a cache of NaN: no slot is read before it is written."""
    _, ours, ids = pair
    window = ours.config.sliding_window
    capacity = window or LENGTH
    cache = SlotPool(ours.config, 2 * capacity + 3, torch.float32)
    for pool in (*cache.k, *cache.v):
        pool.fill_(float("nan"))
    *_, ring = (cache.allocate(n, n) for n in (capacity, 3, capacity))
    logits = []
    for first in range(0, LENGTH, 7):
        new = ids[first : first + 7]
        logits.append(ours.model.forward(new, cache.append({ring: len(new)}), cache))
    torch.testing.assert_close(torch.cat(logits), ours.logits(ids), atol=2e-5, rtol=2e-5)


def test_ragged_batch_is_each_alone(pair):
    """Prompts of different lengths in one call, then decodes and chunks mixed in one call."""
    _, ours, ids = pair
    prompts = [ids[:3], ids[10:50], ids[5:6], ids[:64]]
    more = [ids[70:71], ids[70:79], ids[70:83], ids[70:71]]
    window = ours.config.sliding_window
    capacities = [min(window or 99, len(p) + len(m)) for p, m in zip(prompts, more, strict=True)]
    cache = SlotPool(ours.config, sum(capacities), torch.float32)
    rings = [cache.allocate(n, n) for n in capacities]
    batched = []
    for parts in (prompts, more):
        sequences = cache.append(dict(zip(rings, map(len, parts), strict=True)))
        logits = ours.model.forward(torch.cat(parts), sequences, cache)
        batched.append(logits.split([len(part) for part in parts]))
    for i, (prompt, rest) in enumerate(zip(prompts, more, strict=True)):
        alone = ours.logits(torch.cat([prompt, rest]))
        together = torch.cat([batched[0][i], batched[1][i]])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


def test_rows_selects_logits(pair):
    _, ours, ids = pair
    cache = SlotPool(ours.config, LENGTH, torch.float32)
    ring = cache.allocate(LENGTH, LENGTH)
    rows = torch.tensor([LENGTH - 1, 4])
    logits = ours.model.forward(ids, cache.append({ring: LENGTH}), cache, rows=rows)
    torch.testing.assert_close(logits, ours.logits(ids)[rows], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_as_plain_torch(tmp_path, dtype):
    """Error against fp64 at most twice that of the same model in plain torch and the same dtype."""
    write_checkpoint(tmp_path)
    ours = Mistral.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.randint(3, 131, (LENGTH,), generator=torch.Generator().manual_seed(2))
    weights = load_weights(read_folder(tmp_path), dtype, progress=False)
    wide = {name: weight.double() for name, weight in weights.items()}
    exact = reference.model(wide, ours.config, ids)
    plain = reference.model(weights, ours.config, ids)
    error = (ours.logits(ids) - exact).abs().mean()
    assert error <= 2 * (plain.double() - exact).abs().mean()


def test_reference_is_transformers(tmp_path):
    """The specification itself, so that it may judge the rest."""
    theirs = write_checkpoint(tmp_path).double()
    ours = Mistral.from_pretrained(tmp_path)
    ids = torch.randint(3, 131, (LENGTH,), generator=torch.Generator().manual_seed(3))
    weights = load_weights(read_folder(tmp_path), torch.float32, progress=False)
    logits = reference.model({n: w.double() for n, w in weights.items()}, ours.config, ids)
    # transformers forms its angles in fp32
    torch.testing.assert_close(logits, their_logits(theirs, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [16, None])
def test_on_the_cuda_kernels(tmp_path, emulator, window):
    """All ops in the emulator: as close to fp64 as the CPU's kernels are."""
    write_checkpoint(tmp_path, sliding_window=window)
    ours = Mistral.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(3, 131, (45,), generator=torch.Generator().manual_seed(4))
    weights = load_weights(read_folder(tmp_path), torch.bfloat16, progress=False)
    exact = reference.model({n: w.double() for n, w in weights.items()}, ours.config, ids)
    plain = reference.model(weights, ours.config, ids)
    with use(emulator):
        logits = ours.logits(ids, chunk=20)
    ran = {record["kernel"].split("<")[0].split("::")[-1] for record in emulator.take_launches()}
    assert ran == {
        *("embedding_kernel", "linear_rope_kernel", "linear_kernel", "linear_norm_kernel"),
        *("attention_prefill", "attention_decode"),
    }
    assert (logits - exact).abs().mean() <= 2 * (plain.double() - exact).abs().mean()


def test_products_of_a_long_prompt_on_a_cuda_device(tmp_path, monkeypatch):
    """By torch, and as few as the weights allow: what is multiplied together lies together."""
    write_checkpoint(tmp_path)
    ours = Mistral.from_pretrained(tmp_path)
    ids = torch.randint(3, 131, (80,), generator=torch.Generator().manual_seed(5))
    expected = ours.logits(ids)
    monkeypatch.setattr(routing, "_is_for_torch", lambda x: True)
    weights = load_weights(read_folder(tmp_path), None, progress=False)
    moved = dict(weights)
    move_weights(moved, torch.device("cpu"))
    for made, products in ((weights, 7), (moved, 4)):
        ours = Mistral(ours.config, Transformer(ours.config, made), None, tmp_path)
        with torch.profiler.profile() as profile:
            logits = ours.logits(ids)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["aten::mm"] + counts["aten::addmm_"] == ours.config.n_layers * products + 1


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_pass_over_a_piece_of_a_prompt_wants_no_rows(quantize):
    """Products of no tokens at all by 4-bit weights once divided by zero."""
    llm = Mistral.from_pretrained(DEMO_MODEL, quantize=quantize, progress=False)
    ids = torch.arange(5, 115)
    cache = SlotPool(llm.config, len(ids), llm.model.dtype)
    ring = cache.allocate(len(ids), len(ids))
    first = llm.model.step(
        ids[:60], cache.append({ring: 60}), cache, 60, rows=torch.tensor([], dtype=torch.int64)
    )
    assert first.shape == (0, llm.config.dim)
    logits = llm.model.forward(ids[60:], cache.append({ring: 50}), cache)
    torch.testing.assert_close(logits, llm.logits(ids)[60:])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_model_is_refused(copied):
    llm = Mistral.from_pretrained(DEMO_MODEL, progress=False)
    with pytest.raises(TypeError, match=r"pickled or copied, .*from_pretrained\('.*demo'"):
        copied(llm)
    assert copied(llm.model)  # without the engine it is a module like others
