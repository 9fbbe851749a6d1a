"""The CUDA kernels of products with the formats of files: GGUF's, and those of GPTQ and AWQ."""

from __future__ import annotations

import math

import pytest
import torch
from backends import use
from packed_weights import GROUPS, random_weight
from test_linear import check, inputs
from test_linear_rope import check as check_rope
from test_linear_rope import make

from mistral_ext import ops
from mistral_ext.ops import Quantized

FORMS = [(form, group) for form, groups in GROUPS.items() for group in groups]
WITH_OFFSET = ("q4_1", "q4_z", "q4_k", "q5_k")
CHUNK = 256  # values


def bf16(shape, generator):
    return torch.randn(shape, generator=generator).bfloat16()


def among_nans(weight: Quantized, before: int) -> Quantized:
    """The same with NaN (or, of bytes, all bits set) around its scales, in `before` elements."""
    scales = weight.scales
    fill = 255 if scales.dtype == torch.uint8 else math.nan
    around = torch.full((scales.numel() + 2 * before,), fill, dtype=scales.dtype)
    inside = around[before:-before].view(scales.shape)
    return weight._replace(scales=inside.copy_(scales))


@pytest.mark.parametrize(("form", "group"), FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_and_place(emulator, form, group, dtype, generator):
    """A product with a unit vector is one value, rounded once."""
    size = 512
    weight = random_weight(form, (17, size), group, generator)
    places = torch.randperm(size, generator=generator)[:96]
    x = torch.eye(size, dtype=dtype)[places]
    with use(emulator):
        out = ops.linear(x, weight)
    assert torch.equal(out, weight.dequantize(dtype)[:, places].T)


@pytest.mark.parametrize(
    ("form", "group", "size"),
    [(form, group, group * n) for form, group in FORMS if group < 256 for n in (1, 3, 11)]
    + [(form, 256, 256 * n) for form, group in FORMS if group == 256 for n in (1, 9, 11)],
)
@pytest.mark.parametrize("tokens", [3, 11])
def test_any_number_of_scales(emulator, form, group, size, tokens, generator):
    """Also if every other row of scales begins within a word of 4 bytes; and in any chunk."""
    weight = among_nans(random_weight(form, (37, size), group, generator), 4)
    x = inputs(tokens, size, torch.bfloat16, generator)
    with use(emulator):
        check(ops.linear(x, weight), x, weight)


@pytest.mark.parametrize(("form", "group"), FORMS)
@pytest.mark.parametrize(("tokens", "norm"), [(1, False), (8, True), (32, False)])
def test_each_weight_is_read_once(emulator, form, group, tokens, norm, generator):
    """By whole sectors, without bank conflicts, and with two products for each 32 values, or three
    and four where x is summed too."""
    rows, size = 64, 1024
    weight = random_weight(form, (rows, size), group, generator)
    x, of_norm = bf16((tokens, size), generator), bf16(size, generator)
    emulator.configure(multiprocessors=1, capability=90)
    with use(emulator):
        ops.linear(x, weight, of_norm if norm else None)
    (record,) = emulator.take_launches()
    blocks = record["grid"][0]
    rows_that_share_x = 32 if tokens > 8 and form not in ("q5_k", "q6_k") else 16
    of_x = rows // rows_that_share_x * max(8, tokens) * size * 2
    if norm:
        of_x = blocks * (tokens + 1) * size * 2
    assert record["loaded_bytes"] == weight.nbytes + of_x
    assert record["stored_bytes"] == 2 * tokens * rows
    assert record["shared_conflicts"] == 0
    tiles = rows // 16
    products = tiles if form not in WITH_OFFSET else tiles + rows // rows_that_share_x
    assert record["mma"] == products * size // 32 * 2 * math.ceil(tokens / 8)


def test_the_launches_of_a_call(emulator, generator):
    """One for each 32 tokens; x is normalised before that for more than 8."""
    weight, norm = random_weight("q4_k", (20, 256), 256, generator), bf16(256, generator)
    for tokens, products, with_norm in ((0, 0, 0), (8, 1, 1), (9, 1, 2), (33, 2, 3), (64, 2, 4)):
        x = bf16((tokens, 256), generator)
        for given, launches in ((None, products), (norm, with_norm)):
            with use(emulator):
                ops.linear(x, weight, given)
            assert len(emulator.take_launches()) == launches


# Weights of a call, and the launches that multiply them.
MIXED = [
    (("q4_k", "q4_k", "q6_k"), 2),
    (("iq4_xs", "iq4_xs", "q5_k"), 2),
    (("q4_0", "q4_0", "q4_0"), 1),
    (("q4_1", "q8_0", "iq4_nl"), 3),
]


@pytest.mark.parametrize(("forms", "launches"), MIXED)
@pytest.mark.parametrize("batch", ["nothing", "12 tokens", "27 tokens, no window", "64 tokens"])
def test_rope_follows_the_products(emulator, forms, launches, batch, generator):
    """Of query, key and value as Q4_K_M and its like mix them: to the bit what two ops come to."""
    given = make(batch, generator, "plain", inputs=256)
    given.weights = [
        random_weight(form, (len(weight), 256), GROUPS.get(form, (32,))[0], generator)
        if form in GROUPS
        else make(batch, generator, form, inputs=256).weights[i]
        for i, (form, weight) in enumerate(zip(forms, given.weights, strict=True))
    ]
    with use(emulator):
        check_rope(given)
        emulator.take_launches()
        given.linear_rope()
    tokens = len(given.x)
    expected = [] if tokens == 0 else ["linear_kernel"] * launches * math.ceil(tokens / 32)
    names = [r["kernel"].split("<")[0].split("::")[-1] for r in emulator.take_launches()]
    assert [name for name in names if name == "linear_kernel"] == expected
    assert names[len(names) - 1 :] == (["rope_kernel"] if tokens else [])


@pytest.mark.parametrize(("form", "group"), [("q4_k", 256), ("q6_k", 256), ("iq4_nl", 32)])
@pytest.mark.parametrize("tokens", [2, 12, 40])
def test_any_order_of_threads_gives_the_same_bits(emulator, form, group, tokens, generator):
    """And any number of multiprocessors: one block for all rows, or one for each tile."""
    x, norm = bf16((tokens, 1280), generator), bf16(1280, generator)
    gate, up = (random_weight(form, (52, 1280), group, generator) for _ in range(2))
    results = []
    for seed, (multiprocessors, copies) in enumerate([(1, "late"), (3, "early"), (40, "late")]):
        emulator.configure(seed=seed, copies=copies, multiprocessors=multiprocessors, capability=90)
        with use(emulator):
            results.append((ops.linear(x, [gate, up], norm), ops.linear_swiglu(x, [gate, up])))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
