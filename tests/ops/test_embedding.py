"""Rows of a matrix in any format: the bits of the same rows of the whole matrix."""

from __future__ import annotations

import backends
import pytest
import reference
import torch
from backends import GPU
from packed_weights import GROUPS, random_weight
from tolerance import DTYPES

from mistral_ext import ops
from mistral_ext.ops import Quantized, Weight
from mistral_ext.ops.weight import FORMATS
from mistral_ext.weights.quantize import quantize

# Each row of the weight is read or holds NaN. Rows repeat, and the first and the last are read.
ROWS, IDS = 7, [6, 0, 3, 3, 0]
FORMS = [
    *(("int8", None), ("q8_0", 32), *(("int4", group) for group in (32, 64, 128))),
    *((form, group) for form, groups in GROUPS.items() for group in groups),
]
# Rows that end within 8 vectors of every instruction set, within one vector, and before the first
# vector is full.
SIZES = {None: (1, 7, 40, 333), 32: (32, 96, 1120), 64: (64, 320), 128: (128, 384), 256: (256, 768)}


def unread(ids: list[int]) -> list[int]:
    return [row for row in range(ROWS) if row not in ids]


def plain_weight(size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows that are NaN if they are not read, in a matrix that is NaN around them."""
    around = torch.full((ROWS + 2, size), float("nan"), dtype=dtype)
    weight = around[1:-1]
    weight[sorted(set(IDS))] = torch.randn(len(set(IDS)), size, generator=generator).to(dtype)
    return weight


def make(form: str, group: int | None, size: int, generator: torch.Generator) -> Quantized:
    if form in GROUPS:
        return random_weight(form, (ROWS, size), group, generator)
    return quantize(torch.randn(ROWS, size, generator=generator), form, group)


def without_rows(weight: Quantized, rows: list[int]) -> Quantized:
    """The weight with rows that are NaN: every number in bits of ones is one."""
    scales = weight.scales.clone()
    scales.view(torch.uint8)[rows] = 255
    return weight._replace(scales=scales)


def check(weight: Weight, dtype: torch.dtype, ids: list[int], expected: torch.Tensor) -> None:
    out = ops.embedding(torch.tensor(ids, dtype=torch.int64), weight, dtype)
    assert out.dtype == dtype
    assert not expected.isnan().any()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 16, 72, 333, 5000])
def test_rows_of_a_plain_weight(backend, size, dtype, generator):
    weight = plain_weight(size, dtype, generator)
    for ids in (IDS, IDS[:1], []):
        check(weight, dtype, ids, reference.embedding(weight, torch.tensor(ids).long()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "group"), FORMS)
def test_rows_of_a_quantised_weight(backend, form, group, dtype, generator):
    for size in SIZES[group]:
        if size % 8 and backend not in ops.supported_isas():
            continue  # CUDA kernels refuse it
        whole = make(form, group, size, generator)
        assert whole.group == (group or size)
        weight = without_rows(whole, unread(IDS))
        assert weight.dequantize()[unread(IDS)].isnan().all()
        for ids in (IDS, IDS[:1], []):
            expected = reference.embedding(whole.dequantize(dtype), torch.tensor(ids).long())
            check(weight, dtype, ids, expected)


def test_every_format_is_tested():
    assert {form for form, _ in FORMS} == set(FORMATS)
    for form, group in FORMS:
        facts = FORMATS[form]
        assert group is None or facts.least_group <= group <= facts.most_group


@pytest.mark.parametrize("form", ["plain", "q8_0", "q4_k"])
def test_threads_share_many_tokens(form, isa, generator):
    weight = torch.randn(9, 4096, generator=generator)
    weight = weight if form == "plain" else make(form, FORMATS[form].least_group, 4096, generator)
    ids = torch.randint(0, ROWS, (203,), generator=generator)
    wide = weight if form == "plain" else weight.dequantize()
    torch.set_num_threads(3)
    assert torch.equal(ops.embedding(ids, weight), wide[ids])


def test_values_too_large_and_too_small_for_fp16(backend):
    exact = torch.tensor([1e30, -7e4, 65519, 3e-8, -1e-30, 0.0, 2.0, 5.0]).view(1, 8)
    weight = Quantized(
        torch.tensor([[127, -127, 1, 0, 3, -3, 64, 99]], dtype=torch.int8),
        torch.tensor([[1e30]]).bfloat16(),
        "int8",
    )
    for dtype in DTYPES:
        check(exact.to(dtype), dtype, [0], exact.to(dtype))
        check(weight, dtype, [0], weight.dequantize(dtype))


def test_the_dtype_may_be_left_out(generator):
    ids = torch.tensor([2])
    assert ops.embedding(ids, torch.zeros(3, 8).half()).dtype == torch.float16
    assert ops.embedding(ids, make("q4_0", 32, 64, generator)).dtype == torch.float32


def test_empty_rows(backend):
    assert ops.embedding(torch.tensor([1, 0]), torch.zeros(3, 0)).shape == (2, 0)


@pytest.mark.parametrize("form", ["plain", "q8_0", "q5_k"])
def test_ids_of_no_row_on_a_cuda_device(emulator, form, generator):
    """They are no access outside of the weight, and show in the result. On a device ids are not
    checked, so here they change after the check."""
    weight = make(form, FORMATS[form].least_group, 256, generator) if form != "plain" else None
    values = torch.randn(ROWS, 256, generator=generator) if weight is None else weight.values
    scales, wide = (None, values) if weight is None else (weight.scales, weight.dequantize())
    ids, out = torch.tensor([3, 0, 6, 0, 0]), torch.zeros(5, 256)
    with backends.use(emulator):
        call = backends.in_use().embedding(ids, values, scales, form, out)
        ids[[1, 3, 4]] = torch.tensor([-1, ROWS, 2**40])
        call.run(0, 0, 0)
    assert torch.equal(out[[0, 2]], wide[[3, 6]])
    assert out[[1, 3, 4]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_element_is_read_and_written_once(emulator, dtype):
    weight, ids = torch.zeros(9, 4096, dtype=dtype), torch.tensor([8, 0, 3])
    with backends.use(emulator):
        out = ops.embedding(ids, weight, dtype)
    (launch,) = emulator.take_launches()
    threads, requests = 3 * 512, out.nbytes // 16 // 32
    # Every thread reads the id of its row.
    assert launch["loaded_bytes"] == out.nbytes + 8 * threads
    assert launch["load_requests"] == requests + threads // 32
    assert launch["load_sectors"] == out.nbytes // 32 + threads // 32
    assert launch["stored_bytes"] == out.nbytes
    assert launch["store_requests"] == requests


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize(
    ("size", "offset", "message"),
    [
        (12, 0, "embedding: weight has 12 inputs, expected a multiple of 8 on a CUDA device"),
        (64, 4, "embedding: weight begins at address [0-9]+, expected a multiple of 8 on a CUDA"),
    ],
)
def test_what_a_gpu_refuses(device, size, offset, message):
    memory = torch.zeros(5 * size + 8, dtype=torch.int8, device=device)
    values = memory[offset:][: 5 * size].view(5, size)
    weight = Quantized(values, torch.ones(5, 1, device=device).bfloat16(), "int8")
    with pytest.raises(ValueError, match=message):
        ops.embedding(torch.tensor([1], device=device), weight, torch.bfloat16)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize(("form", "group"), [("plain", None), *FORMS])
def test_on_a_gpu(device, form, group, generator):
    """Ids of no row give NaN there."""
    for dtype in DTYPES:
        if form == "plain":
            weight = whole = torch.randn(ROWS, 256, generator=generator).to(dtype)
        else:
            weight = make(form, group, 256, generator)
            whole = weight.dequantize(dtype)
        ids = torch.tensor([6, -1, 0, ROWS, 2**40])
        out = ops.embedding(ids.to(device), weight.to(device), dtype).cpu()
        assert torch.equal(out[[0, 2]], whole[[6, 0]])
        assert out[[1, 3, 4]].isnan().all()


Q8_0 = Quantized(torch.zeros(5, 64, dtype=torch.int8), torch.zeros(5, 2).half(), "q8_0")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"token_ids": torch.tensor([0, 4, 5, 9])},
            ValueError,
            "token_ids[2] is 5, expected 0 to 4",
        ),
        ({"token_ids": torch.tensor([-1])}, ValueError, "token_ids[0] is -1, expected 0 to 4"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "weight has 0 rows, expected at least 1"),
        (
            {"token_ids": torch.tensor([[1, 2]])},
            ValueError,
            "token_ids has shape [1, 2], expected [2]",
        ),
        ({"token_ids": torch.tensor(3)}, ValueError, "token_ids has shape [], expected [1]"),
        (
            {"token_ids": torch.tensor([1]).int()},
            TypeError,
            "token_ids has dtype torch.int32, expected torch.int64",
        ),
        (
            {"token_ids": torch.arange(4)[::2]},
            ValueError,
            "token_ids has strides [2], expected it to be contiguous",
        ),
        ({"weight": torch.zeros(8)}, ValueError, "weight has shape [8], expected [any, 8]"),
        (
            {"weight": torch.zeros(5, 16)[:, ::2]},
            ValueError,
            "weight has strides [16, 2], expected it to be contiguous",
        ),
        (
            {"dtype": torch.bfloat16},
            TypeError,
            "weight has dtype torch.float32, expected torch.bfloat16 like out",
        ),
        (
            {"dtype": torch.float64},
            TypeError,
            "out has dtype torch.float64, expected torch.float32, torch.bfloat16 or torch.float16",
        ),
        (
            {"weight": Q8_0._replace(scales=Q8_0.scales[:4])},
            ValueError,
            "scales of weight has shape [4, 2], expected [5, any]",
        ),
        (
            {"weight": Q8_0._replace(values=Q8_0.values.int())},
            TypeError,
            "weight has dtype torch.int32, expected torch.int8",
        ),
        (
            {"weight": Q8_0._replace(scales=torch.zeros(5, 1).half())},
            ValueError,
            "weight has 64 inputs and 1 scales a row, expected groups of 32 inputs",
        ),
    ],
)
def test_argument_checks(changes, error, message):
    given = {"token_ids": torch.tensor([1]), "weight": torch.zeros(5, 8)} | changes
    with pytest.raises(error) as caught:
        ops.embedding(**given)
    assert f"embedding: {message}" in str(caught.value)
