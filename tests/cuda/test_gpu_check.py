"""bench/gpu_check: the plan's arithmetic, how steps are run and ended, what a fault of a test
costs, what is on disk, and the dry run of all of it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from gpu_check import each_test, plan, report
from gpu_check.__main__ import failed_before, stand_in
from gpu_check.runner import Check

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


def step(name, program, limit=60, **options):
    return plan.Step(name, limit, (PYTHON, "-c", program), **options)


def checked(tmp_path, stages, **facts):
    """(exit status, report, names of the files in OUT) of a run of these stages."""
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    status = Check("first", stages, out, work, facts, patience=20).run()
    return status, json.loads((out / report.REPORT).read_text()), sorted(os.listdir(out))


waits = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def statuses(found):
    return {step["name"]: step["status"] for step in found["steps"]}


# ---- The plan


@pytest.mark.parametrize("command", plan.LIMITS)
def test_limits_add_up(command):
    stages = plan.stages(command)
    assert plan.total(stages) <= plan.LIMITS[command]
    longer = [*stages, [[step("more", "", plan.LIMITS[command] - plan.total(stages) + 1)]]]
    with pytest.raises(ValueError, match=f"of '{command}' may take {plan.LIMITS[command] + 1} s"):
        plan.check(command, longer)


def test_a_stage_takes_as_long_as_its_longest_lane():
    lanes = [[step("a", "", 5), step("b", "", 7)], [step("c", "", 9)]]
    lanes.append([step("d", "", 99, only_if_needed=True)])
    assert plan.seconds_of(lanes) == 12
    assert plan.total([lanes, lanes[:1]]) == plan.RESERVE + 24


@pytest.mark.parametrize("command", plan.LIMITS)
def test_nothing_runs_beside_what_is_timed(command):
    for stage in plan.stages(command):
        timed = [s for lane in stage for s in lane if {"decode", "ops", "prompt"} & {s.name}]
        assert not timed or [len(lane) for lane in stage] == [1]


def test_all_scripts_and_tests_of_the_plan_are_there():
    for command in plan.LIMITS:
        for planned in (s for stage in plan.stages(command) for lane in stage for s in lane):
            for part in planned.command:
                if part.startswith(("bench/", "tests/")):
                    assert (ROOT / part).exists()


def test_all_tests_that_need_a_gpu_are_in_the_plan():
    needs_gpu = re.compile(r"mark\.cuda\b|from backends import .*GPU|backends\.(\w+_)?GPU\b")
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if needs_gpu.search(path.read_text())
    } - {"tests/cuda/test_gpu_check.py", "tests/kit/test_skipped.py"}  # these speak of them
    assert len(files) > 3
    assert {file for file in files if not file.startswith(plan.MARKED)} == set()


# ---- Steps


def test_what_is_found_is_in_the_report(tmp_path):
    figures = "import sys; open(sys.argv[1], 'w').write('{\"seconds\": 3}')"
    stages = [
        [[plan.Step("figures", 60, (PYTHON, "-c", figures, "{work}/figures.json"))]],
        [[step("fails", "print('what is wrong'); raise SystemExit(3)")]],
        [[step("tool", "print('Device not supported'); exit(1)", impossible="not supported")]],
        [[step("left", "", needs=("sm90",)), step("right", "print(1)", needs=("sanitizer",))]],
        [[plan.Step("missing", 60, ("no-such-program",))]],
    ]
    status, found, files = checked(tmp_path, stages, sanitizer=True)
    assert status == 1
    assert statuses(found) == {
        "figures": "ok",
        "fails": "failed",
        "tool": "impossible",
        "left": "left out",
        "right": "ok",
        "missing": "failed",
    }
    assert found["measured"] == {"figures": {"seconds": 3}}
    assert found["steps"][1]["summary"] == "what is wrong"
    assert files == [report.LOGS, report.REPORT]
    with tarfile.open(tmp_path / "out" / report.LOGS) as logs:
        assert logs.extractfile("fails.log").read() == b"what is wrong\n"


def test_what_takes_too_long_is_ended_with_all_its_processes(tmp_path, monkeypatch):
    """Also what does not listen, and what it has started."""
    monkeypatch.setattr("gpu_check.runner.GRACE", 1)
    deaf = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    child = f"{deaf}; print(os.getpid(), flush=True); time.sleep(600)"
    parent = f"{deaf}; subprocess.run([sys.executable, '-c', {child!r}])"
    stages = [[[step("hangs", parent, 0.4)], [step("beside", "print('done')")]]]
    status, found, _ = checked(tmp_path, stages)
    assert status == 1
    assert statuses(found) == {"hangs": "too long", "beside": "ok"}
    pid = int((tmp_path / "work/hangs.log").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_without_an_extension_or_a_device_nothing_else_runs(tmp_path):
    for i, fact in enumerate(('{"unbuilt": "no module"}', '{"unbuilt": null, "device": false}')):
        folder = tmp_path / str(i)
        folder.mkdir()
        write = f"import sys; open(sys.argv[1], 'w').write('{fact}')"
        stages = [
            [[plan.Step("machine", 60, (PYTHON, "-c", write, f"{{work}}/{plan.MACHINE}"))]],
            [[step("build", "", needs=("unbuilt",), only_if_needed=True)]],
            [[step("tests", "")]],
        ]
        status, found, _ = checked(folder, stages)
        assert status == 1
        build = "ok" if i == 0 else "left out"
        assert statuses(found) == {"machine": "ok", "build": build, "tests": "not run"}


def test_a_killed_command_leaves_what_it_has_found(tmp_path):
    """On SIGTERM it ends its steps and writes down all; on SIGKILL it has written most."""
    program = f"""
