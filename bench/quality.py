"""Measures what 8- and 4-bit weights cost: perplexity, and the distance of logits from fp32.

    python bench/quality.py [--layers 2] [--tokens 128] [--model MODEL] [--threads N] [--json FILE]
    python bench/quality.py --model FILE.gguf --only peers [--tokens 512] [--calibrate 1536]
    python bench/quality.py --model FILE.gguf --only peers --calibrate 1536 --mixed 4.64,4.8,5.2

For the demo model on text that it has never seen, and for a model of Mistral 7B's shape with random
weights, few layers and random tokens. Weights are bfloat16 to begin with: `fp32` rounds nothing
else, `bf16` rounds activations, `int8` and `int4` both. `KL` is the mean divergence, in nats, of
the distributions of the next token from those in fp32, `max` and `mean` are differences of logits.
A random model is the worst case: it has learnt nothing that would outweigh the errors. Tokens are
read 512 at a time, and once more 8 at a time: a few are multiplied with int8 in integers.

Then other ways to get 8 and 4 bits, on the demo or MODEL in fp32, so that nothing but the weights
is rounded; llama.cpp's Q8_0 is among them if its package gguf is installed. The demo's perplexity
is no measure to tell them apart: the demo is overfitted, and noise can help it. KL is. e4m3 are
floating point numbers of 8 bits, which some GPUs know.

Takes a minute or two and 8 GB. `--model` measures another model instead, a folder or a GGUF file,
on the first `--tokens` tokens of the same text; its weights are taken as they decode to bfloat16.
If the package llama_cpp is installed, types of llama.cpp made of the same GGUF file follow, next to
ours (quality_peers.py). `--calibrate N` adds int4 that is calibrated on the N tokens after those,
`--mixed BITS,...` int4 with as much int8 as so many bits of a weight in the layers allow.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import machine, print_header, print_machine, print_row, write_json
from models import mistral_7b
from quality_peers import measure_peers
from torch import Tensor

from mistral_ext import Mistral
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.llm import DEMO_MODEL, read_tokenizer
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import Quantized
from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.weights.checkpoint import load_weights, tensor_shapes
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.hub import resolve
from mistral_ext.weights.quantize import Quantization, quantize

PARTS = ("formats", "ways", "peers")
HELD_OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "held_out.txt"
COLUMNS = [("", -36), ("weights", 10), ("perplexity", 10), ("to bf16", 8)]
COLUMNS += [("KL", 9), ("max", 8), ("mean", 8), ("same top", 8)]

Weights = dict[str, Tensor | Quantized]


@dataclass
class Subject:
    """A model in bfloat16, and the tokens that it is measured on."""

    config: MistralConfig
    weights: dict[str, Tensor]
    ids: list[int]  # the logits after these are compared
    tokenizer: Tokenizer | None = None
    text: str | None = None  # for the perplexity

    def llm(self, weights: Weights) -> Mistral:
        return Mistral(self.config, Transformer(self.config, weights), self.tokenizer, DEMO_MODEL)


def demo() -> Subject:
    folder = read_folder(DEMO_MODEL)
    tokenizer, text = Tokenizer.from_folder(DEMO_MODEL), HELD_OUT.read_text()
    weights = load_weights(folder)
    return Subject(folder.config, weights, tokenizer.encode(text)[:4096], tokenizer, text)


def real(model: str, tokens: int) -> Subject:
    folder = read_folder(resolve(model))
    weights = {
        name: weight.dequantize(torch.bfloat16) if isinstance(weight, Quantized) else weight
        for name, weight in load_weights(folder, torch.bfloat16).items()
    }
    ids = read_tokenizer(folder).encode(HELD_OUT.read_text())
    return Subject(folder.config, weights, ids[:tokens])


def peers_of(
    model: str, tokens: int, calibration: int, skipped: int, mixed: list[float]
) -> dict[str, dict[str, float]]:
    """Measures ways to round MODEL, llama.cpp's among them."""
    path = resolve(model)
    folder = read_folder(path)
    ids = read_tokenizer(folder).encode(HELD_OUT.read_text())
    print(f"\n{folder.config.n_layers} layers; {tokens} tokens compared; layers rounded, in fp32")
    with tempfile.TemporaryDirectory(prefix="mistral_ext-") as made:
        begin = tokens + skipped
        given = ids[:tokens], ids[begin : begin + calibration]
        return measure_peers(path, folder.config, *given, Path(made), compare, mixed)


