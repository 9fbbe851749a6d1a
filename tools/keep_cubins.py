"""Compiles a file and, if it holds kernels, keeps their PTX and machine code for the tests.

    CMAKE_CUDA_COMPILER_LAUNCHER="python;$PWD/tools/keep_cubins.py" pip install .

CMake puts this before each call of nvcc. The tests of the kernels' code (tests/cuda) and
tools/kernel_report.py then take what the build has made, and need not compile it again. A build
with options that change the code, such as CUDAFLAGS=-lineinfo, keeps nothing for them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import kernel_report

# Arguments of nvcc on which the code of a kernel does not depend. They are for the host's compiler,
# name files, or name the architectures, which `keep` tells apart. The arguments of the second list
# are followed by a value.
WITHOUT_EFFECT = re.compile(
    r"-forward-unknown-to-host-compiler|(-ccbin|-Xcompiler|--generate-code|-gencode)=.*"
    r"|-DMISTRAL_HOPPER|-MD|-c|.*\.cu"
)
WITHOUT_EFFECT_OF_VALUE = ("-ccbin", "-Xcompiler", "-isystem", "-MT", "-MF", "-x", "-o")


def makes_the_same_code(arguments: list[str]) -> bool:
    """Whether these arguments make the code that kernel_report.compile_kernels would make."""
    left, effective = iter(arguments), set()
    for argument in left:
        if argument in WITHOUT_EFFECT_OF_VALUE:
            next(left, None)
        elif not WITHOUT_EFFECT.fullmatch(argument):
            effective.add(argument)
    return effective == set(kernel_report.FLAGS)


def compile_and_keep(nvcc: str, arguments: list[str], source: Path) -> int:
    """Runs nvcc, with the assembler's report about the kernels; returns its exit status."""
    kernel_report.CUBINS.mkdir(parents=True, exist_ok=True)
    inputs = kernel_report.inputs_of(nvcc, source)  # before nvcc reads them: they may be edited
    with TemporaryDirectory(dir=kernel_report.CUBINS) as folder:
        command = [nvcc, *arguments, "--keep", f"--keep-dir={folder}", "--resource-usage"]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if result.returncode == 0:
            keep(Path(folder), inputs, source, result.stderr)
        sys.stderr.write(without_report(result.stderr))
        return result.returncode


def keep(folder: Path, inputs: str, source: Path, said: str) -> None:
    """Moves what nvcc has made of the inputs to where kernel_report.compile_kernels looks."""
    with kernel_report.alone():
        for ptx in folder.glob("*.ptx"):
            virtual = re.search(r"(?m)^\.target sm_(\w+)", ptx.read_text())[1]
            for arch in kernel_report.architectures():
                # The architecture is in the name if the PTX becomes code for several.
                names = [f".sm_{arch}.cubin", *([".cubin"] if arch == virtual else [])]
                for cubin in filter(Path.exists, map(ptx.with_suffix, names)):
                    kept = kernel_report.cubin_of(source, arch)
                    cubin.replace(kept)
                    kernel_report.seal(kept, inputs, report_for(f"sm_{arch}", said))
            kept = kernel_report.ptx_of(source, virtual)
            ptx.replace(kept)
            kernel_report.seal(kept, inputs, "")


def report_for(arch: str, said: str) -> str:
    """The part about kernels for one architecture, and every warning."""
    before, *parts = re.split(r"(?m)^(?=.*Compiling entry function)", said)
    of_others = [part for part in parts if f"for '{arch}'" not in part.splitlines()[0]]
    warnings = [line for part in of_others for line in part.splitlines(True) if "warning" in line]
    return "".join([before, *warnings, *(part for part in parts if part not in of_others)])


def without_report(said: str) -> str:
    """What a compiler says apart from the report, as if it had not been asked for one."""
    report = r"ptxas info .*\n|    \d+ bytes stack frame, .*\n"
    return re.sub(rf"(?m)^({report})", "", said)


def main() -> int:
    compiler, *arguments = sys.argv[1:]
    sources = [Path(argument) for argument in arguments if argument.endswith(".cu")]
    compiles = "-c" in arguments and sources  # else it links, or is tried by CMake
    if not compiles or not makes_the_same_code(arguments):
        return subprocess.run([compiler, *arguments]).returncode
    return compile_and_keep(compiler, arguments, sources[0].resolve())


if __name__ == "__main__":
    sys.exit(main())
