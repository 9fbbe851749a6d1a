"""`mistral-ext bench`: measure how fast this machine runs a model."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_ext.bench import DEFAULT_WEIGHTS, DTYPES
from mistral_ext.cli import options
from mistral_ext.cli.extras import expect_extra
from mistral_ext.cli.start import start
from mistral_ext.files import json_text

if TYPE_CHECKING:
    import torch

    from mistral_ext.bench.speed import Speed
    from mistral_ext.llm import Mistral

_LAYERS = 2

_COLUMNS = (
    ("weights", -10),
    ("GB a step", 9),
    ("decode tok/s", 12),
    ("of read", 7),
    ("prompt tok/s", 12),
    ("of peak", 7),
    ("first token s", 13),
    ("memory GB", 9),
)
_LEGEND = """\
decode: one sequence, tokens after the first; of read: the weights that a step reads over its time,
as a share of the bandwidth measured before and after. prompt: its tokens over the time to its first
token; of peak: its operations over that time, as a share of {peak}.
first token: of the very first prompt, the cache yet to be made. memory: {memory}."""
_ON_CPU = {
    "peak": "the rate of bf16 (else fp32) instructions",
    "memory": "resident in this process",
}
_ON_CUDA = {
    "peak": "torch's product of large bf16 matrices",
    "memory": "of the GPU, reserved by torch",
}


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "bench",
        parents=[options.common()],
        help="measure how fast this machine runs a model",
        description="Measure this machine: how fast it reads memory and multiplies, and how fast a "
        "model reads prompts and decodes. Without --model that is a few layers of Mistral 7B's "
        "shape with random weights, in several formats: they take up to 3 GB of memory and, on a "
        "laptop, less than a minute.",
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="measure this model: folder, GGUF file or hub id"
    )
    parser.add_argument(
        "--weights",
        metavar="FORMAT,...",
        help=f"of {', '.join((*DTYPES, *options.QUANTIZE))}, and without --model formats of "
        f"files, as q4_k. Default: {','.join(DEFAULT_WEIGHTS)}; with --model: as they are stored",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help=f"without --model: of 32 (default {_LAYERS})"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default) or cuda")
    parser.add_argument(
        "--prompt", type=int, default=128, metavar="N", help="tokens of a prompt (default 128)"
    )
    parser.add_argument(
        "--tokens", type=int, default=16, metavar="N", help="tokens to decode (default 16)"
    )
    parser.add_argument("--output", metavar="FILE", help="draw a roofline plot (PNG)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    start(args)
    from mistral_ext.weights.device import find_device

    device = find_device(args.device)
    weights = _weights(args)
    report = _facts(args, device)
    if not args.json:
        _print_head(report)
        _print_row([title for title, _ in _COLUMNS])
    report["speeds"] = []
    for name in weights:
        speed = _measure(args, name, device)
        report["speeds"].append({"name": name or speed.weights, **dataclasses.asdict(speed)})
        if not args.json:
            _print_row(_cells(name or speed.weights, speed))
    if args.json:
        print(json_text(report))
    else:
        print(_LEGEND.format(**(_ON_CPU if device.type == "cpu" else _ON_CUDA)))
        if not args.output:
            print(f"--output FILE.png draws a roofline plot{_how_to_draw()}.")
    if args.output:
        _draw(report, Path(args.output))
    return 0


def _how_to_draw() -> str:
    missing = find_spec("matplotlib") is None
    return " after pip install 'mistral_ext[plot]'" if missing else ""


def _check(args: argparse.Namespace) -> None:
    for name in ("prompt", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    if args.layers is not None and args.model:
        raise ValueError("--layers is given, expected none with --model")
    if args.layers is not None and not 1 <= args.layers <= 32:
        raise ValueError(f"--layers is {args.layers}, expected 1 to 32")
    if args.output:
        expect_extra("plot", "matplotlib")
        options.expect_folder_of("--output", args.output)


def _weights(args: argparse.Namespace) -> list[str | None]:
    """Returns the formats to measure. None stands for the format in which the weights are
    stored."""
    from mistral_ext.ops.weight import FORMATS

    if args.weights is None and args.model:
        return [None]
    known = dict.fromkeys((*DTYPES, *options.QUANTIZE, *(() if args.model else FORMATS)))
    names: list[str | None] = []
    for name in (args.weights or ",".join(DEFAULT_WEIGHTS)).split(","):
        if name not in known:
            raise ValueError(f"--weights has {name!r}, expected some of {', '.join(known)}")
        names.append(name)
    return names


def _facts(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    import torch

    from mistral_ext.bench import machine, peaks
    from mistral_ext.bench.speed import Limits, limits_of

    layers = args.layers or _LAYERS
    facts: dict[str, Any] = {
        **machine.software_and_processor(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "model": args.model or f"{layers} of the 32 layers of Mistral 7B, random weights",
        "prompt_tokens": args.prompt,
        "decode_tokens": args.tokens,
    }
    if device.type == "cpu":
        rates = peaks.rates()
        limits = Limits(peaks.read_bandwidth(), peaks.matrix_rate_of(rates))
        levels = {peaks.INSTRUCTIONS[name]: rate for name, rate in rates.items()}
    else:
        limits = limits_of(device)
        levels = {"bf16 products": limits.products}
    return {
        **facts,
        "read_bandwidth": limits.read,
        "matrix_rate": limits.products,
        "peaks": levels,
    }


def _print_head(report: dict[str, Any]) -> None:
    from mistral_ext.bench.machine import is_busy

    on_cpu = report["device"] == "cpu"
    print(
        "mistral_ext {mistral_ext}, torch {torch}, Python {python}, {system}\n"
        "{cpu}, {cores} cores; {threads} threads, {isa} kernels".format(**report),
        f"{report['memory'] / 1e9:.0f} GB of memory",
        sep=", ",
    )
    limits = [f"{'reads' if on_cpu else 'copies'} {report['read_bandwidth'] / 1e9:.1f} GB/s"]
    limits += [f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in report["peaks"].items()]
    print("" if on_cpu else f"{report['device']}, ", "; ".join(limits), sep="")
    if is_busy(report):
        print(
            f"The machine is busy (load {report['load']:.1f}): speeds are lower than they can be."
        )
    print("{model}; a prompt of {prompt_tokens} tokens, then {decode_tokens}\n".format(**report))


def _measure(args: argparse.Namespace, weights: str | None, device: torch.device) -> Speed:
    from mistral_ext.bench.speed import measure

    return measure(_load(args, weights, device), args.prompt, args.tokens)


def _load(args: argparse.Namespace, weights: str | None, device: torch.device) -> Mistral:
    import torch

    from mistral_ext.bench.models import random_model
    from mistral_ext.llm import Mistral

    dtype = getattr(torch, DTYPES[weights]) if weights in DTYPES else None
    quantize = weights if weights in options.QUANTIZE else None
    if args.model is not None:
        return Mistral.from_pretrained(args.model, device=device, dtype=dtype, quantize=quantize)
    form = None if weights in DTYPES else weights
    return random_model(args.layers or _LAYERS, form, dtype or torch.bfloat16, device)


def _cells(name: str, speed: Speed) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return [
        name,
        f"{speed.step_bytes / 1e9:.2f}",
        f"{speed.decode.tokens_per_second:.2f}",
        share(speed.decode.share),
        f"{speed.prompt.tokens_per_second:.1f}",
        share(speed.prompt.share),
        f"{speed.first_token_seconds:.2f}",
        "" if speed.memory is None else f"{speed.memory / 1e9:.2f}",
    ]


def _print_row(cells: list[str]) -> None:
    aligned = (
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
        for (_, width), cell in zip(_COLUMNS, cells, strict=True)
    )
    print("  ".join(aligned).rstrip(), flush=True)


def _draw(report: dict[str, Any], path: Path) -> None:
    from mistral_ext.bench.roofline import Point, Roofs, draw

    read = statistics.median(speed["decode"]["limit"] for speed in report["speeds"])
    points = []
    for speed in report["speeds"]:
        for series, marker in (("decode", "o"), ("prompt", "s")):
            rate = speed[series]
            across = rate["flops_per_byte"]
            roof = read * across if series == "decode" else report["matrix_rate"]
            if rate["share"] is not None:
                label = f"{rate['tokens_per_second']:.3g} tokens/s"
                up = rate["share"] * roof
                points.append(Point(speed["name"], series, marker, across, up, label))
    on_cpu = report["device"] == "cpu"
    verb = "reads" if on_cpu else "copies"
    where = "{cpu}, {threads} threads, {isa}" if on_cpu else "{device}"
    title = f"{{model}}\n{where}, mistral_ext {{mistral_ext}}".format(**report)
    draw(points, Roofs(read, f"{verb} {read / 1e9:.1f} GB/s", report["peaks"]), title, path)
