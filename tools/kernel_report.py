"""Writes tests/kernel_report.txt: what each CUDA kernel takes of a multiprocessor.

    python tools/kernel_report.py

Compiles csrc/cuda/*.cu with nvcc (CUDACXX, or the one on PATH) for every architecture.
tests/test_kernel_report.py compares the file with the kernels as they are. Shared memory is what
a kernel declares itself; what it is launched with comes on top. A report names the compiler,
because another version allocates registers differently.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "kernel_report.txt"
CUBINS = ROOT / "build" / "cubins"
HOPPER = "90a"  # the architecture of files that are called *_hopper.cu, and no other's
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DMISTRAL_CUDA", f"-I{ROOT / 'csrc' / 'cuda'}")


@dataclass(frozen=True, order=True)
class Usage:
    """One kernel on one architecture; memory in bytes, of a thread but for `shared`."""

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
    log: str  # what the assembler says about its kernels


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


@functools.cache
def nvcc_version(nvcc: str) -> str:
    """As in "13.0.88"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r", V([\d.]+)", text)[1]


def architectures() -> list[str]:
    """Those that a build for every GPU makes machine code for: ["80", "89", "90a"]."""
    text = (ROOT / "cmake" / "cuda.cmake").read_text()
    every = re.search(r"set\(every_architecture ([^)]*)\)", text)[1]
    return re.findall(r"(\w+)-real", every)


def compile_kernels(nvcc: str) -> list[Cubin]:
    """Compiles what has changed since the last call, two files at a time.

    RuntimeError with the compiler's words if a file does not compile.
    """
    CUBINS.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    headers = sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*.h"), *csrc.glob("cuda/*.cuh")])
    shared = hashlib.sha256(f"{nvcc_version(nvcc)} {FLAGS}".encode())
    for header in headers:
        shared.update(header.read_bytes())

    def compile_one(source: Path, arch: str) -> Cubin:
        cubin = CUBINS / f"{source.stem}.sm_{arch}.cubin"
        log = cubin.with_suffix(".log")  # the state of the source that it is of, then the log
        state = shared.copy()
        state.update(source.read_bytes())
        if not (cubin.exists() and log.exists() and log.read_text().startswith(state.hexdigest())):
            unfinished = cubin.with_suffix(f".{os.getpid()}")
            target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
            command = [nvcc, *FLAGS, target, "--resource-usage", "-cubin", source, "-o", unfinished]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{source.name} for sm_{arch}:\n{result.stderr}")
            log.unlink(missing_ok=True)
            unfinished.replace(cubin)
            unfinished.write_text(f"{state.hexdigest()}\n{result.stderr}")
            unfinished.replace(log)
        return Cubin(f"sm_{arch}", cubin, log.read_text())

    sources = sorted(csrc.glob("cuda/*.cu"))
    jobs = [
        (source, arch)
        for source in sources
        for arch in architectures()
        if arch == HOPPER or not source.stem.endswith("_hopper")
    ]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: compile_one(*job), jobs))


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
    """Of all kernels, in the order of the report."""
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
