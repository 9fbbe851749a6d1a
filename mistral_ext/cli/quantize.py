"""`mistral-ext quantize`: write a model with weights in 8 or 4 bits."""

from __future__ import annotations

import argparse
import sys

from mistral_ext.cli import options
from mistral_ext.cli.start import start


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "quantize",
        parents=[options.common()],
        help="write a model with weights in 8 or 4 bits",
        description="Write a model folder with weights in 8 or 4 bits, which loads without the "
        "original. It is there when it is complete; an interrupted run leaves nothing.",
    )
    parser.add_argument("source", metavar="IN", help="model folder or hub id")
    parser.add_argument("target", metavar="OUT", help="folder to make")
    parser.add_argument("--bits", type=int, choices=(8, 4), required=True)
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="4 bits in equal steps, as older versions made them, with a scale for N weights: 32, "
        "64 or 128",
    )
    options.add_dtype(parser, "of embeddings and norms; default: as stored")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start(args)
    from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

    folder = quantize_checkpoint(
        args.source, args.target, args.bits, args.group, options.dtype_of(args)
    )
    weights = folder / "model.safetensors"
    print(f"{weights}: {weights.stat().st_size / 1e9:.2f} GB", file=sys.stderr)
    return 0
