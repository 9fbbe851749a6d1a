"""`mistral-ext eval`: measure a model on benchmarks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mistral_ext.cli import options
from mistral_ext.cli.extras import expect_extra
from mistral_ext.cli.options import load_model
from mistral_ext.files import write_text_file


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "eval",
        parents=[options.common(), options.model()],
        help="measure a model on benchmarks",
        description="Evaluate a model on tasks of lm-evaluation-harness (pip install "
        "'mistral_ext[eval]'), which fetches their data. Prints a table.",
    )
    parser.add_argument(
        "--tasks",
        metavar="TASK,...",
        required=True,
        help="names of tasks and groups ('lm-eval ls tasks' lists them), or files of tasks (YAML)",
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
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--output", metavar="FILE", help="write the harness' results (JSON)")
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
        help="let tasks run the programs that the model writes, on this machine and unchecked",
    )
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="completions written at once"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    expect_extra("eval", "lm_eval")
    output = Path(args.output) if args.output else None
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output is {args.output!r}, expected a file in a folder that exists")
    llm = load_model(args, max_batch=args.max_batch)
    from lm_eval.utils import handle_non_serializable, make_table

    from mistral_ext.evaluate.harness import evaluate

    results = evaluate(
        llm,
        args.tasks.split(","),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        chat=args.chat,
        system=args.system,
        cache=args.cache,
        run_code=args.run_code,
        include=args.include,
        log_samples=False,
    )
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if output is not None:
        write_text_file(
            output, json.dumps(results, indent=2, default=handle_non_serializable) + "\n"
        )
    return 0
