"""Runs the benchmarks of Mistral 7B's publication, and compares the results with the published
results.

The published numbers are those of "Mistral 7B" (arXiv:2310.06825, table 2) and of an early model
card. The card has more decimals. Its numbers for GSM8K and MATH are for one answer to each
question, as here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_ext.evaluate.harness import evaluate
from mistral_ext.llm import Mistral


@dataclass(frozen=True)
class Benchmark:
    """A row of the published table.

    Attributes:
        title: the name of the benchmark in the table.
        task: the name of a task or group of lm-evaluation-harness.
        metric: the metric of the task that is compared.
        shots: the number of examples before each question.
        paper, card: the percentages in the paper and in the model card. `paper` is None if the
            paper's number is for the majority of several answers, which is not measured here.
        runs_code: whether the task runs programs that the model writes.
    """

    title: str
    task: str
    metric: str
    shots: int
    paper: float | None
    card: float
    runs_code: bool = False


PUBLISHED = (
    Benchmark("MMLU", "mmlu", "acc", 5, 60.1, 59.99),
    Benchmark("HellaSwag", "hellaswag", "acc_norm", 0, 81.3, 81.19),
    Benchmark("WinoGrande", "winogrande", "acc", 0, 75.3, 75.53),
    Benchmark("PIQA", "piqa", "acc_norm", 0, 83.0, 82.92),
    Benchmark("ARC-e", "arc_easy", "acc_norm", 0, 80.0, 80.01),
    Benchmark("ARC-c", "arc_challenge", "acc_norm", 0, 55.5, 55.38),
    Benchmark("NQ", "nq_open", "exact_match", 5, 28.8, 28.92),
    Benchmark("TriviaQA", "triviaqa", "exact_match", 5, 69.9, 69.88),
    Benchmark("HumanEval", "humaneval", "pass@1", 0, 30.5, 29.88, runs_code=True),
    Benchmark("MBPP", "mbpp", "pass_at_1", 3, 47.5, 47.86, runs_code=True),
    Benchmark("MATH", "minerva_math", "exact_match", 4, None, 11.94),
    Benchmark("GSM8K", "gsm8k_cot", "exact_match", 8, None, 39.35),
)


@dataclass(frozen=True)
class Measured:
    """The result of a model in a benchmark. All numbers are in percent."""

    benchmark: Benchmark
    value: float
    error: float | None  # the standard error; None: the harness does not give it

    @property
    def difference(self) -> float:
        """The result minus the model card's number."""
        return self.value - self.benchmark.card


def measure(
    llm: Mistral,
    tasks: Sequence[str] | None = None,
    run_code: bool = False,
    **options: Any,
) -> Iterator[Measured]:
    """Runs benchmarks as they were published. Benchmarks with equal numbers of examples run
    together.

    Args:
        llm: the model.
        tasks: the harness' names of some of the tasks of `PUBLISHED`. None: all tasks. Tasks that
            run code are included only if `run_code` is True.
        run_code: as in `evaluate`.
        options: more arguments of `evaluate`.

    Yields:
        The results, in the order in which the benchmarks are finished.

    Raises:
        ValueError: a task is not in the table, or runs code without run_code, or as in `evaluate`.
        ImportError: lm_eval is missing.
    """
    chosen = choose(tasks, run_code)
    for shots, group in itertools.groupby(chosen, key=lambda b: b.shots):
        benchmarks = list(group)
        results = evaluate(
            llm, [b.task for b in benchmarks], num_fewshot=shots, run_code=run_code, **options
        )["results"]
        for benchmark in benchmarks:
            yield Measured(benchmark, *_percent(results[benchmark.task], benchmark.metric))


def choose(tasks: Sequence[str] | None, run_code: bool) -> list[Benchmark]:
    """The benchmarks to run. Benchmarks with equal numbers of examples are neighbours.

    Args:
        tasks, run_code: as in `measure`.

    Raises:
        ValueError: a task is not in the table, or runs code without run_code.
    """
    by_task = {b.task: b for b in PUBLISHED}
    for task in tasks or ():
        if task not in by_task:
            raise ValueError(f"task is {task!r}, expected one of {', '.join(by_task)}")
        if by_task[task].runs_code and not run_code:
            raise ValueError(
                f"task is {task!r}, which runs programs that the model writes, expected run_code"
            )
    if tasks is None:
        tasks = [b.task for b in PUBLISHED if run_code or not b.runs_code]
    return sorted((by_task[task] for task in tasks), key=lambda b: b.shots)


def _percent(results: Mapping[str, Any], metric: str) -> tuple[float, float | None]:
    """A metric in the harness' results for a task, and its standard error, in percent. A key of
    these results is the name of a metric, a comma and the name of a filter, which prepares the
    model's answers for the metric. If a task has several filters, its first one counts. The
    standard error is None if the harness does not give it."""
    for name, value in results.items():
        if name.split(",")[0] != metric:
            continue
        error = results.get(name.replace(metric, f"{metric}_stderr", 1))
        return 100 * value, 100 * error if isinstance(error, float) else None
    raise ValueError(f"the harness has no {metric!r} among {', '.join(results)}")


def table(rows: Sequence[Measured]) -> str:
    """Writes the results beside the published results, as a Markdown table."""
    lines = [
        "| benchmark | shots | metric | this model | paper | model card | difference "
        "| in standard errors |",
        "| --- | --: | --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        b = row.benchmark
        value, errors = f"{row.value:.2f}", ""
        if row.error:
            value += f" ± {row.error:.2f}"
            errors = f"{row.difference / row.error:+.1f}"
        paper = "" if b.paper is None else f"{b.paper:.1f}"
        cells = (b.title, b.shots, b.metric, value, paper, f"{b.card:.2f}")
        shown = " | ".join(map(str, cells))
        lines.append(f"| {shown} | {row.difference:+.2f} | {errors} |")
    return "\n".join(lines)
