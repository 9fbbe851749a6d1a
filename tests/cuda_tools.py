"""The CUDA compiler, disassembler and oldest assembler, for tests of the kernels' code."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
from pathlib import Path
from typing import NoReturn

import kernel_report
import skipped

# The oldest CUDA that the kernels are to be built with, and the version of its PTX.
OLDEST_CUDA, OLDEST_PTX = "12.4", "8.4"


def missing(problem: str) -> NoReturn:
    skipped.skip_or_fail(problem, "MISTRAL_EXT_REQUIRE_CUDA_COMPILER")


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
