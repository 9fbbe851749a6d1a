"""Builds mistral_ext._C with CMake; everything else is declared in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# CMake takes what these say when a tree is new, and keeps it.
KEPT = (
    *("CXX", "CXXFLAGS", "CMAKE_CXX_COMPILER_LAUNCHER"),
    *("CUDAFLAGS", "CUDAHOSTCXX", "CMAKE_CUDA_COMPILER_LAUNCHER"),
    *("LDFLAGS", "CMAKE_BUILD_TYPE", "CMAKE_ARGS"),
)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        # One tree per Python version, kept between builds: a rebuild compiles what changed.
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # A copied tree does not work where it was copied to, and so the folder counts too.
        lines = [str(ROOT), *(f"{name}={os.environ.get(name, '')}" for name in KEPT)]
        settings = os.fsencode("\n".join(lines))
        stamp = tree / "settings.txt"
        if tree.exists() and not (stamp.exists() and stamp.read_bytes() == settings):
            shutil.rmtree(tree)
        tree.mkdir(parents=True, exist_ok=True)
        stamp.write_bytes(settings)
        subprocess.run(
            [
                "cmake",
                "-GNinja",
                # Look for these anew: pip's isolated ninja is gone by the next build, nvcc may
                # have come, or be unwanted now, and so may GPUs.
                "-UCMAKE_MAKE_PROGRAM",
                "-UCMAKE_CUDA_COMPILER",
                "-UCMAKE_CUDA_ARCHITECTURES",
                f"-S{ROOT}",
                f"-B{tree}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DMISTRAL_EXT_CUDA={os.environ.get('MISTRAL_EXT_CUDA', 'auto').lower()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", tree], check=True)
        # Into the wheel, and into this folder too: Python started here finds mistral_ext in the
        # current directory before the installed one.
        for prefix in {target, ROOT / "mistral_ext"}:
            subprocess.run(["cmake", "--install", tree, "--prefix", prefix], check=True)
        commands = ROOT / "build" / "compile_commands.json"  # where clangd looks
        commands.unlink(missing_ok=True)
        commands.symlink_to(tree / commands.name)


setup(ext_modules=[Extension("mistral_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
