"""What the build makes of the compiler and the GPUs of a machine: CMakeLists.txt, cmake/cuda.cmake,
setup.py. The programs that it asks are scripts here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVERY = "80-real;89-real;90a-real;90-virtual"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder of programs that come first on PATH: add(name, what its shell script does)."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDACXX", "CUDAARCHS", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def add(name: str, script: str) -> Path:
        program = programs / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return program

    return add


def nvcc(version: str) -> str:
    """Knows its version and some GPUs, and compiles nothing."""
    return f"""case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.99" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_100\\n' ;;
  *) echo "nothing is compiled" >&2; exit 1 ;;
esac"""


def cmake() -> str:
    return shutil.which("cmake") or pytest.skip("no cmake found: pip install cmake")


def configure(folder: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    command = [cmake(), "-GNinja", f"-S{ROOT}", f"-B{folder}", f"-DMISTRAL_EXT_CUDA={cuda}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("version", ["11.8", "12.0", "12.3"])
def test_an_old_nvcc_leaves_the_cpu_side(machine, tmp_path, version):
    program = machine("nvcc", nvcc(version))
    result = configure(tmp_path / "build", "auto")
    assert result.returncode == 0, result.stderr
    expected = f"only the CPU side is built: {program} is of CUDA {version}, expected 12.4 or later"
    assert f"-- mistral_ext: {expected}\n" in result.stdout


def test_an_old_nvcc_is_an_error_where_cuda_is_asked_for(machine, tmp_path):
    program = machine("nvcc", nvcc("12.3"))
    result = configure(tmp_path / "build", "on")
    assert result.returncode != 0
    said = " ".join(result.stderr.split())
    assert f"MISTRAL_EXT_CUDA is on, but {program} is of CUDA 12.3, expected 12.4 or later" in said


def test_an_nvcc_that_does_not_work_leaves_the_cpu_side(machine, tmp_path):
    program = machine("nvcc", nvcc("12.4"))
    result = configure(tmp_path / "build", "auto")
    assert result.returncode == 0, result.stderr
    assert f"-- mistral_ext: only the CPU side is built: {program} compiles n" in result.stdout


def choose(tmp_path: Path, program: Path, *options: str) -> tuple[str, str]:
    """The architectures to build for, and why."""
    script = tmp_path / "choose.cmake"
    script.write_text(
        f"include({ROOT}/cmake/cuda.cmake)\n"
        f"choose_architectures(chosen why {program})\n"
        'message("${chosen}\n${why}")\n'
    )
    command = [cmake(), *options, "-P", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    chosen, why = result.stderr.splitlines()
    return chosen, why


@pytest.mark.parametrize(
    ("capabilities", "chosen", "why"),
    [
        (["9.0"], "90a-real", "the GPU here has compute capability 9.0"),
        (["8.0", "8.0"], "80-real", "the GPU here has compute capability 8.0"),
        (["7.5", "8.6"], "86-real", "the GPU here has compute capability 7.5, 8.6"),
        (["10.0", "9.0"], "100-real;90a-real", "the GPU here has compute capability 10.0, 9.0"),
        (["12.0"], EVERY, "the GPU here, of compute capability 12.0, is newer than nvcc"),
        (["7.5"], "", "the GPU here has compute capability 7.5, expected 8.0 or more"),
        (["[N/A]"], EVERY, "no GPU is visible here"),
    ],
)
def test_a_build_is_for_the_gpus_that_are_here(machine, tmp_path, capabilities, chosen, why):
    machine("nvidia-smi", "\n".join(f"echo '{capability}'" for capability in capabilities))
    actual = choose(tmp_path, machine("nvcc", nvcc("12.4")))
    assert actual[0] == chosen
    assert actual[1].startswith(why)


def test_an_old_gpu_does_not_matter_where_cuda_is_asked_for(machine, tmp_path):
    machine("nvidia-smi", "echo 7.5")
    actual = choose(tmp_path, machine("nvcc", nvcc("12.4")), "-DMISTRAL_EXT_CUDA=on")
    assert actual == (EVERY, "for other machines: the GPU here has compute capability 7.5")


@pytest.mark.parametrize("script", ["echo 9.0; exit 9", "echo 'Failed to initialize NVML: 9.0'>&2"])
def test_a_driver_that_does_not_work_is_no_gpu(machine, tmp_path, script):
    machine("nvidia-smi", script)
    actual = choose(tmp_path, machine("nvcc", nvcc("12.4")))
    assert actual == (EVERY, "no GPU is visible here")


@pytest.mark.parametrize(
    ("asked", "chosen"), [("80", "80"), ("86-real;75", "86-real;75"), ("all", EVERY)]
)
@pytest.mark.parametrize("how", ["option", "environment"])
def test_what_the_user_asks_for_counts(machine, tmp_path, monkeypatch, how, asked, chosen):
    machine("nvidia-smi", "echo 9.0")
    options = []
    if how == "option":
        options = [f"-DCMAKE_CUDA_ARCHITECTURES={asked}"]
        monkeypatch.setenv("CUDAARCHS", "89")
    else:
        monkeypatch.setenv("CUDAARCHS", asked)
    actual = choose(tmp_path, machine("nvcc", nvcc("12.4")), *options)
    assert actual == (chosen, "as asked for")


# What CMake takes from the environment when a tree is new, and CMAKE_ARGS.
KEPT = {
    "CXX": "clang++",
    "CXXFLAGS": "-g",
    "CMAKE_CXX_COMPILER_LAUNCHER": "ccache",
    "CUDAFLAGS": "-lineinfo",
    "CUDAHOSTCXX": "g++-12",
    "CMAKE_CUDA_COMPILER_LAUNCHER": "ccache",
    "LDFLAGS": "-s",
    "CMAKE_BUILD_TYPE": "Debug",
    "CMAKE_ARGS": "-DMISTRAL_EXT_NEWEST_ISA=avx2",
}


@pytest.fixture
def set_up(machine, tmp_path, monkeypatch):
    """Runs setup.py in a folder of its own, with a CMake that writes down its arguments.
    Returns these, and whether the tree of the build before was kept."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    log, source = tmp_path / "log", tmp_path / "source"
    (source / "mistral_ext").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", source)
    install = f'mkdir -p "$4"; touch "$4/_C{EXTENSION_SUFFIXES[0]}"'  # --install TREE --prefix "$4"
    script = f"""printf '%s\\n' "$@" >>'{log}'; if [ "$1" = --install ]; then {install}; fi"""
    machine("cmake", script)
    for name in KEPT:
        monkeypatch.delenv(name, raising=False)

    def run(folder: Path = source) -> tuple[list[str], bool]:
        log.unlink(missing_ok=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, check=True, timeout=120)
        (object_file,) = (tree / "object" for tree in folder.glob("build/cmake-*"))
        kept = object_file.exists()
        object_file.touch()
        return log.read_text().splitlines(), kept

    return run


