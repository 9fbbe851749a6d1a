"""The benchmarks of Mistral 7B's publication."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_ext.cli import main
from mistral_ext.evaluate import paper


@pytest.fixture
def calls(monkeypatch):
    """The calls of the harness, whose tasks' data are not here; and results of its form."""
    calls = []

    def evaluate(llm, tasks, **options):
        calls.append((tasks, options))
        of_task = {
            "alias": "x",
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
            "acc_norm,none": 0.75,
            "acc_norm_stderr,none": 0.02,
            "exact_match,remove_whitespace": 0.3,
            "exact_match_stderr,remove_whitespace": "N/A",
            "pass@1,create_test": 0.29,
            "pass_at_1,none": 0.4,
        }
        return {"results": dict.fromkeys(tasks, of_task)}

    monkeypatch.setattr(paper, "evaluate", evaluate)
    return calls


def test_tasks_run_with_their_own_examples(calls):
    rows = list(paper.measure(None, limit=3, run_code=True))
    assert {row.benchmark for row in rows} == {*paper.PUBLISHED}
    by_shots = {options["num_fewshot"]: set(tasks) for tasks, options in calls}
    assert len(by_shots) == len(calls)
    assert by_shots[5] == {"mmlu", "nq_open", "triviaqa"}
    assert by_shots[8] == {"gsm8k_cot"}
    assert all(options["limit"] == 3 and options["run_code"] for _, options in calls)


def test_programs_run_only_where_that_is_allowed(calls):
    titles = {row.benchmark.title for row in paper.measure(None)}
    assert titles == {b.title for b in paper.PUBLISHED} - {"HumanEval", "MBPP"}
    with pytest.raises(ValueError, match="task is 'mbpp', which runs programs"):
        list(paper.measure(None, ["mbpp"]))
    with pytest.raises(ValueError, match="task is 'mmmlu', expected one of mmlu, hellaswag"):
        list(paper.measure(None, ["mmmlu"]))


def test_differences_and_their_errors(calls):
    arc, nq, math = paper.measure(None, ["arc_easy", "nq_open", "minerva_math"])
    arc, math, nq = sorted((arc, nq, math), key=lambda row: row.benchmark.shots)
    assert (arc.value, arc.error) == (75.0, 2.0)
    assert arc.difference == pytest.approx(75 - 80.01)
    assert (nq.value, nq.error) == (30.0, None)
    lines = paper.table([arc, math, nq]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == ("| ARC-e | 0 | acc_norm | 75.00 ± 2.00 | 80.0 | 80.01 | -5.01 | -2.5 |")
    assert lines[3].startswith("| MATH | 4 | exact_match | 30.00 |  | 11.94 | +18.06 |  |")


def test_the_tasks_are_the_harness_own():
    """Each has the metric that the table names, and runs code if the table says so."""
    from lm_eval.tasks import __file__ as tasks
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.tasks.manager import TaskManager

    # The index of all tasks takes a minute.
    folders = "mmlu hellaswag winogrande piqa arc nq_open triviaqa humaneval mbpp gsm8k"
    paths = [Path(tasks).parent / name for name in [*folders.split(), "benchmarks"]]
    index = TaskManager(include_defaults=False, include_path=paths)._index
    for benchmark in paper.PUBLISHED:
        path = index[benchmark.task].yaml_path
        config = load_yaml(path, resolve_func=False)
        metrics = config.get("metric_list") or config.get("aggregate_metric_list")
        names = {str(metric["metric"]) for metric in metrics}
        function = benchmark.metric.replace("pass@1", "pass_at_k")
        assert any(name.endswith(function) for name in names), (benchmark, names)
        assert ("unsafe_code: true" in path.read_text()) == benchmark.runs_code


def test_the_command(calls, tmp_path, capsys):
    output = tmp_path / "paper.json"
    assert main(["eval", "--paper", "--tasks", "piqa,mmlu", "--output", str(output)]) == 0
    table = capsys.readouterr().out
    assert "| MMLU | 5 | acc | 50.00 ± 25.00 | 60.1 | 59.99 | -9.99 | -0.4 |" in table
    assert '"title": "PIQA"' in output.read_text()
    assert main(["eval", "--paper", "--num-fewshot", "3"]) == 1
    assert "--num-fewshot is given, expected none with --paper" in capsys.readouterr().err
    assert main(["eval"]) == 1
    assert "--tasks is missing" in capsys.readouterr().err
