"""The machine code of the CUDA kernels holds the instructions that were meant."""

from __future__ import annotations

import kernel_report
import pytest
from cuda_tools import find_nvcc, find_nvdisasm, instructions

ARCHITECTURES = [f"sm_{arch}" for arch in kernel_report.architectures()]


@pytest.fixture(scope="module")
def disassembly():
    """{architecture: {kernel: instructions}}"""
    nvdisasm = find_nvdisasm()
    found = {arch: {} for arch in ARCHITECTURES}
    for cubin in kernel_report.compile_kernels(find_nvcc()):
        found[cubin.arch].update(instructions(cubin.path, nvdisasm))
    return found


@pytest.fixture(params=ARCHITECTURES)
def kernels(request, disassembly):
    assert disassembly[request.param]
    return disassembly[request.param]


def count(code, *prefixes):
    return sum(n for name, n in code.items() if name.startswith(prefixes))


def test_no_local_memory(kernels):
    for name, code in kernels.items():
        assert count(code, "LDL", "STL") == 0, name


@pytest.mark.parametrize("kernel", ["attention_prefill", "attention_decode"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_is_made_of_tensor_core_products(kernels, kernel, dtype, head_dim):
    """Fed by asynchronous 16-byte copies that bypass L1, and by ldmatrix, plain and transposed."""
    code = kernels[f"{kernel}<{dtype}, {head_dim}>"]
    product = "HMMA.16816.F32" + (".BF16" if dtype == "bf16" else "")
    assert code[product] > 0
    assert code[product] == count(code, "HMMA")
    assert count(code, "LDGSTS") == code["LDGSTS.E.BYPASS.128"] > 0
    assert code["LDSM.16.M88.4"] > 0
    assert code["LDSM.16.MT88.4"] > 0
    # A row of the result is 16 bytes wide where its tile is written.
    assert code["STG.E.128"] > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_attention_is_made_of_warpgroup_products(disassembly, dtype, head_dim):
    """Fed by the copy engine, and by 16-byte copies where rows lie apart."""
    code = disassembly["sm_90a"][f"attention_prefill_hopper<{dtype}, {head_dim}>"]
    suffix = ".F32" + (".BF16" if dtype == "bf16" else "")
    scores, out = f"HGMMA.64x128x16{suffix}", f"HGMMA.64x{head_dim}x16{suffix}"
    # Scores of the first tile, of the next ones, results of those and of the last one.
    products = {scores: 2 * head_dim // 16}
    products[out] = products.get(out, 0) + 2 * 128 // 16
    assert {name: n for name, n in code.items() if name.startswith(("HGMMA", "HMMA"))} == products
    assert count(code, "UTMALDG.2D") > 0
    assert count(code, "UTMALDG.3D") > 0
    assert count(code, "LDGSTS") == code["LDGSTS.E.BYPASS.128"] > 0
    assert count(code, "USETMAXREG") == 2
    assert code["STG.E.128"] > 0


@pytest.mark.parametrize("kernel", ["linear_kernel", "linear_rope_kernel"])
@pytest.mark.parametrize("form", ["Plain", "Int8", "Int4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "shape",
    ["1, 1, true", "1, 1, false", "1, 2, true", "1, 2, false", "2, 4, false", "2, 8, false"],
)
def test_linear_streams_weights_to_the_tensor_cores(kernels, kernel, form, dtype, shape):
    """Through shared memory, by asynchronous 16-byte copies that bypass L1, and nothing else does:
    the scales of 4-bit weights go by 4 bytes and through L1."""
    code = kernels[f"{kernel}<{form}Weights<{dtype}>, {shape}>"]
    product = "HMMA.16816.F32" + (".BF16" if dtype == "bf16" else "")
    assert code[product] == count(code, "HMMA") > 0
    assert code["LDGSTS.E.BYPASS.128"] > 0
    others = count(code, "LDGSTS") - code["LDGSTS.E.BYPASS.128"]
    assert (others > 0) == (form == "Int4")
    # Weights come from shared memory by 16 bytes, those of 4 bits by ldmatrix.
    assert code["LDSM.16.M88.4" if form == "Int4" else "LDS.128"] > 0
    # x comes by 16 bytes; scales, the residual and the results by 2; the sequence table by 8.
    assert code["LDG.E.128"] > 0
    table = count(code, "LDG.E.64")
    assert count(code, "LDG.") == code["LDG.E.128"] + count(code, "LDG.E.U16") + table
    assert (table > 0) == (kernel == "linear_rope_kernel")
    assert count(code, "LD.", "ST.") == 0, "accesses by generic addresses"
    if kernel == "linear_kernel":  # an argmax raises its ranks by an instruction, not by a loop
        assert count(code, "RED.E.MAX.64", "ATOMG.E.MAX.64") > 0
    # No table and no conversion from integers: bit operations and subtractions of pairs. Divisions
    # convert too, rounding up, and RMSNorm and RoPE convert 64 bits: a size, angles.
    conversions = {name for name in code if name.startswith("I2F") and not name.endswith(".RP")}
    assert conversions <= {"I2F.S64"}


@pytest.mark.parametrize("dtype", ["bf16, 8", "fp16, 8", "fp32, 4"])
@pytest.mark.parametrize("op", ["rms_norm", "rope", "swiglu"])
def test_aligned_rows_are_moved_by_16_bytes(kernels, op, dtype):
    """All of them: a store of 16 bytes that the compiler has cut up fails too."""
    code = kernels[f"{op}_kernel<{dtype}>"]
    # rope reads the sequence table by 8 bytes
    table = code["LDG.E.64"] if op == "rope" else 0
    assert count(code, "LDG.") - table == code["LDG.E.128"] > 0
    assert count(code, "STG.") == code["STG.E.128"] > 0
    assert count(code, "LD.", "ST.") == 0, "accesses by generic addresses"


def test_aligned_logits_are_read_by_16_bytes(kernels):
    wide, narrow = kernels["sample_kernel<true>"], kernels["sample_kernel<false>"]
    assert wide["LDG.E.128"] > narrow["LDG.E.128"]
    assert wide["STG.E.128"] > narrow["STG.E.128"]


@pytest.mark.parametrize(
    "kernel",
    [
        "attention_decode<bf16, 128>",
        "linear_kernel<PlainWeights<bf16>, 1, 1, true>",
        "linear_rope_kernel<Int4Weights<bf16>, 1, 1, true>",
    ],
)
def test_kernels_of_a_decode_step_can_overlap(disassembly, kernel):
    """They wait for those before them and let those after them begin, where the machine can."""
    assert count(disassembly["sm_90a"][kernel], "ACQBULK") == 1
    assert count(disassembly["sm_90a"][kernel], "PREEXIT") == 1
    assert count(disassembly["sm_80"][kernel], "ACQBULK") == 0