def random_7b(layers: int, tokens: int) -> Subject:
    torch.manual_seed(0)
    config = mistral_7b(layers)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        is_norm = len(shape) == 1
        weights[name] = (torch.ones(shape) if is_norm else torch.randn(shape) * 0.02).bfloat16()
    return Subject(config, weights, torch.randint(3, config.vocab_size, (tokens,)).tolist())


def quantized(weights: dict[str, Tensor], quantization: Quantization) -> Weights:
    made: Weights = dict(weights)
    for name, weight in weights.items():
        made[name] = quantization.quantize(name, weight, name) or weight
    return made


FORMATS: dict[str, Callable[[dict[str, Tensor]], Weights]] = {
    "fp32": lambda weights: {name: weight.float() for name, weight in weights.items()},
    "bf16": dict,
    "int8": lambda weights: quantized(weights, Quantization.from_name("int8")),
    "int4": lambda weights: quantized(weights, Quantization.from_name("int4")),
}
FEW = " by 8 tokens"
FORMATS |= {name + FEW: FORMATS[name] for name in ("bf16", "int8", "int4")}


def e4m3(weight: Tensor, _: int) -> Tensor:
    """Rounds to floating point numbers of 8 bits, with a scale for each row."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = weight.float().abs().amax(1, keepdim=True) / largest
    return (weight.float() / scales).to(torch.float8_e4m3fn).float() * scales


def eight_bits(weight: Tensor, group: int) -> Tensor:
    return quantize(weight, "q8_0" if group == 32 else "int8").dequantize()


def q8_0(weight: Tensor, _: int) -> Tensor:
    """Rounds to Q8_0 as llama.cpp does, with the code of its package gguf."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    rounded = quants.quantize(weight.float().numpy(), kind)
    return torch.from_numpy(quants.dequantize(rounded, kind).reshape(weight.shape))


def plain_rounding(weight: Tensor, group: int) -> Tensor:
    """Rounds with the largest magnitude of a group over 7 as its scale. This shows what the search
    for better scales gains."""
    groups = weight.float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(2, keepdim=True) / 7).bfloat16().float()
    return ((groups / scales).round().clamp(-8, 7) * scales).flatten(1)


def searched(weight: Tensor, group: int) -> Tensor:
    return quantize(weight, "int4", group).dequantize()


def other_ways(weights: dict[str, Tensor]) -> dict[str, Callable[[], Weights]]:
    """Other ways to round. For each name there is a function that makes fp32 weights in which only
    the layers' matrices are rounded."""

    def apply(method: Callable[[Tensor, int], Tensor], group: int) -> Weights:
        made: Weights = {}
        for name, weight in weights.items():
            rounds = name.startswith("layers.") and weight.dim() == 2
            # The demo's hidden dimension, 704, is no multiple of 128.
            fitting = math.gcd(group, weight.shape[-1])
            made[name] = method(weight, fitting) if rounds else weight.float()
        return made

    ways = {
        f"int4, {way}, groups of {group}": (method, group)
        for group in (32, 64, 128)
        for way, method in (("rounding", plain_rounding), ("scales searched", searched))
    }
    ways |= {"8 bits, rows": (eight_bits, 1), "8 bits, groups of 32": (eight_bits, 32)}
    if importlib.util.find_spec("gguf"):
        ways["8 bits, llama.cpp's Q8_0"] = (q8_0, 32)
    ways["e4m3, rows"] = (e4m3, 1)
    return {name: lambda how=how: apply(*how) for name, how in ways.items()}


