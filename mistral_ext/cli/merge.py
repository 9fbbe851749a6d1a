"""`mistral-ext merge`: write a model with a LoRA adapter merged into its weights."""

from __future__ import annotations

import argparse
import sys

from mistral_ext.cli import options
from mistral_ext.cli.start import start


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "merge",
        parents=[options.common()],
        help="write a model with a LoRA adapter merged into its weights",
        description="Write a model folder with a LoRA adapter merged into the weights. It is there "
        "when it is complete; an interrupted run leaves nothing.",
    )
    parser.add_argument("source", metavar="BASE", help="model folder or hub id, not quantised")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder, file or hub id of the adapter")
    parser.add_argument("target", metavar="OUT", help="folder to make")
    options.add_dtype(parser, "of the weights that are written; default: as stored")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start(args)
    from mistral_ext.weights.merge import merge_adapter

    folder = merge_adapter(args.source, args.adapter, args.target, dtype=options.dtype_of(args))
    weights = folder / "model.safetensors"
    print(f"{weights}: {weights.stat().st_size / 1e9:.2f} GB", file=sys.stderr)
    return 0
