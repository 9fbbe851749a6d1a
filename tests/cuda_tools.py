"""The CUDA compiler, disassembler and oldest assembler, for tests of the kernels' code."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
from collections import Counter
from pathlib import Path

import kernel_report
import pytest

# The oldest CUDA that the kernels are to be built with, and the version of its PTX.
OLDEST_CUDA, OLDEST_PTX = "12.4", "8.4"


def missing(problem: str) -> None:
    """Skips the test; with MISTRAL_EXT_REQUIRE_CUDA_COMPILER=1, as in CI, that is a failure."""
    if os.environ.get("MISTRAL_EXT_REQUIRE_CUDA_COMPILER") == "1":
        pytest.fail(problem)
    pytest.skip(problem)


def find_nvcc() -> str:
    nvcc = kernel_report.find_nvcc()
    if nvcc is None:
        missing("no nvcc found: put it on PATH or set CUDACXX")
    return nvcc


def _packaged() -> list[Path]:
    """Folders of programs that packages of NVIDIA's from PyPI have installed."""
    packages = (*site.getsitepackages(), site.getusersitepackages())
    return [folder for place in packages for folder in sorted(Path(place).glob("nvidia/*/bin"))]


def find_nvdisasm() -> str:
    """Beside nvcc, on PATH, or from the package nvidia-cuda-nvdisasm."""
    folders = [Path(find_nvcc()).parent, "/usr/local/cuda/bin", *_packaged()]
    path = os.pathsep.join(map(str, (*folders, os.environ.get("PATH", ""))))
    nvdisasm = shutil.which("nvdisasm", path=path)
    if nvdisasm is None:
        missing("no nvdisasm found: pip install nvidia-cuda-nvdisasm")
    return nvdisasm


def find_oldest_ptxas() -> str:
    """That of OLDEST_CUDA, from the package nvidia-cuda-nvcc-cu12."""
    for ptxas in (folder / "ptxas" for folder in _packaged()):
        if ptxas.exists():
            said = subprocess.run([ptxas, "--version"], check=True, capture_output=True, text=True)
            if re.search(rf"release {re.escape(OLDEST_CUDA)},", said.stdout):
                return str(ptxas)
    missing(
        f"no ptxas of CUDA {OLDEST_CUDA} found: "
        f"pip install --no-deps 'nvidia-cuda-nvcc-cu12=={OLDEST_CUDA}.*'"
    )


_SECTION = re.compile(r"\.text\.(\w+):$")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def instructions(cubin: Path, nvdisasm: str) -> dict[str, Counter[str]]:
    """How often a kernel has each instruction: {"swiglu_kernel<bf16, 8>": {"LDG.E.128": 2, ...}}"""
    text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True)
    found: dict[str, Counter[str]] = {}
    for line in text.stdout.splitlines():
        if section := _SECTION.match(line):
            kernel = found[section[1]] = Counter()
        elif instruction := _INSTRUCTION.match(line):
            kernel[instruction[1]] += 1
    return dict(zip(kernel_report.readable(list(found)), found.values(), strict=True))
