"""Decides how many threads a command may use, and how many it uses by default."""

from __future__ import annotations

import math
import os
from pathlib import Path

from mistral_ext.control_groups import OWN, ROOT, control_groups

_PROCESSORS = Path("/sys/devices/system/cpu")


def check_threads(threads: int | None) -> None:
    """Raises ValueError for a number of threads below 1, or far above the number of processors."""
    most = max(16, 4 * (os.cpu_count() or 1))  # the same limit as in csrc/cpu/parallel.cpp
    if threads is not None and not 1 <= threads <= most:
        raise ValueError(f"--threads is {threads}, expected 1 to {most}")


def default_threads(of_torch: int) -> int:
    """Returns the number of threads of a command without --threads.

    Args:
        of_torch: the number of threads that torch has chosen. Without MKL it is one for each
            logical processor.

    Returns:
        `of_torch` if the user has set the variable OMP_NUM_THREADS, which torch obeys. Otherwise
        the least of `of_torch`, the number of physical cores and the number of cores that the
        container allows, as far as these are known.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return of_torch
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    known = [cores for cores in (container_cores(), physical_cores(own)) if cores is not None]
    return min([of_torch, *known])


def physical_cores(processors: set[int], root: Path = _PROCESSORS) -> int | None:
    """Returns the number of physical cores of some logical processors, or None if it is unknown.

    The logical processors of a core share its arithmetic units and its way to memory, so a second
    thread on a core gains little.

    Args:
        processors: the numbers of the logical processors.
        root: the folder in which Linux lists processors.
    """
    try:
        siblings = {
            (root / f"cpu{i}" / "topology" / "thread_siblings_list").read_text() for i in processors
        }
    except OSError:
        return None
    return len(siblings) or None


def container_cores(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Returns the processor time that Linux allows this process's control groups, as a number of
    cores, rounded up.

    A container sees all cores of its machine. If its threads use more time than its quota allows,
    Linux stops all of them for the rest of each period. Threads that wait for each other lose
    the most by this.

    Args:
        root, own: as in `control_groups`.

    Returns:
        The number of cores, or None if there is no limit, or no limit that can be read.
    """
    limits = [_quota(*group) for group in control_groups("cpu", root, own)]
    cores = [limit for limit in limits if limit is not None]
    return math.ceil(min(cores)) if cores else None


def _quota(folder: Path, version_1: bool) -> float | None:
    """Returns the number of cores that a control group may use, or None if it sets no limit."""
    try:
        if version_1:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        # "max" and -1 mean that there is no limit.
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
