"""What a JSON schema adds to a decode step of Mistral 7B on the CPU, in CPU seconds.

    python bench/masks.py --tokenizer FOLDER [--layers 4] [--weights int4] [--runs 5] [--json FILE]

FOLDER has a tokenizer of Mistral's. A text that matches the schema is followed token by token, as a
completion is: the matcher takes the token and says which may come next, and the sampler's row gets
that as its bias and draws. The time of a greedy draw without a schema is subtracted. The step is
that of layers of Mistral 7B's shape with random weights; 32 layers follow from one and from
`--layers`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from arguments import at_least
from measure import machine, print_machine, write_json

from mistral_ext import SamplingParams
from mistral_ext.bench.models import random_model
from mistral_ext.engine.runner import Piece, Runner
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import SlotPool
from mistral_ext.text.constraint import Constraint
from mistral_ext.text.grammar import GrammarCompiler
from mistral_ext.text.tokenizer import Tokenizer

LAYERS = 32  # of Mistral 7B
_PROMPT = 64  # tokens before a step

# An order, with what schemas of applications have: nested objects, arrays, enums, optional fields.
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "customer": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 60},
                "email": {"type": "string", "format": "email"},
                "since": {"type": "string", "format": "date"},
                "tier": {"enum": ["basic", "silver", "gold"]},
            },
            "required": ["name", "email"],
            "additionalProperties": False,
        },
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "title": {"type": "string"},
                    "price": {"type": "number", "minimum": 0},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
                },
                "required": ["title", "price", "count"],
                "additionalProperties": False,
            },
            "minItems": 1,
        },
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["id", "customer", "items", "note"],
    "additionalProperties": False,
}
VALUE = {
    "id": 20417,
    "customer": {
        "name": "Ada Lovelace",
        "email": "ada@example.org",
        "since": "2021-05-17",
        "tier": "gold",
    },
    "items": [
        {"title": "Analytical engine, brass", "price": 1899.5, "count": 1, "tags": ["heavy"]},
        {"title": "Punched cards (box of 500)", "price": 24, "count": 12, "tags": []},
    ],
    "note": "Please leave the parcels with the neighbour in number 12 if nobody answers.",
}


def mask_seconds(
    tokenizer: Tokenizer, runs: int, clock: Callable[[], float] = time.process_time
) -> tuple[list[float], float]:
    """Returns the seconds that the schema adds to each token, and the seconds of compiling it, both
    by `clock`."""
    constraint = Constraint("schema", json.dumps(SCHEMA))
    compiler = GrammarCompiler(tokenizer)
    compiler.compile(Constraint("regex", "a"), starts_text=True)  # reads the vocabulary
    begin = clock()
    grammar = compiler.compile(constraint, starts_text=True)
    compiled = clock() - begin
    ids = tokenizer.encode(json.dumps(VALUE), bos=False)
    logits = torch.randn(1, tokenizer.vocab_size)
    masked, plain = (Sampler(1, tokenizer.vocab_size) for _ in range(2))
    added: list[list[float]] = [[] for _ in ids]
    for turn in range(runs + 1):
        matcher = grammar.matcher()
        for sampler in (masked, plain):
            sampler.start(0, SamplingParams(temperature=0), [1])
        for seconds, token_id in zip(added, ids, strict=True):
            begin = clock()
            matcher.consume(token_id)
            masked.restrict(0, matcher.allowed)
            masked.draw_now([0], logits)
            between = clock()
            plain.draw_now([0], logits)
            end = clock()
            if turn > 0:  # the first one warms up
                seconds.append(between - begin - (end - between))
    return [statistics.median(seconds) for seconds in added], compiled


def step_of(layers: int, form: str) -> Callable[[], object]:
    """A function that decodes one token with a random model."""
    model = random_model(layers, form, torch.bfloat16, torch.device("cpu")).model
    pool, sampler = SlotPool(model.config, _PROMPT + 8, model.dtype), Sampler(1, 32)
    extent = pool.allocate(_PROMPT + 8, _PROMPT + 8)
    assert extent is not None
    sampler.start(0, SamplingParams(), [1])
    runner = Runner(model, pool, sampler)
    runner.read([Piece(extent, [5] * _PROMPT, 0)])
    pool.advance(extent, _PROMPT)
    return lambda: runner.verify([extent], [0], [[5]], [-1])


def step_seconds(layers: int, form: str, runs: int) -> float:
    """The CPU seconds of a decode step of 32 layers, extrapolated from steps of one layer and of
    `layers` layers."""
    steps = {count: step_of(count, form) for count in (1, layers)}
    samples: dict[int, list[float]] = {count: [] for count in steps}
    for turn in range(4 * runs + 1):
        for count, step in steps.items():
            begin = time.process_time()
            step()
            if turn > 0:
                samples[count].append(time.process_time() - begin)
    one, more = (statistics.median(found) for found in samples.values())
    return one + (LAYERS - 1) * (more - one) / (layers - 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER")
    parser.add_argument("--layers", type=at_least(2), default=4, help="of the larger model")
    parser.add_argument("--weights", default="int4", help="int4, int8, q4_k, ...")
    parser.add_argument("--runs", type=at_least(1), default=5)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    tokenizer = Tokenizer.from_folder(args.tokenizer)
    if tokenizer is None:
        raise SystemExit(f"--tokenizer is {args.tokenizer}, expected a folder with a tokenizer")
    facts = machine()
    print_machine(facts)
    added, compiled = mask_seconds(tokenizer, args.runs)
    step = step_seconds(args.layers, args.weights, args.runs)
    mean = statistics.fmean(added)
    cuts = statistics.quantiles(added, n=100, method="inclusive")
    print(f"vocabulary of {tokenizer.vocab_size}, text of {len(added)} tokens")
    print(f"compiled in {1000 * compiled:.1f} ms")
    print(f"a token: mean {1e6 * mean:.0f} us, p50 {1e6 * cuts[49]:.0f}, p99 {1e6 * cuts[98]:.0f}")
    print(f"a step of {args.weights}, {LAYERS} layers: {1000 * step:.0f} ms")
    print(f"the schema adds {mean / step:.2%} to a step")
    if args.json:
        figures = {"added": added, "compiled": compiled, "step": step, "share": mean / step}
        write_json(args.json, {"machine": facts, "weights": args.weights, **figures})


if __name__ == "__main__":
    main()
