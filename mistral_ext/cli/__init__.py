"""The command line: `mistral-ext generate`, `chat`, `serve`, `perplexity`, `eval` and others.

Text goes to stdout, timings and errors to stderr. After an error the exit status is 1 (2 for wrong
usage, 130 for Ctrl-C). The error is printed in one line; --traceback shows where it came from.

Each command has a file with two functions: `add_to` describes the command, `run` runs it. Help and
errors of usage come at once, because only `run` imports torch. Most commands do so by calling
`start`, after they have checked their options.
"""

from __future__ import annotations

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        argv: the arguments. None: the arguments of this process.
    """
    try:
        if argv is None:
            from mistral_ext.cli.start import end_on_ctrl_c

            end_on_ctrl_c()
        return _run(argv)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(argv: list[str] | None) -> int:
    from mistral_ext.cli.parser import as_typed, parse
    from mistral_ext.cli.threads import check_threads

    if sys.stderr is None:  # stderr is closed, and print would write to stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    args = parse(argv)
    try:
        if sys.stdout is None:
            raise ValueError("stdout is closed, expected a place for the text")
        check_threads(args.threads)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has ended
        return 1
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError) as error:
        if args.traceback:
            raise
        message = _one_line(error)
        # All errors but these two may name arguments of the library. The user knows these
        # arguments as options.
        if not isinstance(error, OSError | ImportError):
            message = as_typed(message, args.flags)
        print(f"mistral-ext: {message}", file=sys.stderr)
        return 1
    finally:
        _drop_unwritten()


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _drop_unwritten() -> None:
    """Discards text that could not be written because nobody reads it. Otherwise Python would
    report the failure again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
