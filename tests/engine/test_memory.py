"""The memory that a container leaves to its processes."""

from __future__ import annotations

import pytest

from mistral_ext.engine import memory

STAT = """anon 300
file 250
inactive_file 120
active_file 80
slab 7"""
STAT_1 = """inactive_file 1
total_inactive_file 150
total_active_file 50"""


@pytest.fixture(autouse=True)
def _large_system(monkeypatch):
    monkeypatch.setattr(memory, "_meminfo", lambda name: 5000)


@pytest.fixture
def available(tmp_path):
    """Writes the files of control groups, and returns the memory that is available then."""

    def available(own, **groups):
        (tmp_path / "own").write_text(own)
        for group, files in groups.items():
            folder = tmp_path / "cgroup" / group.replace("__", "/")
            folder.mkdir(parents=True)
            for name, text in files.items():
                (folder / f"memory.{name}").write_text(f"{text}\n")
        return memory.available_memory(tmp_path / "cgroup", tmp_path / "own")

    return available


def test_pages_of_files_are_not_used_up(available):
    """`default_slots` subtracts mapped weights itself."""
    files = {"max": 1000, "current": 600, "stat": STAT}
    assert available("0::/a\n", a=files) == 1000 - 600 + 120 + 80


def test_version_1(available):
    files = {"limit_in_bytes": 1000, "usage_in_bytes": 600, "stat": STAT_1}
    assert available("4:cpu:/a\n9:memory:/a\n", memory__a=files) == 1000 - 600 + 150 + 50


def test_limits_of_parents_hold(available):
    parent = {"max": 1000, "current": 900, "stat": STAT}
    own = {"max": 4000, "current": 100, "stat": "anon 100"}
    assert available("0::/a/b\n", a=parent, a__b=own) == 300


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"max": 1000000, "current": 600, "stat": STAT}, 5000),
        ({"max": "max", "current": 600, "stat": STAT}, 5000),
        ({"max": 1000, "current": 1300, "stat": "anon 1300"}, 0),
        ({"current": 600, "stat": STAT}, 5000),
        ({"max": 1000, "current": 600}, 5000),
    ],
    ids=["beyond the system", "no limit", "nothing left", "no report", "no account"],
)
def test_the_lower_limit_counts(available, files, expected):
    assert available("0::/a\n", a=files) == expected


def test_a_system_without_control_groups(tmp_path):
    assert memory.available_memory(tmp_path, tmp_path / "missing") == 5000
