"""Options given as empty texts, as by a variable of the shell that is not set."""

from __future__ import annotations

import argparse

import pytest

from mistral_ext.cli import options
from mistral_ext.cli import parser as command_parser
from mistral_ext.cli.parser import parse

# Arguments for which an empty text is a value. What they mean checks them further.
MAY_BE_EMPTY = {"prompt", "--system", "--regex"}


def arguments():
    """The commands, and the names of their arguments that take texts or files."""
    commands = argparse.ArgumentParser().add_subparsers()
    for command in command_parser._COMMANDS:
        command.add_to(commands)
    for name, parser in commands.choices.items():
        for action in parser._actions:
            if action.nargs != 0 and action.type in (None, str, options._contents):
                yield name, (*action.option_strings, action.dest)[0]


@pytest.mark.parametrize(("command", "argument"), list(arguments()))
def test_an_empty_value_is_not_the_default(command, argument, capsys):
    given = [argument, ""] if argument.startswith("-") else [""] * 3
    with pytest.raises(SystemExit) as ended:
        parse([command, *given, "--no-such-option"])
    assert ended.value.code == 2
    refused = "'' is no value (is a variable not set?)" in capsys.readouterr().err
    assert refused == (argument not in MAY_BE_EMPTY)


def test_humaneval_with_and_without_a_file():
    assert parse(["eval", "--humaneval"]).humaneval is True
    assert parse(["eval", "--humaneval", "x.jsonl"]).humaneval == "x.jsonl"
