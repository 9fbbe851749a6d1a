"""mistral_ext.cli.threads: limits of control groups, and cores, in files as Linux has them."""

from __future__ import annotations

import pytest

from mistral_ext.cli import threads
from mistral_ext.cli.threads import container_cores, default_threads, physical_cores


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "800000 100000", "cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, None),
        ("0::/a/b", {}, None),
        ("0::/a", {"a/cpu.max": "nonsense"}, None),
        (
            "5:memory:/x\n3:cpu,cpuacct:/a",
            {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "3:cpu:/a",
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"},
            None,
        ),
    ],
)
def test_cores_of_a_control_group(tmp_path, own, files, cores):
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert container_cores(tmp_path / "cgroup", tmp_path / "own") == cores


def test_another_system_has_no_control_groups(tmp_path):
    assert container_cores(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("siblings", "processors", "cores"),
    [
        (["0,4", "1", "2", "3", "0,4"], {0, 1, 2, 3, 4}, 4),  # a hybrid processor
        (["0-1", "0-1", "2-3", "2-3"], {0, 1, 2, 3}, 2),
        (["0-1", "0-1", "2-3", "2-3"], {1, 2}, 2),
        (["0", "1"], {0, 1, 2}, None),  # of the third nothing is known
        ([], set(), None),
    ],
)
def test_threads_of_a_core_count_once(tmp_path, siblings, processors, cores):
    for i, text in enumerate(siblings):
        folder = tmp_path / f"cpu{i}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    assert physical_cores(processors, tmp_path) == cores


@pytest.mark.parametrize(
    ("container", "physical", "count"),
    [(None, None, 8), (2, None, 2), (None, 4, 4), (2, 4, 2), (6, 4, 4), (16, 16, 8)],
)
def test_threads_without_an_option(monkeypatch, container, physical, count):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "container_cores", lambda: container)
    monkeypatch.setattr(threads, "physical_cores", lambda _: physical)
    assert default_threads(8) == count
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert default_threads(8) == 8
