"""The number of threads that a command may use, and the number that it uses by default."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_PROCESSORS = Path("/sys/devices/system/cpu")


def check_threads(threads: int | None) -> None:
    """Raises ValueError for a number of threads below 1, or far above the number of processors."""
    most = max(16, 4 * (os.cpu_count() or 1))  # the same limit as in csrc/cpu/parallel.cpp
    if threads is not None and not 1 <= threads <= most:
        raise ValueError(f"--threads is {threads}, expected 1 to {most}")


def default_threads(of_torch: int) -> int:
    """The number of threads of a command without --threads.

    Args:
        of_torch: the number of threads with which torch begins. Without MKL it is one for each
            logical processor.

    Returns:
        `of_torch` if the user has set OMP_NUM_THREADS, with which torch begins. Otherwise the least
        of `of_torch`, the number of physical cores and what the container allows, as far as these
        are known.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return of_torch
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    known = [cores for cores in (container_cores(), physical_cores(own)) if cores is not None]
    return min([of_torch, *known])


def physical_cores(processors: set[int], root: Path = _PROCESSORS) -> int | None:
    """The number of physical cores of these logical processors, as Linux lists them, or None if it
    is unknown.

    The threads of a core share its arithmetic and its way to memory, so a second thread gains
    little.
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

    A container sees all cores of its machine. If it runs more threads than its quota allows, the
    kernel stops all of them for the rest of each period. Threads that wait for each other lose the
    most.

    Args:
        root: the folder in which control groups are mounted, version 2 or 1.
        own: the file that lists the groups of this process.

    Returns:
        The number of cores, or None if there is no limit, or no limit that can be read.
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
        # A parent's limit also holds for its children, so all folders up to the mount are read. A
        # container may see its own group as the mount, where the path of the group does not exist.
        folder = mount / group.lstrip("/")
        for place in (folder, *folder.parents):
            limits.append(_quota(place, version_1))
            if place == mount:
                break
    cores = [limit for limit in limits if limit is not None]
    return math.ceil(min(cores)) if cores else None


def _quota(folder: Path, version_1: bool) -> float | None:
    """The number of cores that a control group may use, or None if it sets no limit."""
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
