"""transformers' models with attn_implementation="mistral_ext" on the CUDA kernels, in the emulator
and on a GPU, in float16: as near to sdpa in float32 as sdpa in float16 is."""

from __future__ import annotations

from copy import deepcopy

import backends
import pytest
import torch
from transformers_models import (
    LLAMA,
    MISTRAL,
    WINDOW,
    gradients,
    make_cache,
    make_pair,
    padding_mask,
    random_ids,
    run_chunks,
)

from mistral_ext.integrations import transformers as integration


class Models:
    """A random model three times: sdpa in float32 on the CPU, and in float16 on a device sdpa and
    our attention."""

    def __init__(self, kind, device: str):
        integration.register()
        self.exact, ours = make_pair(kind)
        self.theirs = deepcopy(self.exact).to(device, torch.float16)
        self.ours = ours.to(device, torch.float16)
        self.device = device

    def run(self, compute):
        """compute(model, device) for each of the three, as float32 on the CPU."""
        results = [compute(self.exact, "cpu")]
        results += [compute(model, self.device) for model in (self.theirs, self.ours)]
        return [result.float().cpu() for result in results]


@pytest.fixture(params=["emulator, late", backends.GPU])
def device(request):
    """Where the tensors are of models whose attention runs as CUDA kernels."""
    if request.param == "cuda":
        yield "cuda"
        return
    emulator = request.getfixturevalue("emulator")
    backends.configure(emulator, request.param)
    with backends.use(emulator):
        yield "cpu"
    assert any("attention" in launch["kernel"] for launch in emulator.take_launches())


def assert_as_exact(exact: torch.Tensor, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    error, allowed = ((x - exact).square().mean() for x in (ours, theirs))
    assert error <= 2 * allowed


@pytest.mark.parametrize("kind", [MISTRAL, LLAMA], ids=["mistral", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(device, kind, side):
    ids, mask = random_ids(3, 40), padding_mask(side, [0, 7, 39], 40)

    def logits(model, device):
        return model(ids.to(device), attention_mask=mask.to(device)).logits[mask.bool()]

    assert_as_exact(*Models(kind, device).run(logits))


@pytest.mark.parametrize("cache", ["plain", "sliding", "static"])
@pytest.mark.parametrize("padding", [None, [0, 3, 9]])
def test_caches(device, cache, padding):
    """Prompts in chunks and single tokens, past the window."""
    sizes = (15, 1, 1, 16, 7)
    count = sum(sizes)
    ids, positions = random_ids(3, count), torch.arange(count).expand(3, -1)
    mask = torch.ones_like(ids) if padding is None else padding_mask("left", padding, count)

    def logits(model, device):
        given = None if padding is None else mask.to(device)
        chunks = given, sizes, positions.to(device)
        out = run_chunks(model, ids.to(device), make_cache(cache, model), *chunks)
        return out[mask.bool()]

    assert_as_exact(*Models(MISTRAL, device).run(logits))


@torch.no_grad()
def test_packed_sequences(device):
    ids = random_ids(1, 40)
    positions = torch.cat([torch.arange(n) for n in (11, 1, 28)])[None]

    def logits(model, device):
        given = {"position_ids": positions.to(device), "use_cache": False}
        return model(ids.to(device), **given).logits

    assert_as_exact(*Models(MISTRAL, device).run(logits))


@torch.no_grad()
def test_generate(device):
    """Left-padded prompts, past the window: each token is the best there is, but for rounding."""
    models = Models(MISTRAL, device)
    ids, mask = random_ids(3, 12), padding_mask("left", [0, 4, 9], 12)
    found = models.ours.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        do_sample=False,
        max_new_tokens=WINDOW,
    ).cpu()
    assert found.shape == (3, 12 + WINDOW)
    mask = torch.nn.functional.pad(mask, (0, WINDOW), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    exact = models.exact(found, attention_mask=mask, position_ids=positions).logits[:, 11:-1]
    reached = exact.gather(2, found[:, 12:, None])[..., 0]
    assert (exact.amax(2) - reached).max() < 0.05 * exact.std()


@pytest.mark.parametrize("padding", [None, [0, 7, 30]])
def test_gradients(device, padding):
    ids = random_ids(3, 40)
    given = {} if padding is None else {"attention_mask": padding_mask("right", padding, 40)}

    def of_queries(model, device):
        moved = {name: tensor.to(device) for name, tensor in given.items()}
        name = "model.layers.0.self_attn.q_proj.weight"
        return gradients(model, ids.to(device), **moved)[name]

    assert_as_exact(*Models(MISTRAL, device).run(of_queries))
