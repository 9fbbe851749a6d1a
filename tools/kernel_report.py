"""Writes tests/cuda/kernel_report.txt: what each CUDA kernel takes of a multiprocessor.

    python tools/kernel_report.py

Compiles the kernels in csrc/cuda with nvcc (CUDACXX, or the one on PATH) for every architecture.
tests/cuda/test_kernel_report.py compares the file with the kernels. Shared memory is the static
part that a kernel declares; launches add dynamic shared memory. A report names the compiler,
because another version allocates registers differently.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from itertools import chain, groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "cuda" / "kernel_report.txt"
CUBINS = ROOT / "build" / "cubins"
HOPPER = "90a"  # the only architecture of files whose names end in _sm90
INCLUDES = ROOT / "csrc" / "cuda" / "common"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DMISTRAL_CUDA", f"-I{INCLUDES}")


@dataclass(frozen=True, order=True)
class Usage:
    """What a kernel uses on an architecture. Memory is in bytes for each thread, `shared` in bytes
    for each block."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Cubin:
    """A source file compiled for one architecture."""

    arch: str  # sm_80
    path: Path
    ptx: Path  # the source of the assembler
    log: str  # the assembler's report about its kernels


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


@functools.cache
def nvcc_version(nvcc: str) -> str:
    """The version of nvcc, such as "13.0.88"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r", V([\d.]+)", text)[1]


def architectures() -> list[str]:
    """The architectures of a build for every GPU: ["80", "89", "90a"]."""
    text = (ROOT / "cmake" / "cuda.cmake").read_text()
    every = re.search(r"set\(every_architecture ([^)]*)\)", text)[1]
    return re.findall(r"(\w+)-real", every)


def ptx_architecture(arch: str) -> str:
    """The architecture of the PTX from which code for this one is assembled, as in the build."""
    return "80" if arch == "89" else arch


def compile_kernels(nvcc: str) -> list[Cubin]:
    """Compiles what has changed since the last call, two files at a time.

    A build with tools/keep_cubins.py counts as a call. Raises RuntimeError with the compiler's
    words if a file does not compile.
    """

    def compile_one(source: Path, archs: list[str]) -> list[Cubin]:
        inputs = inputs_of(nvcc, source)
        virtual = ptx_architecture(archs[0])
        ptx = ptx_of(source, virtual)
        flags = [*FLAGS, f"-arch=compute_{virtual}"]
        _make(ptx, inputs, [nvcc, *flags, "-ptx", source, "-o", ptx])
        cubins = []
        for arch in archs:
            code = cubin_of(source, arch)
            command = [nvcc, f"-arch=sm_{arch}", "--resource-usage", "-cubin", ptx, "-o", code]
            cubins.append(Cubin(f"sm_{arch}", code, ptx, _make(code, inputs, command)))
        return cubins

    groups = [list(group) for _, group in groupby(architectures(), ptx_architecture)]
    jobs = [
        (source, archs)
        for source in sorted((ROOT / "csrc").glob("cuda/**/*.cu"))
        for archs in groups
        if archs == [HOPPER] or not source.stem.endswith("_sm90")
    ]
    with alone(), ThreadPoolExecutor(2) as pool:
        return list(chain.from_iterable(pool.map(lambda job: compile_one(*job), jobs)))


def inputs_of(nvcc: str, source: Path) -> str:
    """A hash of all that the code of a file depends on."""
    csrc = ROOT / "csrc"
    headers = [*csrc.glob("*.h"), *csrc.glob("cuda/**/*.h"), *csrc.glob("cuda/**/*.cuh")]
    state = hashlib.sha256(f"{nvcc_version(nvcc)} {FLAGS}".encode())
    for path in (*sorted(headers), source):
        state.update(path.read_bytes())
    return state.hexdigest()


def ptx_of(source: Path, arch: str) -> Path:
    return CUBINS / f"{source.stem}.compute_{arch}.ptx"


def cubin_of(source: Path, arch: str) -> Path:
    return CUBINS / f"{source.stem}.sm_{arch}.cubin"


def reassemble(cubins: list[Cubin], ptxas: str, ptx_version: str) -> list[Cubin]:
    """Assembles the same PTX with another assembler. The PTX is relabelled with the version of PTX
    that this assembler knows.

    Raises RuntimeError with the assembler's words if it does not take a file.
    """
    version = subprocess.run([ptxas, "--version"], check=True, capture_output=True).stdout
    folder = CUBINS / f"ptx-{ptx_version}"

    def reassemble_one(cubin: Cubin) -> Cubin:
        code = folder / cubin.path.name
        ptx = code.with_suffix(".ptx")
        text = cubin.ptx.read_text()
        text = re.sub(r"(?m)^\.version .*$", f".version {ptx_version}", text, count=1)
        ptx.write_text(text)
        inputs = hashlib.sha256(version + text.encode()).hexdigest()
        command = [ptxas, "-v", f"-arch={cubin.arch}", ptx, "-o", code]
        return Cubin(cubin.arch, code, ptx, _make(code, inputs, command))

    with alone(), ThreadPoolExecutor(2) as pool:
        folder.mkdir(exist_ok=True)
        return list(pool.map(reassemble_one, cubins))


@contextmanager
def alone() -> Iterator[None]:
    """A lock. In the block, no other process makes cubins, because these would be the same
    files."""
    CUBINS.mkdir(parents=True, exist_ok=True)
    with open(CUBINS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(path: Path, inputs: str, command: list[str | Path]) -> str:
    """Runs the command, which writes `path`, unless that has been done; returns what it said."""
    log = _log(path)
    if not (path.exists() and log.exists() and log.read_text().startswith(inputs)):
        log.unlink(missing_ok=True)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{path.stem}:\n{result.stderr}{result.stdout}")
        seal(path, inputs, result.stderr)
    return log.read_text()


def _log(path: Path) -> Path:
    return path.with_name(path.name + ".log")


def seal(path: Path, inputs: str, said: str) -> None:
    """Writes a log beside a file that is finished.

    The log begins with the hash of the inputs. So no file that is unfinished or outdated is taken.
    """
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(f"{inputs}\n{said}")
    unfinished.replace(_log(path))


_SHORTER = (
    (r"mistral::|cuda::|\(anonymous namespace\)::|^void ", ""),
    (r"\(\w+\)(?=\d)", ""),  # the type of an enumerator: (WeightFormat)1
    (r"\(.*\)$", ""),  # the parameters
    ("__nv_bfloat16", "bf16"),
    ("__half", "fp16"),
    ("float", "fp32"),
)


def readable(mangled: list[str]) -> list[str]:
    """Names of kernels as short as they may be: rms_norm_kernel<bf16, 8>."""
    result = subprocess.run(
        ["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True
    )
    names = []
    for name in result.stdout.splitlines():
        for long, short in _SHORTER:
            name = re.sub(long, short, name)
        names.append(name)
    return names


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def usages(cubins: list[Cubin]) -> list[Usage]:
    """The usage of all kernels, in the order of the report."""
    found = []
    for cubin in cubins:
        parts = re.split(r"(?=Compiling entry function)", cubin.log)[1:]
        names = readable([_ENTRY.search(part)[1] for part in parts])
        for name, part in zip(names, parts, strict=True):
            registers, shared = _USED.search(part).groups()
            stack, stores, loads = map(int, _MEMORY.search(part).groups())
            found.append(
                Usage(name, cubin.arch, int(registers), int(shared or 0), stack, stores, loads)
            )
    return sorted(found)


def format_report(found: list[Usage], version: str) -> str:
    rows = [[field.name.replace("_", " ") for field in fields(Usage)]]
    rows += [[str(value) for value in astuple(usage)] for usage in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"nvcc {version}; memory in bytes. Made by tools/kernel_report.py.", ""]
    for name, arch, *numbers in rows:
        cells = [name.ljust(widths[0]), arch.ljust(widths[1])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("kernel_report: no nvcc found: put it on PATH or set CUDACXX")
    report = format_report(usages(compile_kernels(nvcc)), nvcc_version(nvcc))
    unfinished = REPORT.with_name(REPORT.name + ".part")
    unfinished.write_text(report)
    unfinished.replace(REPORT)
    print(report, end="")


if __name__ == "__main__":
    main()
