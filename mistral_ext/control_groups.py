"""Finds the control groups by which Linux limits this process, as those of a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")  # where control groups are mounted
OWN = Path("/proc/self/cgroup")  # the file that lists the groups of this process


def control_groups(
    controller: str, root: Path = ROOT, own: Path = OWN
) -> Iterator[tuple[Path, bool]]:
    """Yields the folder of each control group of this process, and of its parents, whose limits
    hold for it, too. A folder may not exist: in a container the mount itself may be the container's
    group.

    Args:
        controller: what the group limits, by Linux's name: "cpu" or "memory".
        root: as ROOT.
        own: as OWN.

    Yields:
        A folder, and whether its files are those of version 1 of control groups, not of version 2.
    """
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except OSError:
        return
    for controllers, group in groups:
        version_1 = controller in controllers.split(",")
        if controllers and not version_1:
            continue
        mount = root / controller if version_1 else root
        folder = mount / group.lstrip("/")
        for place in (folder, *folder.parents):
            yield place, version_1
            if place == mount:
                break
