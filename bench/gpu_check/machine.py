"""Makes the extension importable, and writes the facts of the machine as JSON.

    python -m gpu_check.machine FILE [--build FOLDER] [--compile] [--stand-in]

The extension is imported from this checkout. --build puts the one of a folder there, made
beforehand for the same version of Python; --compile builds it for the GPU at hand. A fact that is
false leaves out the steps that need it. --stand-in tells of a GPU that is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# In a process of its own: a module made for something else may end the one that imports it.
_PROBE = """
import json, torch
from mistral_ext import _C
sm90 = _C.cuda_architectures is not None and "sm90" in _C.attention_kernels()
print(json.dumps({"architectures": _C.cuda_architectures, "sm90": sm90}))
"""
_DEVICE = """
import json, torch
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "gpu": properties.name,
    "capability": [properties.major, properties.minor],
    "memory_bytes": properties.total_memory,
    "free_bytes": torch.cuda.mem_get_info()[0],
}))
"""


def output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def ask(program: str) -> dict[str, Any]:
    """Runs a program and returns the JSON that it prints, or {"error": its last words} if it prints
    none."""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    try:
        return json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": (result.stderr.strip() or f"exit status {result.returncode}")[-500:]}


def take(folder: Path) -> str | None:
    """Puts the extension of a folder into this checkout. Returns what was wrong, or None."""
    for suffix in EXTENSION_SUFFIXES:
        for module in sorted(folder.rglob(f"_C{suffix}")):
            target = ROOT / "mistral_ext" / module.name
            if module.resolve() != target.resolve():
                unfinished = target.with_name(target.name + ".part")
                shutil.copyfile(module, unfinished)
                unfinished.replace(target)
            return None
    return f"{folder} has no _C{EXTENSION_SUFFIXES[0]}, the extension for this version of Python"


def compile_extension() -> None:
    arguments = "-DCMAKE_CUDA_ARCHITECTURES=native -DCMAKE_CUDA_FLAGS=-lineinfo "
    environment = os.environ | {
        "MISTRAL_EXT_CUDA": "on",
        "CMAKE_ARGS": arguments + os.environ.get("CMAKE_ARGS", ""),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def versions() -> dict[str, Any]:
    """The versions that figures depend on; None if a version cannot be found."""
    nvcc = re.search(r", (V[\d.]+)", output_of("nvcc", "--version") or "")
    torch = ask("import json, torch; print(json.dumps([torch.__version__, torch.version.cuda]))")
    return {
        "commit": output_of("git", "rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "changed": bool(output_of("git", "status", "--porcelain")),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "torch": torch if isinstance(torch, list) else None,
        "nvcc": nvcc[1] if nvcc else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def facts(stand_in: bool) -> dict[str, Any]:
    module = ask(_PROBE)
    device = {"gpu": "stand-in", "capability": [9, 0]} if stand_in else ask(_DEVICE)
    unbuilt = module.get("error") or (
        None if stand_in or module["architectures"] else "it is a build without CUDA"
    )
    return {
        **versions(),
        **device,
        "architectures": module.get("architectures"),
        "device": "error" not in device,
        "unbuilt": unbuilt,
        "sm90": stand_in or (device.get("capability") == [9, 0] and bool(module.get("sm90"))),
        "sanitizer": stand_in or shutil.which("compute-sanitizer") is not None,
        "transformers": find_spec("transformers") is not None,
        "xdist": find_spec("xdist") is not None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--build", type=Path, metavar="FOLDER")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    if options.build and (problem := take(options.build)):
        print(problem)
    if options.compile:
        compile_extension()
    found = facts(options.stand_in)
    unfinished = options.file.with_name(options.file.name + ".part")
    unfinished.write_text(json.dumps(found, indent=2) + "\n")
    unfinished.replace(options.file)
    print(f"{found['gpu']}, torch {found['torch']}" if found["device"] else found["error"])
    if found["unbuilt"]:
        print(f"the extension has to be built: {found['unbuilt']}")


if __name__ == "__main__":
    main()
