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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "cuda" / "kernel_report.txt"
CUBINS = ROOT / "build" / "cubins"
HOPPER = "90a"  # the only architecture of files whose names end in _sm90
INCLUDES = ROOT / "csrc" / "cuda" / "common"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DMISTRAL_CUDA", f"-I{INCLUDES}")


@dataclass(frozen=True, order=True)
class Usage:
    """The usage of a kernel on an architecture; memory in bytes of a thread (`shared`: a block)."""

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
    """As in "13.0.88"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r", V([\d.]+)", text)[1]


def architectures() -> list[str]:
    """The architectures of a build for every GPU: ["80", "89", "90a"]."""
    text = (ROOT / "cmake" / "cuda.cmake").read_text()
    every = re.search(r"set\(every_architecture ([^)]*)\)", text)[1]
    return re.findall(r"(\w+)-real", every)


def compile_kernels(nvcc: str) -> list[Cubin]:
    """Compiles what has changed since the last call, two files at a time.

    RuntimeError with the compiler's words if a file does not compile.
    """
    csrc = ROOT / "csrc"
    headers = sorted([*csrc.glob("*.h"), *csrc.glob("cuda/**/*.h"), *csrc.glob("cuda/**/*.cuh")])
    shared = hashlib.sha256(nvcc_version(nvcc).encode())
    for header in headers:
        shared.update(header.read_bytes())

    def compile_one(source: Path, arch: str) -> Cubin:
        state = shared.copy()
        state.update(source.read_bytes())
        place = CUBINS / f"{source.stem}.sm_{arch}"
        ptx, code = f"{place}.ptx", f"{place}.cubin"
        return _make(
            place,
            f"sm_{arch}",
            state.hexdigest(),
            # in two steps, to keep the PTX
            [nvcc, *FLAGS, f"-arch=compute_{arch}", "-ptx", source, "-o", ptx],
            [nvcc, f"-arch=sm_{arch}", "--resource-usage", "-cubin", ptx, "-o", code],
        )

    sources = sorted(csrc.glob("cuda/**/*.cu"))
    jobs = [
        (source, arch)
        for source in sources
        for arch in architectures()
        if arch == HOPPER or not source.stem.endswith("_sm90")
    ]
    with _alone(), ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: compile_one(*job), jobs))


def reassemble(cubins: list[Cubin], ptxas: str, ptx_version: str) -> list[Cubin]:
    """The same PTX through another assembler, labelled with the version that this one has of it.

    RuntimeError with the assembler's words if it does not take a file.
    """
    version = subprocess.run([ptxas, "--version"], check=True, capture_output=True).stdout
    folder = CUBINS / f"ptx-{ptx_version}"

    def reassemble_one(cubin: Cubin) -> Cubin:
        place = folder / cubin.path.stem
        ptx, code = Path(f"{place}.ptx"), f"{place}.cubin"
        text = cubin.ptx.read_text()
        text = re.sub(r"(?m)^\.version .*$", f".version {ptx_version}", text, count=1)
        ptx.write_text(text)
        state = hashlib.sha256(version + text.encode()).hexdigest()
        command = [ptxas, "-v", f"-arch={cubin.arch}", ptx, "-o", code]
        return _make(place, cubin.arch, state, command)

    with _alone(), ThreadPoolExecutor(2) as pool:
        folder.mkdir(exist_ok=True)
        return list(pool.map(reassemble_one, cubins))


@contextmanager
def _alone() -> Iterator[None]:
    """A lock: in the block, no other process makes cubins, which would be the same."""
    CUBINS.mkdir(parents=True, exist_ok=True)
    with open(CUBINS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(place: Path, arch: str, inputs: str, *commands: list[str | Path]) -> Cubin:
    """Runs the commands, which write `place`.ptx and .cubin, unless that has been done.

    The log is written last and begins with a hash of the inputs and the commands: so nothing
    unfinished or outdated is taken.
    """
    state = hashlib.sha256(f"{inputs} {commands}".encode()).hexdigest()
    cubin, ptx, log = (Path(f"{place}.{kind}") for kind in ("cubin", "ptx", "log"))
    done = all(path.exists() for path in (cubin, ptx, log)) and log.read_text().startswith(state)
    if not done:
        log.unlink(missing_ok=True)
        said = ""
        for command in commands:
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{place.name}:\n{result.stderr}{result.stdout}")
            said += result.stderr
        unfinished = Path(f"{place}.part")
        unfinished.write_text(f"{state}\n{said}")
        unfinished.replace(log)
    return Cubin(arch, cubin, ptx, log.read_text())


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
