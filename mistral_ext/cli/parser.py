"""The parser of the command line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from mistral_ext import __version__
from mistral_ext.cli import (
    bench,
    chat,
    compare,
    eval,
    finetune,
    generate,
    info,
    merge,
    perplexity,
    quantize,
    serve,
)

# In the order of the help.
_COMMANDS = (
    generate,
    chat,
    serve,
    perplexity,
    eval,
    compare,
    bench,
    finetune,
    merge,
    quantize,
    info,
)


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviated options, and reports wrong usage in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, and in `run` the function of the command; SystemExit for wrong usage."""
    parser = _Parser(prog="mistral-ext", description="Run Mistral 7B models.")
    parser.add_argument("--version", action="version", version=f"mistral-ext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser.parse_args(argv)