import sys, signal
sys.path[:0] = [{str(ROOT / "bench")!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_gpu_check import step, waits
from gpu_check.runner import Check
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(143))
out, work = Path(sys.argv[1], "out"), Path(sys.argv[1], "work")
out.mkdir(); work.mkdir()
stages = [[[step("first", "print(7)")]], [[step("second", waits)]], [[step("third", "")]]]
Check("first", stages, out, work, {{}}).run()
"""
    for name in ("TERM", "KILL"):
        folder = tmp_path / name
        folder.mkdir()
        process = subprocess.Popen([PYTHON, "-c", program, str(folder)], stdout=subprocess.PIPE)
        try:
            log = folder / "work/second.log"
            process.stdout.readline()  # the first step has ended
            while not (log.exists() and log.read_text()):
                assert process.poll() is None
            process.send_signal(getattr(signal, f"SIG{name}"))
            process.wait(60)
        finally:
            process.kill()
            process.stdout.close()
            if name == "KILL" and log.exists() and log.read_text():  # nothing else ends it
                os.kill(int(log.read_text()), signal.SIGKILL)
        found = json.loads((folder / "out" / report.REPORT).read_text())
        assert statuses(found)["first"] == "ok"
        if name == "TERM":
            assert process.returncode == 143
            assert statuses(found) == {"first": "ok", "second": "broken off", "third": "not run"}


# ---- Tests, one by one

SUITE = """
import os, time
import pytest, torch

lost = []
def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access")

torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize
pytestmark = pytest.mark.cuda

@pytest.mark.parametrize("i", range(4))
def test_good(i):
    pass

def test_wrong():
    assert 1 == 2

def test_of_a_kernel_that_faults():
    lost.append(True)  # the test itself sees nothing of it

def test_crashes():
    os._exit(11)

def test_hangs():
    time.sleep(600)

@pytest.mark.parametrize("i", range(4))
def test_good_too(i):
    pass

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
"""

RUNS = [
    pytest.param("with xdist", marks=pytest.mark.skipif(not find_spec("xdist"), reason="no xdist")),
    "without xdist",
]


@pytest.mark.parametrize("how", RUNS)
def test_a_fault_costs_one_test(tmp_path, how):
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda")
    command = ["results", "--processes", "2", "--limit", "8", "--"]
    program = "import runpy, sys; sys.argv = sys.argv[1:]\n"
    if how == "without xdist":
        program += "import importlib.util as u; find = u.find_spec\n"
        program += "u.find_spec = lambda name, *more: name != 'xdist' and find(name, *more)\n"
    program += "runpy.run_module('gpu_check.run_tests', run_name='__main__')"
    result = subprocess.run(
        [PYTHON, "-c", program, "run_tests", *command, "-p", "device_faults", "test_suite.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'bench'}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    found = each_test.read(tmp_path / "results")
    outcomes = {test.split("::")[1]: r["outcome"] for test, r in found.items()}
    bad = ["test_wrong", "test_of_a_kernel_that_faults", "test_crashes", "test_hangs"]
    good = [f"{name}[{i}]" for name in ("test_good", "test_good_too") for i in range(4)]
    assert outcomes == {
        **dict.fromkeys(good, "passed"),
        **dict.fromkeys(bad, "failed"),
        "test_skipped": "skipped",
    }
    messages = {test.split("::")[1]: r["message"] for test, r in found.items()}
    assert "illegal memory access" in messages["test_of_a_kernel_that_faults"]
    assert "1 == 2" in messages["test_wrong"]
    assert "test_suite.py" in result.stderr or "test_suite.py" in result.stdout


def test_what_failed_runs_again_and_nothing_else(tmp_path):
    (tmp_path / "test_suite.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    failures = {"test_suite.py::test_b": "wrong"}
    before = {"tests": {"tests": {"failures": failures}, "sm90_tests": {"failures": {}}}}
    (tmp_path / "report.json").write_text(json.dumps(before))
    facts = failed_before(tmp_path / "report.json", tmp_path)
    assert facts == {"tests_failed": True}
    needs = [s.needs for lane in plan.stages("second")[2] for s in lane]
    assert needs == [("tests_failed",), ("overlap_tests_failed",), ("sm90_tests_failed",)]
    only = tmp_path / plan.AGAIN.format("tests")
    subprocess.run(
        [PYTHON, "-m", "gpu_check.run_tests", "results", "--only", only, "--", "test_suite.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "bench")},
        check=True,
    )
    found = each_test.read(tmp_path / "results")
    assert {test: r["outcome"] for test, r in found.items()} == {"test_suite.py::test_b": "passed"}


# ---- The report


def test_tests_that_have_not_ended_count_as_failed(tmp_path):
    results = tmp_path / "x.tests"
    results.write_text(
        '{"test": "a", "outcome": "begun"}\n{"test": "a", "outcome": "passed", "message": ""}\n'
        '{"test": "b", "outcome": "failed", "message": "no"}\n'
        '{"test": "b", "outcome": "passed", "message": ""}\n'  # its teardown
        '{"test": "c", "outcome": "begun"}\n{"test": "d", "outc'
    )
    assert report.tests_of(results) == {
        "passed": 1,
        "failed": 1,
        "begun": 1,
        "failures": {"b": "no", "c": "it has not ended"},
    }


def test_long_logs_lose_their_middle(tmp_path):
    (tmp_path / "a.log").write_bytes(b"first" + bytes(10 * 2**20) + b"last")
    with tarfile.open(fileobj=io.BytesIO(report.archive(tmp_path))) as logs:
        content = logs.extractfile("a.log").read()
    assert content.startswith(b"first")
    assert content.endswith(b"last")
    assert len(content) < 3 * 2**20


def a_report(command, date, gpu="H200", **measured):
    machine = {"gpu": gpu, "commit": "abc", "changed": False, "torch": None, "nvcc": None}
    steps = [{"name": name, "status": "ok"} for name in measured]
    head = {"command": command, "date": date, "seconds": 9.0}
    return head | {"machine": machine, "steps": steps, "tests": {}, "measured": measured}


def test_the_results_of_a_gpu_are_what_was_found_last():
    reports = [
        a_report("second", "2026-12-02", ops={"rows": [2]}),
        a_report("first", "2026-12-01", ops={"rows": [1]}, decode={"cases": [1]}),
    ]
    merged = report.merged(reports)
    assert merged["gpu"] == "H200"
    assert [run["command"] for run in merged["runs"]] == ["first", "second"]
    assert merged["measured"] == {
        "ops": {"run": 1, "rows": [2]},
        "decode": {"run": 0, "cases": [1]},
    }
    with pytest.raises(ValueError, match="the reports are of A100, H200, expected one GPU"):
        report.merged([*reports, a_report("first", "2026-12-03", gpu="A100")])


# ---- All of it


def test_stand_ins_take_the_place_of_every_step():
    """Nothing of a dry run needs what only a CUDA machine has."""
    for command in plan.LIMITS:
        for planned in (s for stage in plan.stages(command) for lane in stage for s in lane):
            replaced = stand_in(planned)
            assert replaced.command[0] == PYTHON
            assert replaced.environment["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.timeout(1200)  # it starts some forty processes, most of which import torch
def test_dry_run(tmp_path):
    result = subprocess.run(
        [ROOT / "bench/gpu_check.sh", "--dry-run", tmp_path],
        env=os.environ | {"PYTHON": PYTHON},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for command, limit in plan.LIMITS.items():
        assert f"{command}: at most {limit} s" in result.stdout
        assert f"{plan.total(plan.stages(command))} s in all" in result.stdout
        assert sorted(os.listdir(tmp_path / command)) == [report.LOGS, report.REPORT]
        found = json.loads((tmp_path / command / report.REPORT).read_text())
        planned = [s for stage in plan.stages(command) for lane in stage for s in lane]
        assert statuses(found) == {
            s.name: "left out" if s.only_if_needed or s.name.endswith("_again") else "ok"
            for s in planned
        }
        figures = {s.name for s in planned if "--json" in s.command}
        assert set(found["measured"]) == figures
        assert not any(tests["failures"] for tests in found["tests"].values())
    first = json.loads((tmp_path / "first" / report.REPORT).read_text())
    assert set(first["tests"]) == {"tests", "overlap_tests", "sm90_tests"}
    assert first["tests"]["tests"]["skipped"] > 100
    assert {c["error"] for c in first["measured"]["canary"]["checks"].values()} == {None}
