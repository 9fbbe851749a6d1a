"""How long a stream waits between two tokens while another client's long prompt is read.

    python bench/prompt_gap.py --model FILE.gguf [--prompt 4096] [--json FILE]
    python bench/prompt_gap.py --shape LAYERS [--weights int4]

It steps the engine itself, without a server, and times each step in processor time of one thread,
so that it works on a busy machine. First the stream is alone, then a prompt of random tokens is
read beside it: with passes that pause between layers (mistral_ext/engine/pace.py), and, for
comparison, without pauses in pieces of 32 tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from arguments import at_least
from measure import machine, print_machine, write_json
from serve_load import percentiles

from mistral_ext import Mistral, SamplingParams
from mistral_ext.bench.models import random_model
from mistral_ext.engine.engine import Engine
from mistral_ext.engine.request import Request

ALONE = 32  # steps


def timed_step(engine: Engine) -> float:
    """Makes a step, and returns its seconds of processor time."""
    began = time.process_time()
    for output in engine.step():
        if output.error:
            raise output.error
    return time.process_time() - began


def measure(llm: Mistral, tokens: int, pauses: bool) -> dict[str, float]:
    """The seconds of the steps of a stream, alone and beside a prompt of `tokens` tokens."""
    engine = Engine(llm.model, llm.config.vocab_size, 2, cache_tokens=3 * tokens + 2048, drafts=0)
    engine.runner.pauses = pauses

    def request(length: int, max_tokens: int) -> Request:
        ids = random.Random(length).choices(range(3, llm.config.vocab_size), k=length)
        params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
        return Request(ids, params, max_length=length + max_tokens)

    stream = engine.add(request(16, tokens + 1024))
    alone = [timed_step(engine) for _ in range(ALONE)][2:]
    engine.add(request(tokens, 1))
    beside = []
    with mock.patch("time.perf_counter", time.process_time):  # for the engine's own measurements
        while engine.load.waiting or engine.load.running > 1 or not beside:
            beside.append(timed_step(engine))
    engine.abort(stream)
    engine.step()
    alone_median = statistics.median(alone)
    return {
        "median_alone": alone_median,
        **{f"{name}_beside": value for name, value in percentiles(beside).items()},
        "p99_over_median_alone": percentiles(beside)["p99"] / alone_median,
        "prompt_tokens_per_second": tokens / sum(beside),
        "steps": len(beside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", help="a model folder, GGUF file or hub id")
    models.add_argument("--shape", type=at_least(1), metavar="LAYERS", help="of the 7B's shape")
    parser.add_argument("--weights", default="int4", help="with --shape: int4, int8, q4_k, ...")
    parser.add_argument("--prompt", type=at_least(64), default=4096, metavar="TOKENS")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    print_machine(facts)
    if args.shape:
        llm = random_model(args.shape, args.weights, torch.bfloat16, torch.device("cpu"))
    else:
        llm = Mistral.from_pretrained(args.model)
    name = Path(args.model).name if args.model else f"{args.shape} layers"
    report: dict[str, Any] = {"machine": facts, "model": name}
    for kind, pauses in (("pauses", True), ("no pauses", False)):
        report[kind] = measure(llm, args.prompt, pauses)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in report[kind].items())
        print(f"{kind}: {shown}", flush=True)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
