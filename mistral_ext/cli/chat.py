"""`mistral-ext chat`: talk to an Instruct model."""

from __future__ import annotations

import argparse
import contextlib
import sys

from mistral_ext.cli import options
from mistral_ext.cli.input import stdin
from mistral_ext.cli.options import load_adapted_model
from mistral_ext.cli.output import report
from mistral_ext.cli.start import importing
from mistral_ext.engine.params import SamplingParams


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "chat",
        parents=[
            options.common(),
            options.model(),
            options.draft_model(),
            options.adapter(),
            options.sampling(),
        ],
        help="talk to an Instruct model",
        description="Talk to an Instruct model, a line a message. The cache is kept between turns.",
    )
    parser.add_argument("--system", type=str, metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--safe-prompt", action="store_true", help="begin with a system prompt of guardrails"
    )
    parser.add_argument("--template", choices=("v1", "v2", "v3"), help="chat template to use")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sampling = options.sampling_of(args)
    SamplingParams.from_options(sampling)
    interactive = stdin().isatty()
    llm, adapter = load_adapted_model(args, draft_model=args.draft_model)
    with importing():
        chat = llm.start_chat(
            args.system, args.template, safe_prompt=args.safe_prompt, adapter=adapter
        )
    if interactive:
        import readline  # noqa: F401  line editing and history for input()

        # Imports what the first message needs, because Ctrl-C during its reply must only stop the
        # reply. A template that refuses this message says so of the user's first message, too.
        with importing(), contextlib.suppress(ValueError):
            llm.encode_chat([{"role": "user", "content": "Hello"}], template=args.template)
        print("Ctrl-C stops a reply, Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            message = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if not message:
            continue
        try:
            for piece in chat.send(message, **sampling):
                print(piece, end="", flush=True)
            print()
            report(llm, chat.completion)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        except ValueError as error:  # such as a message that is too long
            if not interactive:
                raise
            print(f"mistral-ext: {error}", file=sys.stderr)  # the conversation is as before
