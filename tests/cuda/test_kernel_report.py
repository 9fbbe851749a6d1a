"""Registers, stack and spills of the CUDA kernels, against the report kept beside this file."""

from __future__ import annotations

import re

import kernel_report
import pytest
from cuda_tools import OLDEST_PTX, find_nvcc, find_oldest_ptxas


@pytest.fixture(scope="module")
def cubins():
    return kernel_report.compile_kernels(find_nvcc())


@pytest.fixture(scope="module")
def usages(cubins):
    return kernel_report.usages(cubins)


def test_report_is_of_these_kernels(usages):
    kept, version = kernel_report.REPORT.read_text(), kernel_report.nvcc_version(find_nvcc())
    if not kept.startswith(f"nvcc {version};"):
        pytest.skip(f"made with another compiler than nvcc {version}: {kept.split(';')[0]}")
    assert kept == kernel_report.format_report(usages, version), (
        "if it is meant, run: python tools/kernel_report.py"
    )


def test_every_kernel_is_compiled_for_every_architecture(usages):
    kernels = {usage.kernel for usage in usages}
    assert {kernel.split("<")[0] for kernel in kernels} >= {
        *("attention_decode", "attention_prefill", "dequantize_kernel", "linear_kernel"),
        *("linear_rope_kernel", "rms_norm_kernel", "rope_kernel", "sample_kernel", "swiglu_kernel"),
        *("rms_norm_backward_kernel", "rotate_kernel", "swiglu_backward_kernel"),
        *("attention_delta", "attention_backward_keys", "attention_backward_queries"),
        *("cross_entropy_kernel", "embedding_kernel", "lora_gradient_kernel"),
    }
    hopper = {kernel for kernel in kernels if "hopper" in kernel}
    assert len(hopper) == 4
    for arch in kernel_report.architectures():
        compiled = {usage.kernel for usage in usages if usage.arch == f"sm_{arch}"}
        assert compiled == (kernels if arch == kernel_report.HOPPER else kernels - hopper)


def test_every_kernel_has_a_name_of_its_own(usages):
    names = [(usage.kernel, usage.arch) for usage in usages]
    assert len(set(names)) == len(names)


def assert_no_warnings(cubins):
    for cubin in cubins:
        warnings = [line for line in cubin.log.splitlines() if re.search(r"warning|C75\d\d", line)]
        assert not warnings, cubin.path


def assert_no_local_memory(usages):
    """No spills and no arrays; and shared memory is dynamic: see csrc/cuda/common/runtime.cuh."""
    for usage in usages:
        memory = usage.stack, usage.spill_stores, usage.spill_loads, usage.shared
        assert memory == (0, 0, 0, 0), usage


def test_the_assembler_heeds_wgmma_and_setmaxnreg(cubins):
    """It says so in a warning if it serialises products, or ignores what registers a warpgroup is
    to have (C7508, C7510 and others)."""
    assert_no_warnings(cubins)


def test_warpgroups_share_all_registers(usages):
    """3 of 128 threads, of the 65536 registers of a multiprocessor, in steps of 8: setmaxnreg gives
    some of what the producer does not need to the others."""
    for usage in usages:
        if "hopper" in usage.kernel:
            assert usage.registers == 65536 // (3 * 128) // 8 * 8


def test_linear_kernels_of_few_tokens_leave_registers_for_two_blocks(usages):
    """8 warps each, of the 65536 registers of a multiprocessor: up to 16 tokens."""
    few = [
        usage for usage in usages if re.match(r"linear_(rope_)?kernel<.*, 1, [12], ", usage.kernel)
    ]
    assert few
    for usage in few:
        assert usage.registers <= 65536 // (2 * 8 * 32), usage


def test_nothing_is_spilled(usages):
    assert_no_local_memory(usages)


@pytest.mark.timeout(900)  # it assembles every kernel
def test_the_oldest_assembler_takes_the_kernels(cubins):
    """That of the oldest CUDA that is promised: without a warning, or a spill by its own choice of
    registers."""
    old = kernel_report.reassemble(cubins, find_oldest_ptxas(), OLDEST_PTX)
    usages = kernel_report.usages(old)
    assert [(usage.kernel, usage.arch) for usage in usages] == [
        (usage.kernel, usage.arch) for usage in kernel_report.usages(cubins)
    ]
    assert_no_warnings(old)
    assert_no_local_memory(usages)


def test_parses_what_the_assembler_says(tmp_path):
    """Also of kernels that break the rules, which ours do not."""
    log = """\
ptxas info    : Compiling entry function '_Z5twiceI6__halfEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z5twiceI6__halfEvPT_
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 794.589 ms
"""
    cubin = kernel_report.Cubin("sm_80", tmp_path / "none", tmp_path / "none", log)
    expected = kernel_report.Usage("twice<fp16>", "sm_80", 40, 512, 16, 24, 32)
    assert kernel_report.usages([cubin]) == [expected]
