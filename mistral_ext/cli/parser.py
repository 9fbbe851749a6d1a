"""The parser of the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
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
from mistral_ext.cli.options import filled

# The commands, in the order in which the help lists them.
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

# Finds a name of several words, such as max_tokens, in an error message. It skips names that are no
# arguments of the library: those in a path, those in quotes (values), and those after a colon (keys
# of a file).
_NAME = re.compile(r"(?<![\w./'-])(?<!: )[a-z]+(_[a-z]+)+(?![\w/']|\.\w)")
# The name of a file at the beginning of a message.
_OF_A_FILE = re.compile(r"\S*[/.]\S*:? ")


class _Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated options and no empty values, and reports wrong usage in
    one line.

    A value is empty if it is a variable of the shell that is not set (--output "$FILE"). It would
    mean the default, or the current folder. Options that may be empty have `type=str`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("type", None, filled)  # for options without a type

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the arguments of the command line. Raises SystemExit for wrong usage.

    Args:
        argv: the arguments. None: the arguments of this process.

    Returns:
        The values of the options. It also has `run`, the function of the command, and `flags`, the
        options of the command by the names of the library's arguments (see `as_typed`).
    """
    parser = _Parser(prog="mistral-ext", description="Run Mistral 7B models.")
    parser.add_argument("--version", action="version", version=f"mistral-ext {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.type = str  # the parser of the command looks at the values behind its name
    for command in _COMMANDS:
        command.add_to(commands)
    for command_parser in commands.choices.values():
        command_parser.set_defaults(flags=_flags(command_parser))
    return parser.parse_args(argv)


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """Rewrites an error message of the library. Names of the library's arguments, such as
    max_tokens, are replaced by what a user types, such as --max-tokens.

    A message that begins with a file is about keys of the file, and does not change. In other
    messages, names of several words are replaced (see `_NAME`). A name of one word may be an
    ordinary word. So it is replaced only as a subject before the first comma, like "group" and
    "size" in "group is 32 and size is '1MB', expected one of them".

    Args:
        message: the message.
        flags: the options by the names of the library's arguments.
    """

    def flag(match: re.Match[str]) -> str:
        return flags.get(match[0], match[0])

    if _OF_A_FILE.match(message):
        return message
    problem, comma, expected = message.partition(",")
    problem = re.sub(r"(^|(?<= and ))\w+(?= (is|are|has|and) )", flag, problem)
    return _NAME.sub(flag, problem + comma + expected)


def _flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Returns the options of a command, by the names of the library's arguments that they set."""
    flags = {}
    for action in parser._actions:
        if action.option_strings:
            flags[action.dest] = action.option_strings[-1]
            # An option that may be repeated (--api-key) makes a list. The name of the library's
            # argument may then be the plural (api_keys).
            if isinstance(action, argparse._AppendAction):
                flags[f"{action.dest}s"] = action.option_strings[-1]
    return flags
