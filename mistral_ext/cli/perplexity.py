"""`mistral-ext perplexity`: measure how well a model predicts a text."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from mistral_ext.cli import options
from mistral_ext.cli.input import read_text
from mistral_ext.cli.options import load_adapted_model
from mistral_ext.files import json_text


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "perplexity",
        parents=[options.common(), options.model(), options.adapter()],
        help="measure how well a model predicts a text",
        description="Print the perplexity of texts: each token is predicted from all before it "
        "that the model's window lets it see. A longer text than a model without a window knows "
        "positions is cut into segments of that length.",
    )
    parser.add_argument(
        "--file",
        metavar="PATH",
        action="append",
        required=True,
        help="the text, '-' for stdin; may be repeated, each is a text of its own",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="the first N of each text")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    texts = [read_text(file) for file in args.file]
    llm, adapter = load_adapted_model(args)
    from mistral_ext.evaluate.perplexity import perplexity

    result = perplexity(llm, texts, args.max_tokens, adapter=adapter)
    if args.json:
        shown = {"perplexity": result.value, **dataclasses.asdict(result), "rate": result.rate}
        print(json_text(shown))
        return 0
    print(f"perplexity {result.value:.4f}")
    print(
        f"[{result.nll:.5f} nats a token, {result.tokens} tokens in {result.segments} "
        f"segment{'s' if result.segments > 1 else ''}, {result.rate:.1f} tokens/s]",
        file=sys.stderr,
    )
    return 0
