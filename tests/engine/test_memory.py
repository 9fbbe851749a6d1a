from __future__ import annotations

import pytest

from mistral_ext.engine import memory

STAT = """anon 300
file 250
inactive_file 120
active_file 80
slab 7
"""


@pytest.fixture
def group(tmp_path, monkeypatch):
    """The files of this process' control group; and a system that has more memory."""
    monkeypatch.setattr(memory, "_control_group", lambda: tmp_path)
    monkeypatch.setattr(memory, "_meminfo", lambda name: 5000)
    for name, text in {"max": "1000\n", "current": "600\n", "stat": STAT}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    return tmp_path


def test_pages_of_files_are_not_used_up(group):
    """`default_slots` subtracts mapped weights itself."""
    assert memory.available_memory() == 1000 - 600 + 120 + 80


def test_the_lower_limit_counts(group):
    (group / "memory.max").write_text("1000000\n")
    assert memory.available_memory() == 5000
    (group / "memory.max").write_text("max\n")
    assert memory.available_memory() == 5000


def test_nothing_is_left(group):
    (group / "memory.current").write_text("1300\n")
    assert memory.available_memory() == 0


@pytest.mark.parametrize("name", ["max", "current", "stat"])
def test_a_group_without_a_report(group, name):
    (group / f"memory.{name}").unlink()
    assert memory.available_memory() == 5000