def compare(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """Compares two sets of logits, [T, V] each."""
    divergence, largest, total = 0.0, 0.0, 0.0
    for ours, theirs in zip(logits.split(256), exact.split(256), strict=True):
        expected, got = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        divergence += (expected.exp() * (expected - got)).sum().item()
        difference = (ours - theirs).abs()
        largest = max(largest, difference.max().item())
        total += difference.double().sum().item()
    return {
        "kl": divergence / len(exact),
        "max_logit_error": largest,
        "mean_logit_error": total / exact.numel(),
        "same_top": (logits.argmax(-1) == exact.argmax(-1)).float().mean().item(),
    }


def measure(
    subject: Subject, variants: dict[str, Callable[[], Weights]], exact: Tensor, base: float | None
) -> dict[str, dict[str, float]]:
    """Prints and returns a row for each variant. `base` is the perplexity in bf16. None: bf16 is
    one of the variants."""
    rows = {}
    print_header(COLUMNS)
    for name, make in variants.items():
        weights = make()
        llm = subject.llm(weights)
        chunk = 8 if name.endswith(FEW) else 512
        row = {"weight_bytes": sum(weight.nbytes for weight in weights.values())}
        if subject.text is not None:
            llm.prefill_chunk = chunk
            row["perplexity"] = perplexity(llm, subject.text, progress=False).value
            base = row["perplexity"] if name == "bf16" else base
        row |= compare(llm.logits(subject.ids, chunk=chunk), exact)
        rows[name] = row
    for name, row in rows.items():
        cells = [f"{row['weight_bytes'] / 1e6:.1f} MB", "", ""]
        if base is not None:
            cells[1:] = [f"{row['perplexity']:.3f}", f"{row['perplexity'] / base - 1:+.2%}"]
        cells += [f"{row['kl']:.2e}", f"{row['max_logit_error']:.3f}"]
        cells += [f"{row['mean_logit_error']:.4f}", f"{row['same_top']:.1%}"]
        print_row(COLUMNS, [name, *cells])
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2, help="of the random model")
    parser.add_argument("--tokens", type=int, default=128, help="read by it, or by MODEL")
    parser.add_argument("--model", help="folder or GGUF file, to be measured instead")
    parser.add_argument(
        "--only",
        choices=PARTS,
        action="append",
        help="a part of it; may be given several times; peers needs --model",
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        default=0,
        metavar="N",
        help="tokens to calibrate MODEL's int4 with",
    )
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="tokens of the text between those that are compared and those that calibrate",
    )
    parser.add_argument(
        "--mixed",
        type=lambda text: [float(bits) for bits in text.split(",")],
        default=[],
        metavar="BITS,...",
        help="bits of a weight in MODEL's layers, for which int4 and int8 are mixed",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    if not options.model and "peers" in (options.only or ()):
        parser.error("--only peers needs --model")
    options.only = set(options.only or PARTS)
    if options.calibrate and not (options.model and "peers" in options.only):
        parser.error("--calibrate needs --model, and the part peers")
    if options.mixed and not (options.model and "peers" in options.only):
        parser.error("--mixed needs --model, and the part peers")
    return options


def main() -> None:
    args = parse_options()
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = machine()
    print_machine(facts)
    report: dict = {"machine": facts}

    if args.model and "peers" in args.only:
        report["peers"] = peers_of(args.model, args.tokens, args.calibrate, args.skip, args.mixed)
    if args.only == {"peers"}:
        subjects = {}
    elif args.model:
        subjects = {"model": real(args.model, args.tokens)}
    else:
        subjects = {"demo": demo(), "random_7b": random_7b(args.layers, args.tokens)}
    for title, subject in subjects.items():
        exact = subject.llm(FORMATS["fp32"](subject.weights)).logits(subject.ids, chunk=512)
        print(
            f"\n{title}: {subject.config.n_layers} layers; {len(subject.ids)} tokens compared, "
            f"whose logits have a standard deviation of {exact.std():.2f}"
        )
        # Others are compared with bf16.
        chosen = FORMATS if "formats" in args.only else {"bf16": FORMATS["bf16"]}
        formats = {
            name: lambda make=make, weights=subject.weights: make(weights)
            for name, make in chosen.items()
        }
        report[title] = measure(subject, formats, exact, None)
        if title != "random_7b" and "ways" in args.only:
            print(f"\nways to round, on the {title} in fp32")
            base = report[title]["bf16"].get("perplexity")
            ways = other_ways(subject.weights)
            report["ways_to_round"] = measure(subject, ways, exact, base)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
