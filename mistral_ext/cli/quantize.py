"""`mistral-ext quantize`: write a model with weights in 8 or 4 bits, or in both."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mistral_ext.cli import options
from mistral_ext.cli.input import read_text
from mistral_ext.cli.start import start

_CALIBRATION_TOKENS = 16384
_FEW_TOKENS = 1024


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "quantize",
        parents=[options.common()],
        help="write a model with weights in 8 or 4 bits",
        description="Write a model folder with weights in 8 or 4 bits, which loads without the "
        "original. It is there when it is complete. An interrupted run leaves nothing of it; with "
        "--calibrate it leaves OUT.calibration, from which the same command goes on.",
    )
    parser.add_argument("source", metavar="IN", help="model folder or hub id")
    parser.add_argument("target", metavar="OUT", help="folder to make")
    bits = parser.add_mutually_exclusive_group(required=True)
    bits.add_argument("--bits", type=int, choices=(8, 4))
    bits.add_argument(
        "--size",
        metavar="SIZE",
        help="4 bits for most matrices and 8 for those where 4 lose the most, in a file of at most "
        "this size, 4.2GB or 4GiB for instance",
    )
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="4 bits in equal steps, as older versions made them, with a scale for N weights: 32, "
        "64 or 128",
    )
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="for 4 bits or --size: a text file, whose first 16384 tokens the model runs, so that "
        "errors are small where its inputs are large; an interrupted run goes on where it was",
    )
    options.add_dtype(parser, "of embeddings and norms; default: as stored")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.calibrate is not None and (args.bits == 8 or args.group is not None):
        raise ValueError("--calibrate is given, expected none with --bits 8 or --group")
    start(args)
    from mistral_ext.weights.folder import read_folder
    from mistral_ext.weights.kept import holds_work, kept_folder
    from mistral_ext.weights.new_folder import expect_replaceable, is_free
    from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

    target = Path(args.target).expanduser()
    expect_replaceable(target)  # reports a folder that exists before the text is read
    tokens = _tokens(args) if args.calibrate is not None else None
    try:
        folder = quantize_checkpoint(
            args.source,
            target,
            args.bits,
            args.group,
            options.dtype_of(args),
            calibration=tokens,
            size=args.size,
        )
    except KeyboardInterrupt:
        kept = kept_folder(target)
        if tokens is not None and is_free(target) and holds_work(kept):
            print(f"mistral-ext: the same command goes on from {kept}", file=sys.stderr, end="")
        raise
    weights, form = folder / "model.safetensors", read_folder(folder).quantization
    print(f"{weights}: {weights.stat().st_size / 1e9:.2f} GB, {form}", file=sys.stderr)
    return 0


def _tokens(args: argparse.Namespace) -> list[int]:
    """Returns the first tokens of the calibration text, at most `_CALIBRATION_TOKENS`."""
    text = read_text(args.calibrate)
    if not text.strip():
        raise ValueError(f"{args.calibrate!r} is empty, expected a text for --calibrate")
    from mistral_ext.llm import read_tokenizer
    from mistral_ext.weights.folder import read_folder
    from mistral_ext.weights.hub import resolve

    tokenizer = read_tokenizer(read_folder(resolve(args.source)))
    if tokenizer is None:
        raise ValueError(f"{args.source!r} has no tokenizer, expected a model with a tokenizer")
    tokens = tokenizer.encode(text)[:_CALIBRATION_TOKENS]
    if len(tokens) < _FEW_TOKENS:
        print(
            f"mistral-ext: {args.calibrate} has {len(tokens)} tokens: with fewer than "
            f"{_FEW_TOKENS} calibration gains little, and up to {_CALIBRATION_TOKENS} are used",
            file=sys.stderr,
        )
    return tokens
