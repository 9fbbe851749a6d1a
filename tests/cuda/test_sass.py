"""The machine code of the CUDA kernels holds the instructions that were meant."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import kernel_report
import pytest
import sass
import sass_rules
from cuda_tools import find_nvcc, find_nvdisasm

ARCHITECTURES = [f"sm_{arch}" for arch in kernel_report.architectures()]
HOPPER = f"sm_{kernel_report.HOPPER}"


@pytest.fixture(scope="module")
def cubins():
    return kernel_report.compile_kernels(find_nvcc())


@pytest.fixture(scope="module")
def listings(cubins):
    """[(cubin, {kernel: its machine code as nvdisasm prints it})]"""
    nvdisasm = find_nvdisasm()
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda cubin: sass.disassemble(cubin.path, nvdisasm), cubins)
        return list(zip(cubins, texts, strict=True))


@pytest.fixture(scope="module")
def disassembly(listings):
    """{architecture: {kernel: how often it has each instruction}}"""
    found = {arch: {} for arch in ARCHITECTURES}
    for cubin, texts in listings:
        found[cubin.arch].update({kernel: sass.opcodes(text) for kernel, text in texts.items()})
    return found


@pytest.fixture(params=ARCHITECTURES)
def kernels(request, disassembly):
    assert disassembly[request.param]
    return disassembly[request.param]


@pytest.fixture(scope="module")
def warpgroup_kernels(listings):
    """{kernel: its code with the registers that it touches}, where warpgroups multiply."""
    nvdisasm = find_nvdisasm()
    found = {}
    for cubin, texts in listings:
        if any("HGMMA" in text for text in texts.values()):
            texts = sass.disassemble(cubin.path, nvdisasm, "-lrm", "narrow")
            found.update({kernel: sass.parse(text) for kernel, text in texts.items()})
    assert found
    return found


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


@pytest.mark.parametrize("gradients", ["keys", "queries"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_attention_are_made_of_tensor_core_products(
    kernels, gradients, dtype, head_dim
):
    """The same, for products of 16 rows with the 32 of a tile; log-sum-exps and deltas come by 4
    bytes. Each sum has one owner: nothing is added to global memory."""
    code = kernels[f"attention_backward_{gradients}<{dtype}, {head_dim}>"]
    product = "HMMA.16816.F32" + (".BF16" if dtype == "bf16" else "")
    scores, sums = 4 * head_dim // 16, 2 * head_dim // 8
    expected = 2 * scores + (2 if gradients == "keys" else 1) * sums
    assert code[product] == count(code, "HMMA") == expected
    statistics = count(code, "LDGSTS") - code["LDGSTS.E.BYPASS.128"]
    assert (statistics > 0) == (gradients == "keys")
    assert code["LDGSTS.E.BYPASS.128"] > 0
    assert code["LDSM.16.M88.4"] > 0
    assert code["LDSM.16.MT88.4"] > 0
    assert count(code, "STG.") == code["STG.E.128"] > 0
    assert count(code, "RED", "ATOM") == 0


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
@pytest.mark.parametrize("form", ["Plain", "Int8", "Int4", "Q8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "shape",
    ["1, 1, true", "1, 1, false", "1, 2, true", "1, 2, false", "2, 4, false", "2, 8, false"],
)
def test_linear_streams_weights_to_the_tensor_cores(kernels, kernel, form, dtype, shape):
    """Through shared memory, by asynchronous 16-byte copies that bypass L1, and nothing else does:
    the scales of groups go by 4 bytes and through L1."""
    code = kernels[f"{kernel}<{form}Weights<{dtype}>, {shape}>"]
    product = "HMMA.16816.F32" + (".BF16" if dtype == "bf16" else "")
    assert code[product] == count(code, "HMMA") > 0
    assert code["LDGSTS.E.BYPASS.128"] > 0
    others = count(code, "LDGSTS") - code["LDGSTS.E.BYPASS.128"]
    assert (others > 0) == (form in ("Int4", "Q8"))
    # Weights come from shared memory by 16 bytes, those of 4 bits by ldmatrix, of Q8_0 by 8 bytes.
    assert code[{"Int4": "LDSM.16.M88.4", "Q8": "LDS.64"}.get(form, "LDS.128")] > 0
    # x comes by 16 bytes; scales, the residual and the results by 2; the sequence table by 8; what
    # adapters add by 4.
    assert code["LDG.E.128"] > 0
    table, added = count(code, "LDG.E.64"), code["LDG.E"]
    loads = code["LDG.E.128"] + count(code, "LDG.E.U16") + table + added
    assert count(code, "LDG.") == loads
    assert (table > 0) == (kernel == "linear_rope_kernel") == (added == 0)
    assert count(code, "LD.", "ST.") == 0, "accesses by generic addresses"
    if kernel == "linear_kernel":  # an argmax raises its ranks by an instruction, not by a loop
        assert count(code, "RED.E.MAX.64", "ATOMG.E.MAX.64") > 0
    assert_no_conversions(code)


def assert_no_conversions(code):
    """From integers: bit operations and subtractions of pairs take their place. Divisions convert
    too, rounding up, and RMSNorm and RoPE convert 64 bits: a size, angles."""
    conversions = {name for name in code if name.startswith("I2F") and not name.endswith(".RP")}
    assert conversions <= {"I2F.S64"}


PACKED = ["Q4_0", "Q4_1", "Q4Z", "Q4K", "Q5K", "Q6K", "IQ4NL", "IQ4XS"]
WITH_FURTHER_BITS = ("Q5K", "Q6K")


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", ["1, 1, true", "1, 1, false", "{}, 4, false"])
def test_formats_of_files_are_streamed_alike(kernels, form, dtype, shape):
    """Their values by 16 bytes, their scales by 4; no entry of a table comes from memory."""
    tiles = 1 if form in WITH_FURTHER_BITS else 2
    code = kernels[f"linear_kernel<{form}Weights<{dtype}>, {shape.format(tiles)}>"]
    product = "HMMA.16816.F32" + (".BF16" if dtype == "bf16" else "")
    assert code[product] == count(code, "HMMA") > 0
    assert code["LDGSTS.E.BYPASS.128"] > 0
    assert count(code, "LDGSTS") > code["LDGSTS.E.BYPASS.128"]
    assert (code["LDSM.16.M88.4"] > 0) == (form != "Q6K")
    # x comes by 16 bytes, with Q6_K by 8.
    assert (code["LDG.E.64"] > 0) == (form == "Q6K" and "true" not in shape)
    assert count(code, "LD.", "ST.") == 0, "accesses by generic addresses"
    assert count(code, "LDC.U8", "LDC.S8", "LDL") == 0
    assert_no_conversions(code)


@pytest.mark.parametrize("dtype", ["bf16, 8", "fp16, 8", "fp32, 4"])
@pytest.mark.parametrize(
    "op",
    [
        *("embedding", "rms_norm", "rms_norm_backward", "rope", "rotate", "swiglu"),
        "swiglu_backward",
    ],
)
def test_aligned_rows_are_moved_by_16_bytes(kernels, op, dtype):
    """All of them: a store of 16 bytes that the compiler has cut up fails too."""
    code = kernels[f"{op}_kernel<{dtype}>"]
    # rope and rotate read the sequence table by 8 bytes, embedding reads ids
    table = code["LDG.E.64"] if op.startswith(("embedding", "ro")) else 0
    assert count(code, "LDG.") - table == code["LDG.E.128"] > 0
    assert count(code, "STG.") == code["STG.E.128"] > 0
    assert count(code, "LD.", "ST.") == 0, "accesses by generic addresses"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("form", "loads"),
    [
        *((form, {"LDG.E.64": 2, "LDG.E.U16": 1}) for form in (1, 3)),  # int8, q8_0
        *((form, {"LDG.E.64": 1, "LDG.E": 1, "LDG.E.U16": 1}) for form in (2, 4, 10)),
        *((form, {"LDG.E.64": 1, "LDG.E": 2}) for form in (5, 6)),  # a pair of scales
        (7, {"LDG.E.64": 1, "LDG.E": 1 + 4}),  # q4_k, scales of 16 bytes
        (8, {"LDG.E.64": 1, "LDG.E": 2 + 4}),  # q5_k, a word of further bits
        (9, {"LDG.E.64": 1, "LDG.E": 2 + 1, "LDG.E.U16": 1}),  # q6_k, a word of scales and d
        (11, {"LDG.E.64": 1, "LDG.E": 1 + 2}),  # iq4_xs
    ],
)
def test_dequantised_values_are_moved_together(kernels, dtype, form, loads):
    """8 values are a load, with an index before it; then come their scales."""
    code = kernels[f"dequantize_kernel<{dtype}, {form}>"]
    assert {name: n for name, n in code.items() if name.startswith("LDG.")} == loads
    assert count(code, "STG.") == code["STG.E.128"] == (2 if dtype == "fp32" else 1)
    assert count(code, "LD.", "ST.") == 0, "accesses by generic addresses"


@pytest.mark.parametrize("dtype", ["bf16, 8", "fp16, 8", "fp32, 4"])
def test_gradients_of_logits_and_adapters_are_moved_by_16_bytes(kernels, dtype):
    """Only what a row or a token has one of comes by itself."""
    code = kernels[f"cross_entropy_kernel<{dtype}>"]
    assert code["LDG.E.128"] >= 2
    assert code["STG.E.128"] > 0
    assert count(code, "STG.") - code["STG.E.128"] == 1, "the loss"
    code = kernels[f"lora_gradient_kernel<{dtype}>"]
    assert code["LDG.E.128"] > 0
    for name in ("cross_entropy", "lora_gradient"):
        code = kernels[f"{name}_kernel<{dtype}>"]
        assert count(code, "LD.", "ST.") == 0, "accesses by generic addresses"
        assert count(code, "RED.", "ATOM") == 0


def test_aligned_logits_are_read_by_16_bytes(kernels):
    wide, narrow = kernels["sample_kernel<true>"], kernels["sample_kernel<false>"]
    assert wide["LDG.E.128"] > narrow["LDG.E.128"]
    assert wide["STG.E.128"] > narrow["STG.E.128"]


def assert_kept(found, kernel):
    assert not found, f"{kernel}:\n" + "\n".join(map(str, found))


def without(code, opcode):
    """The same without instructions whose names begin so: each must be missed by its rule."""
    assert any(instruction.opcode.startswith(opcode) for instruction in code.instructions)
    instructions = [
        replace(instruction, opcode="NOP") if instruction.opcode.startswith(opcode) else instruction
        for instruction in code.instructions
    ]
    return replace(code, instructions=instructions)


def test_registers_of_a_product_are_left_alone_until_its_wait(warpgroup_kernels):
    """And before it there is a fence: the compiler takes the products for ordinary instructions,
    and could move others in between (wgmma_settle)."""
    for kernel, code in warpgroup_kernels.items():
        assert_kept(sass_rules.touched_before_wait(code), kernel)
        assert sass_rules.touched_before_wait(without(code, "WARPGROUP.DEPBAR"))
        assert_kept(sass_rules.products_without_fence(code), kernel)
        assert sass_rules.products_without_fence(without(code, "WARPGROUP.ARRIVE"))


def test_warpgroups_stay_within_their_registers(warpgroup_kernels, cubins):
    launched = {usage.kernel: usage.registers for usage in kernel_report.usages(cubins)}
    for kernel, code in warpgroup_kernels.items():
        assert_kept(sass_rules.beyond_its_registers(code, launched[kernel]), kernel)
        only_less = without(code, "USETMAXREG.TRY_ALLOC")
        assert sass_rules.beyond_its_registers(only_less, launched[kernel])
        given_up = [i for i in code.instructions if i.opcode.startswith("USETMAXREG.DEALLOC")]
        assert given_up, kernel


def test_no_load_takes_memory_for_constant(kernels):
    """What one kernel of a decode step reads, another that overlaps with it may write, and a kernel
    that appends to a ring reads it. ld.global.nc is what a compiler makes of __restrict__."""
    for name, code in kernels.items():
        assert sass_rules.constant_loads(code) == [], name


def test_kernels_of_a_decode_step_can_overlap(disassembly):
    """They wait for those before them and let those after them begin, where the machine can."""
    names = ("attention_decode<", "linear_kernel<", "linear_rope_kernel<")
    names += ("shrink_kernel<", "expand_kernel<")  # of adapters
    overlapping = {name for name in disassembly[HOPPER] if name.startswith(names)}
    assert {name.partition("<")[0] + "<" for name in overlapping} == set(names)
    for arch, kernels in disassembly.items():
        for name, code in kernels.items():
            expected = int(arch == HOPPER and name in overlapping)
            assert (code["ACQBULK"], code["PREEXIT"]) == (expected, expected), (arch, name)


def test_overlapping_kernels_wait_before_they_touch_memory(listings):
    """All threads of them, on every way. Weights alone, by cp.async, may be under way before."""
    waiting = 0
    for _, texts in listings:
        for kernel, text in texts.items():
            if "ACQBULK" not in text:
                continue
            waiting += 1
            code = sass.parse(text)
            found = sass_rules.reached_before_wait(code)
            if kernel.startswith("linear"):
                assert found, kernel
                found = [instruction for instruction in found if instruction.kind != "LDGSTS"]
            assert_kept(found, kernel)
    assert waiting
