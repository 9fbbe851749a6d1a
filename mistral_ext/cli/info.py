"""`mistral-ext info`: show the version, the instruction set and the devices."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_ext.cli import options
from mistral_ext.cli.start import start

if TYPE_CHECKING:
    from mistral_ext._C import _Device


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "info",
        parents=[options.common()],
        help="show the version, the instruction set and the devices",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start(args)
    import torch

    from mistral_ext import _C, __version__, ops
    from mistral_ext.llm import DEMO_MODEL

    lines = {
        "mistral_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor_name(),
        "instruction set": f"{ops.active_isa()} (of {', '.join(ops.supported_isas())})",
        "threads": str(torch.get_num_threads()),
        "demo model": str(DEMO_MODEL),
    }
    found = _C.cuda_devices()
    if found is None:
        lines["CUDA"] = "not in this build (no nvcc was found, or MISTRAL_EXT_CUDA=off)"
    else:
        devices, problem = found
        lines["CUDA"] = f"built for {_C.cuda_architectures}"
        lines["CUDA devices"] = "; ".join(map(_describe, devices)) or f"none ({problem})"
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    return 0


def _describe(device: _Device) -> str:
    major, minor = device["capability"]
    return (
        f"{device['name']} (sm_{major}{minor}, {device['multiprocessors']} multiprocessors, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB)"
    )


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
