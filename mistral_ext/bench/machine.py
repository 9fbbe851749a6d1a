"""Finds the properties of a machine and its software on which speed depends."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from mistral_ext import __version__, ops


def software_and_processor() -> dict[str, Any]:
    """Returns the versions of the software on which speed depends, and properties of the machine.
    Memory is in bytes."""
    return {
        "mistral_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "memory": memory_bytes(),
        "load": os.getloadavg()[0],  # the mean number of busy processes in the last minute
        "threads": torch.get_num_threads(),
        "isa": ops.active_isa(),
    }


def processor_name() -> str:
    """Returns the processor's own name, or its architecture if the system does not know the
    name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """The bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_busy(facts: dict[str, Any]) -> bool:
    """Whether other processes use so much of the cores that measured times would be too long.
    `facts` is the result of `software_and_processor`."""
    return bool(facts["load"] + facts["threads"] > facts["cores"] + 0.5)


def resident_bytes() -> int | None:
    """The bytes of memory that this process uses, including mapped files. Returns None if the
    system does not report this."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
