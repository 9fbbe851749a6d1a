"""Times decoding with drafts next to decoding without them, on prompts of several kinds.

    python bench/drafts.py --model FOLDER [--draft-model SMALL] [--tokens 200] [--runs 3]
                           [--kind stories] [--json FILE]
    python bench/drafts.py --shape LAYERS [--weights int4] [--runs 3] [--json FILE]

The model has to be an Instruct model; completions are greedy. Both sides take turns on each prompt,
and have to write the same text. `speed` is the ratio of their tokens per CPU second of the process,
reading the prompt left out: the wall clock of a shared machine says little. `tokens a pass` and
`right`, the share of the drafts that were accepted, do not depend on the machine's load, except
that the number of drafts follows the measured cost of a pass.

Then, or with `--shape` alone, for layers of Mistral 7B's shape with random weights: the CPU
seconds of a pass over one sequence, by its number of tokens, relative to a pass of one token.
Drafts gain as long as `tokens a pass` is above that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, print_header, print_machine, print_row, write_json

from mistral_ext import Completion, Mistral, SamplingParams
from mistral_ext.bench.models import random_model
from mistral_ext.engine.params import MOST_DRAFTS
from mistral_ext.engine.runner import Piece, Runner
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import SlotPool
from mistral_ext.model.transformer import Transformer

_PROMPT = 64  # tokens before those of `pass_costs`
PROMPTS = Path(__file__).with_name("drafts_prompts.json")


def decode(llm: Mistral, ids: list[int], **options: Any) -> tuple[Completion, float]:
    """Returns a completion, and the CPU seconds that its tokens after the first took."""
    request = llm.request(ids, SamplingParams(**options), starts_text=True)
    outputs = llm.engine.outputs([request])
    output = next(outputs)
    begin = time.process_time()
    for output in outputs:
        if output.error:
            raise output.error
    return output.completion, time.process_time() - begin


def compare(llm: Mistral, prompt: dict[str, Any], tokens: int, runs: int) -> dict[str, float]:
    """The figures of one prompt."""
    ids = llm.encode_chat([{"role": "user", "content": prompt["prompt"]}])
    options = {"max_tokens": tokens, "schema": prompt.get("schema")}
    seconds: dict[int, list[float]] = {0: [], MOST_DRAFTS: []}
    completions = {}
    for turn in range(runs + 1):
        for drafts, samples in seconds.items():
            completions[drafts], sample = decode(llm, ids, drafts=drafts, **options)
            if turn > 0:  # the first one warms up
                samples.append(sample)
    plain, drafted = (completions[drafts] for drafts in seconds)
    if drafted.token_ids != plain.token_ids:
        raise ValueError(f"the text with drafts is {drafted.text!r}, expected {plain.text!r}")
    timing = drafted.timing
    passes = timing.decode_tokens - timing.accepted_tokens
    return {
        "tokens": len(plain.token_ids),
        "speed": statistics.median(seconds[0]) / statistics.median(seconds[MOST_DRAFTS]),
        "tokens_a_pass": timing.decode_tokens / max(1, passes),
        "right": timing.accepted_tokens / max(1, timing.drafted_tokens),
    }


def pass_costs(model: Transformer, runs: int) -> dict[int, float]:
    """The CPU seconds of a pass for each number of tokens, relative to a pass of one token that is
    made just before."""
    pool, sampler = SlotPool(model.config, _PROMPT + 8, model.dtype), Sampler(1, 32)
    extent = pool.allocate(_PROMPT + 8, _PROMPT + 8)
    assert extent is not None
    sampler.start(0, SamplingParams(), [1])
    runner = Runner(model, pool, sampler)
    runner.read([Piece(extent, [5] * _PROMPT, 0)])
    pool.advance(extent, _PROMPT)

    def seconds(tokens: int) -> float:
        begin = time.process_time()
        runner.verify([extent], [0], [[5] * tokens], [-1])
        return time.process_time() - begin

    ratios: dict[int, list[float]] = {tokens: [] for tokens in range(2, 9)}
    for turn in range(runs + 1):
        for tokens, samples in ratios.items():
            ratio = 1 / seconds(1) * seconds(tokens)
            if turn > 0:  # the first one warms up
                samples.append(ratio)
    return {tokens: statistics.median(samples) for tokens, samples in ratios.items()}


def print_costs(costs: dict[int, float]) -> None:
    print("\ntokens of a pass  " + "".join(f"{tokens:7}" for tokens in costs))
    print("relative to one   " + "".join(f"{cost:6.2f}x" for cost in costs.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", help="a model folder, GGUF file or hub id")
    models.add_argument("--shape", type=int, metavar="LAYERS", help="only what passes cost")
    parser.add_argument("--weights", default="int4", help="with --shape: int4, int8, q4_k, ...")
    parser.add_argument("--draft-model", metavar="SMALL", help="guesses tokens, too")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens at most")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kind", help="prompts of this kind only")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    kinds = json.loads(PROMPTS.read_text())
    if args.kind is not None and args.kind not in kinds:
        raise SystemExit(f"--kind is {args.kind!r}, expected one of {', '.join(kinds)}")

    facts = machine()
    print_machine(facts)
    name = Path(args.model).name if args.model else f"{args.shape} layers"
    report: dict[str, Any] = {"machine": facts, "model": name}
    if args.shape:
        model = random_model(args.shape, args.weights, torch.bfloat16, torch.device("cpu")).model
    else:
        llm = Mistral.from_pretrained(args.model, draft_model=args.draft_model)
        compare_kinds(llm, kinds, args, report)
        model = llm.model
    report["pass_costs"] = pass_costs(model, args.runs)
    print_costs(report["pass_costs"])
    if args.json:
        write_json(args.json, report)


def compare_kinds(
    llm: Mistral, kinds: dict[str, Any], args: argparse.Namespace, report: dict[str, Any]
) -> None:
    columns = [("", -12), ("tokens", 7), ("speed", 7), ("tokens a pass", 13), ("right", 6)]
    print_header(columns)
    for kind, prompts in kinds.items():
        if args.kind not in (None, kind):
            continue
        report[kind] = [compare(llm, prompt, args.tokens, args.runs) for prompt in prompts]
        for of_prompt in report[kind]:
            cells = [f"{of_prompt['speed']:.2f}x", f"{of_prompt['tokens_a_pass']:.2f}"]
            cells = [f"{of_prompt['tokens']:.0f}", *cells, f"{of_prompt['right']:.0%}"]
            print_row(columns, [kind, *cells])


if __name__ == "__main__":
    main()
