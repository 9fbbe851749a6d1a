"""The command line: `mistral-ext generate`, `chat`, `perplexity`, `quantize` and `info`.

Text goes to stdout, timings and errors to stderr. An error is one line and exit status 1 (2 for
wrong usage, 130 for Ctrl-C); --traceback shows where it came from.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

import torch

from mistral_ext import __version__
from mistral_ext.cli import chat, generate, info, perplexity, quantize


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is {args.threads}, expected 1 or more")
            torch.set_num_threads(args.threads)
        return args.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, `head` say, has gone. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError) as error:
        if args.traceback:
            raise
        print(f"mistral-ext: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviated options, and reports wrong usage in one line."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mistral-ext", description="Run Mistral 7B models.")
    parser.add_argument("--version", action="version", version=f"mistral-ext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (generate, chat, perplexity, quantize, info):
        command.add_to(commands)
    return parser
