"""`mistral-ext compare`: measure how much the predictions of two models differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_ext.cli import options
from mistral_ext.cli.extras import expect_extra
from mistral_ext.cli.input import read_text
from mistral_ext.cli.start import start
from mistral_ext.files import json_text

if TYPE_CHECKING:
    from mistral_ext.llm import Mistral


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "compare",
        parents=[options.common()],
        help="compare the predictions of two models",
        description="Compare the predictions of model B with those of model A on a text: "
        "Kullback-Leibler divergence, agreement on the most likely token, perplexities. "
        "'compare A --quantize-b int4' shows what 4 bits cost. Pieces of 8 tokens (--chunk 8) are "
        "multiplied as when tokens are generated; longer ones may have more precise activations, "
        "as with iq4_nl and iq4_xs (--quantize-b int4) on a CPU without AVX-512 VNNI.",
    )
    parser.add_argument("a", metavar="A", help="folder, GGUF file or hub id: the standard")
    parser.add_argument("b", metavar="B", nargs="?", help="another; default: A")
    parser.add_argument(
        "--file",
        metavar="PATH",
        action="append",
        required=True,
        help="the text, '-' for stdin; may be repeated, each is a text of its own",
    )
    for name in ("a", "b"):
        parser.add_argument(
            f"--quantize-{name}",
            choices=options.QUANTIZE,
            help=f"round the weights of {name.upper()}",
        )
        options.add_adapter(parser, f"LoRA adapter of {name.upper()}", f"--adapter-{name}")
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default) or cuda")
    options.add_dtype(parser, "default: as stored")
    parser.add_argument(
        "--chunk",
        type=int,
        default=256,
        metavar="N",
        help="tokens read at a time (default 256)",
    )
    parser.add_argument("--png", metavar="FILE", help="draw a histogram of the divergences")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.png:
        expect_extra("plot", "matplotlib")
        options.expect_folder_of("--png", args.png)
    if args.chunk < 1:
        raise ValueError(f"--chunk is {args.chunk}, expected 1 or more")
    texts = [read_text(file) for file in args.file]
    start(args)
    from mistral_ext.evaluate.compare import compare, write_histogram

    first, first_adapter = _load(args, args.a, args.quantize_a, args.adapter_a)
    second, second_adapter = _load(args, args.b or args.a, args.quantize_b, args.adapter_b)
    adapters = first_adapter, second_adapter
    result = compare(first, second, texts, chunk=args.chunk, adapters=adapters)
    shares = (0.5, 0.9, 0.99, 1.0)
    shown = {
        "tokens": len(result.divergences),
        "perplexity_a": result.perplexities[0],
        "perplexity_b": result.perplexities[1],
        "kl_mean": result.divergences.mean().item(),
        **{f"kl_{100 * share:g}%": result.quantile(share) for share in shares},
        "same_top_token": result.agreement,
    }
    if args.json:
        print(json_text(shown))
    else:
        for name, value in shown.items():
            print(f"{name:16} {value:{'d' if name == 'tokens' else '.6g'}}")
    if args.png:
        what = [args.b or args.a, args.quantize_b, second_adapter, "from"]
        what += [args.a, args.quantize_a, first_adapter]
        write_histogram(result, Path(args.png), " ".join(filter(None, what)))
    return 0


def _load(
    args: argparse.Namespace, model: str, quantize: str | None, adapter: tuple[str, str] | None
) -> tuple[Mistral, str | None]:
    """Loads a model. Returns the model and the name of its adapter (None: it has no adapter)."""
    from mistral_ext.llm import Mistral

    llm = Mistral.from_pretrained(
        model,
        device=args.device,
        dtype=options.dtype_of(args),
        quantize=quantize,
        adapters=dict([adapter]) if adapter else None,
    )
    return llm, adapter[0] if adapter else None