def test_a_build_goes_on_in_its_tree(set_up, monkeypatch):
    monkeypatch.setenv("CXX", os.fsdecode(b"/compilers of \xdc/clang++"))  # not UTF-8
    assert [set_up()[1], set_up()[1]] == [False, True]


@pytest.mark.parametrize(("name", "value"), KEPT.items())
def test_other_settings_that_cmake_would_keep_make_the_tree_anew(set_up, monkeypatch, name, value):
    set_up()
    monkeypatch.setenv(name, value)
    assert not set_up()[1]
    monkeypatch.delenv(name)
    assert not set_up()[1]


def test_a_copied_tree_is_made_anew(set_up, tmp_path):
    """CMake refuses a tree that was made in another folder."""
    set_up()
    copy = shutil.copytree(tmp_path / "source", tmp_path / "copy", symlinks=True)
    assert not set_up(copy)[1]


def test_arguments_of_cmake_may_have_quotes(set_up, monkeypatch):
    monkeypatch.setenv("CMAKE_ARGS", "-DA=1 '-DCMAKE_CXX_FLAGS=-O1 -g'")
    arguments, _ = set_up()
    assert {"-DA=1", "-DCMAKE_CXX_FLAGS=-O1 -g"} <= {*arguments}


def test_clang_builds_what_gcc_does(tmp_path):
    """Clang 16 does not know F16C by its name, and links a specialised variable of a header twice
    if it is not inline."""
    names = ["clang++", *(f"clang++-{version}" for version in range(30, 13, -1))]
    found = [path for name in names if (path := shutil.which(name))]
    clang = found[0] if found else pytest.skip("no clang found: apt install clang")
    set_of_host = "MISTRAL_X86" if platform.machine() == "x86_64" else "MISTRAL_AARCH64"
    flags = ["-std=c++17", "-O0", "-Werror", f"-D{set_of_host}", "-DMISTRAL_ISA=scalar"]
    objects = []
    for source in ("processor", "linear/linear", "linear/backward"):
        objects.append(tmp_path / f"{Path(source).name}.o")
        command = [clang, *flags, "-c", ROOT / f"csrc/cpu/{source}.cpp", "-o", objects[-1]]
        subprocess.run(command, check=True, timeout=120)
    joined = [clang, "-r", "-nostdlib", *objects, "-o", tmp_path / "joined.o"]
    subprocess.run(joined, check=True, timeout=120)
