"""How many threads a command may use, and uses unless it is told."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_PROCESSORS = Path("/sys/devices/system/cpu")


def check_threads(threads: int | None) -> None:
    """ValueError for a number of threads below 1, or far above the number of processors."""
    most = max(16, 4 * (os.cpu_count() or 1))  # as csrc/cpu/parallel.cpp
    if threads is not None and not 1 <= threads <= most:
        raise ValueError(f"--threads is {threads}, expected 1 to {most}")


def default_threads(of_torch: int) -> int:
    """The threads of a command without --threads.

    Args:
        of_torch: what torch begins with. A torch without MKL begins with a thread for each logical
            processor.

    Returns:
        At most the physical cores, and what the container allows. A number in OMP_NUM_THREADS, from
        which torch begins, is the user's and stays.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return of_torch
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    known = [cores for cores in (container_cores(), physical_cores(own)) if cores is not None]
    return min([of_torch, *known])


def physical_cores(processors: set[int], root: Path = _PROCESSORS) -> int | None:
    """The cores that the logical processors are threads of, as Linux lists them; None: unknown.

    Two threads of a core share its arithmetic and its way to memory, so a second one gains nothing.
    """
    try:
        siblings = {
            (root / f"cpu{i}" / "topology" / "thread_siblings_list").read_text() for i in processors
        }
    except OSError:
        return None
    return len(siblings) or None


def container_cores(root: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int | None:
    """The processor time that Linux gives this process's control groups, in cores, rounded up.

    A container sees all cores of its machine. With more threads than its quota the kernel stops all
    of them for the rest of each period, and those that wait for each other lose the most.

    Args:
        root: where control groups are mounted, version 2 or 1.
        own: lists the groups of this process.

    Returns:
        None: there is no limit, or none that can be read.
    """
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for controllers, group in groups:
        version_1 = "cpu" in controllers.split(",")
        if controllers and not version_1:
            continue
        mount = root / "cpu" if version_1 else root
        # The limit of a parent holds for its children. A container may see its own group as root.
        folder = mount / group.lstrip("/")
        for place in (folder, *folder.parents):
            limits.append(_quota(place, version_1))
            if place == mount:
                break
    cores = [limit for limit in limits if limit is not None]
    return math.ceil(min(cores)) if cores else None


def _quota(folder: Path, version_1: bool) -> float | None:
    """Cores that a control group may use."""
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
