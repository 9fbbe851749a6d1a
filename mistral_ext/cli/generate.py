"""`mistral-ext generate`: complete a prompt."""

from __future__ import annotations

import argparse
import dataclasses

from mistral_ext.cli import options
from mistral_ext.cli.input import read_text, stdin
from mistral_ext.cli.options import load_adapted_model
from mistral_ext.cli.output import print_timing, report
from mistral_ext.engine.params import SamplingParams
from mistral_ext.files import json_text


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "generate",
        parents=[
            options.common(),
            options.model(),
            options.draft_model(),
            options.adapter(),
            options.sampling(),
        ],
        help="complete a prompt",
        description="Complete a prompt; the completion streams to stdout.",
    )
    parser.add_argument(
        "prompt", nargs="?", type=str, help="the prompt; '-' or none: read it from stdin"
    )
    parser.add_argument(
        "--file", metavar="PATH", help="read the prompt, but for a last newline, from a file"
    )
    parser.add_argument(
        "--special", action="store_true", help="read control tokens that the prompt spells out"
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt, too")
    parser.add_argument("--json", action="store_true", help="print a JSON object per completion")
    parser.add_argument("--n", type=int, default=1, help="number of completions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prompt = _read_prompt(args)
    sampling = options.sampling_of(args)
    SamplingParams.from_options(sampling)  # reports wrong options before the model is loaded
    llm, adapter = load_adapted_model(args, draft_model=args.draft_model)
    if args.json or args.n > 1:
        for completion in llm.generate(prompt, args.special, adapter, **sampling):
            if args.json:
                print(json_text(dataclasses.asdict(completion), ensure_ascii=False))
                print_timing(completion)
            else:
                print(prompt if args.echo else "", completion.text, sep="")
                report(llm, completion)
        return 0
    stream = llm.stream(prompt, args.special, adapter, **sampling)
    if args.echo:
        print(prompt, end="")
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    report(llm, stream.completion)
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise ValueError("a prompt and --file were given, expected one of them")
    if args.prompt not in (None, "-"):
        return str(args.prompt)
    if args.file is None and args.prompt is None and stdin().isatty():
        raise ValueError("no prompt: give one as an argument, with --file, or on stdin")
    # Editors and `echo` end a text with a newline, which is not meant as part of the prompt.
    return read_text(args.file or "-").removesuffix("\n")
