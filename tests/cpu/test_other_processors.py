"""The kernels of every instruction set against the scalar kernels (tests/isas): the sets of x86
that this processor runs, AVX-VNNI with its instructions emulated elsewhere, and aarch64 in qemu."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import backends
import pytest
import skipped

from mistral_ext import _C, ops

SOURCES = Path(__file__).parents[1] / "isas"


def lacks(need: str) -> NoReturn:
    skipped.skip_or_fail(f"tests/isas needs {need}", "MISTRAL_EXT_REQUIRE_EMULATOR")


def run(*command: object) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def build(name: str, *settings: str) -> Path:
    folder = backends.BUILDS / name
    with backends.alone_in(folder):
        again = "-UCMAKE_MAKE_PROGRAM"  # as in backends.py
        run("cmake", "-GNinja", again, f"-S{SOURCES}", f"-B{folder}", *settings)
        run("cmake", "--build", folder)
    return folder / "compare"


@pytest.mark.timeout(1200)  # a minute of two cores, for the compiler most of all
def test_aarch64():
    """Every kernel of neon and neon_bf16, and the products of neon_dotprod and neon_i8mm."""
    for tool in ("cmake", "ninja", "aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            lacks(f"{tool} (Debian: cmake, ninja-build, g++-aarch64-linux-gnu, qemu-user)")
    compare = build("isas-aarch64", f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'aarch64.cmake'}")
    emulator = "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"
    text = run(*emulator, "-cpu", "max", compare)
    for name in ("neon", "neon_dotprod", "neon_bf16", "neon_i8mm"):
        assert f"\n{name}: " in f"\n{text}"
    # The first aarch64 has no dot product, so its instructions would be illegal there.
    text = run(*emulator, "-cpu", "cortex-a53", compare, "none")
    assert text.startswith("neon in use\n")


@pytest.fixture
def library():
    """The kernels of the extension's build tree, avxvnni's among them."""
    if "avx2" not in ops.supported_isas():
        pytest.skip("this processor lacks AVX2")
    path = backends.BUILDS / f"cmake-{sys.implementation.cache_tag}" / "libcpu.a"
    if platform.system() != "Linux" or not path.exists():
        lacks("the build tree of the extension, on Linux")
    if b"7avxvnni6linear" not in path.read_bytes():  # a part of a function's mangled name
        lacks("kernels for avxvnni: GCC 11, and a MISTRAL_EXT_NEWEST_ISA that includes them")
    return path


@pytest.mark.timeout(1200)
def test_x86(library):
    """Every set that this processor runs, and avxvnni."""
    compare = build("isas", f"-DCPU_LIBRARY={library}")
    text = run(compare)
    compared = {*ops.supported_isas(), "avxvnni"} - {"scalar"}
    for name in compared:
        assert f"\n{name}: " in f"\n{text}"
    if "avxvnni" not in ops.supported_isas():
        assert "avxvnni: 0 instructions were emulated" not in text


@pytest.mark.usefixtures("library")
def test_the_compiled_module_holds_the_instructions_of_avxvnni():
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump found")
    text = run(objdump, "-d", "--no-show-raw-insn", _C.__file__)
    for name in ("vpdpbusd", "vpdpwssd"):
        assert f"{{vex}} {name}" in text
