"""The CUDA compiler and disassembler, for tests of what becomes of the kernels."""

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


def find_nvdisasm() -> str:
    """Beside nvcc, on PATH, or from the package nvidia-cuda-nvdisasm."""
    folders = [Path(find_nvcc()).parent, "/usr/local/cuda/bin"]
    for packages in (*site.getsitepackages(), site.getusersitepackages()):
        folders += sorted(Path(packages).glob("nvidia/*/bin"))
    path = os.pathsep.join(map(str, (*folders, os.environ.get("PATH", ""))))
    nvdisasm = shutil.which("nvdisasm", path=path)
    if nvdisasm is None:
        missing("no nvdisasm found: pip install nvidia-cuda-nvdisasm")
    return nvdisasm


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
