"""A build with tools/keep_cubins.py leaves its kernels to the tests of their code."""

from __future__ import annotations

import subprocess
import sys

import keep_cubins
import kernel_report
import pytest
from cuda_tools import find_nvcc

KERNEL = "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel in a tree of its own."""
    file = tmp_path / "csrc" / "cuda" / "twice.cu"
    file.parent.mkdir(parents=True)
    file.write_text(KERNEL)
    architectures = kernel_report.architectures()
    monkeypatch.setattr(kernel_report, "architectures", lambda: architectures)
    monkeypatch.setattr(kernel_report, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_report, "CUBINS", tmp_path / "cubins")
    return file


def compile_for(source, *targets):
    """As CMake has nvcc do it: targets such as arch=compute_80,code=sm_80."""
    options = [f"-gencode={target}" for target in targets]
    arguments = [*options, "-c", str(source), "-o", str(source.with_suffix(".o"))]
    return keep_cubins.compile_and_keep(find_nvcc(), arguments, source)


def when_made():
    files = sorted(kernel_report.CUBINS.glob("*.*"))
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_kernels_of_the_build_are_not_compiled_again(source, capfd):
    for_80 = ("arch=compute_80,code=sm_80", "arch=compute_80,code=sm_89")
    others = ("arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
    assert compile_for(source, *for_80, *others) == 0
    assert source.with_suffix(".o").exists()
    assert capfd.readouterr().err == ""
    kept = when_made()

    cubins = kernel_report.compile_kernels(find_nvcc())

    assert [cubin.arch for cubin in cubins] == ["sm_80", "sm_89", "sm_90a"]
    assert [(usage.kernel, usage.arch) for usage in kernel_report.usages(cubins)] == [
        ("twice", cubin.arch) for cubin in cubins
    ]
    assert when_made() == kept


def test_what_the_build_lacks_or_has_of_other_sources_is_compiled(source, monkeypatch):
    run = subprocess.run

    def run_and_edit(command, **options):
        result = run(command, **options)
        if "--keep" in command:
            source.write_text(KERNEL.replace("twice", "thrice"))
        return result

    monkeypatch.setattr(subprocess, "run", run_and_edit)
    assert compile_for(source, "arch=compute_90a,code=sm_90a") == 0
    files = ["twice.compute_90a.ptx", "twice.sm_90a.cubin"]
    assert sorted(when_made()) == sorted([*files, *(f"{file}.log" for file in files)])
    cubins = kernel_report.compile_kernels(find_nvcc())
    assert {usage.kernel for usage in kernel_report.usages(cubins)} == {"thrice"}
    assert len(cubins) == 3


def arguments_of_the_build(*others):
    """As CMake puts them together for a release."""
    flags = ["-forward-unknown-to-host-compiler", "-DMISTRAL_HOPPER", *kernel_report.FLAGS]
    targets = ["--generate-code=arch=compute_80,code=[sm_80]", "-Xcompiler=-fPIC"]
    files = ["-isystem", "/cuda/include", "-MD", "-MT", "a.o", "-MF", "a.d", "-x", "cu"]
    return [*flags, *targets, *others, *files, "-c", "/csrc/cuda/a.cu", "-o", "a.o"]


def test_the_code_of_a_release_is_kept():
    assert keep_cubins.makes_the_same_code(arguments_of_the_build())


@pytest.mark.parametrize("other", ["-G", "-lineinfo", "-use_fast_math", "-DX", "-maxrregcount=64"])
def test_code_of_other_options_is_not_kept(other):
    assert not keep_cubins.makes_the_same_code(arguments_of_the_build(other))


def test_code_without_the_options_of_a_release_is_not_kept():
    debug = [argument for argument in arguments_of_the_build() if argument != "-DNDEBUG"]
    assert not keep_cubins.makes_the_same_code(debug)


@pytest.mark.parametrize(("others", "keeps"), [((), True), (("-G",), False)])
def test_only_a_release_leaves_its_kernels(source, monkeypatch, others, keeps):
    options = [*kernel_report.FLAGS, *others, "-gencode=arch=compute_80,code=sm_80"]
    files = ["-c", str(source), "-o", str(source.with_suffix(".o"))]
    monkeypatch.setattr(sys, "argv", ["keep_cubins.py", find_nvcc(), *options, *files])
    assert keep_cubins.main() == 0
    assert source.with_suffix(".o").exists()
    assert ("twice.sm_80.cubin" in when_made()) == keeps


def test_a_mistake_is_reported_and_leaves_nothing(source, capfd):
    source.write_text("no kernel")
    assert compile_for(source, "arch=compute_80,code=sm_80") != 0
    assert "error" in capfd.readouterr().err
    assert when_made() == {}


def test_a_report_is_of_one_architecture_and_has_all_warnings():
    parts = {
        arch: f"ptxas info    : Compiling entry function 'k' for '{arch}'\n"
        "ptxas info    : Function properties for k\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        f"ptxas info    : Used {registers} registers\n"
        for arch, registers in (("sm_80", 40), ("sm_90a", 50))
    }
    warning = "ptxas warning : (C7508) Potential Performance Loss\n"
    said = "ptxas info    : 0 bytes gmem\n" + parts["sm_80"] + warning + parts["sm_90a"]
    of_80 = keep_cubins.report_for("sm_80", said)
    assert of_80 == "ptxas info    : 0 bytes gmem\n" + parts["sm_80"] + warning
    of_90 = keep_cubins.report_for("sm_90a", said)
    assert of_90 == "ptxas info    : 0 bytes gmem\n" + warning + parts["sm_90a"]
    assert keep_cubins.without_report(said) == warning
