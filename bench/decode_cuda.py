"""Times the decode step of a whole Mistral 7B on a GPU, by kernel and beside other engines.

    python bench/decode_cuda.py [--layers 32] [--weights bf16 int8 int4] [--peers all] [--json FILE]

Random weights, made on the device. A step runs as in generation: a replayed CUDA graph, launched
while the one before is under way; MISTRAL_EXT_OVERLAP=1 has its kernels overlap. For each format,
batch and history: tokens per second, the share of the floor that roofline.py computes for the
bandwidth of a copy in the same run, and the step by kernel. Peers, in bf16 for one sequence: the
same model and graph with torch's products in the place of ours ("torch"), and transformers, eager
and compiled with a static cache. A peer that fails is named with its error.

Aimed at on an H200, tokens/s of one sequence: bf16 272, and 260 with a full window; int8 475;
int4 800; 8 sequences in bf16 7 times one; 1.15 times the best peer.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import write_json
from measure_cuda import ceilings
from models import mistral_7b, random_weights_on_gpu
from peers import Transformers
from roofline import KINDS, decode_step, print_table
from shapes import GPU, scaled

from mistral_ext import _C
from mistral_ext.engine.graph_runner import GraphRunner
from mistral_ext.engine.params import SamplingParams
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import SlotPool
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import routing

# (weights, sequences, tokens that each has seen)
CASES = [(name, batch, 128) for name in KINDS for batch in (1, 8, 16, 32)]
CASES.insert(1, ("bf16", 1, 4096))
STEPS, RUNS = scaled(32), 5


def our_step(model: Transformer, batch: int, history: int) -> Callable[[], None]:
    """Returns a function that launches a step and waits for the step before. No other function here
    knows the engine."""
    config = model.config
    capacity = min(config.sliding_window, history + 4 * STEPS * (RUNS + 2))
    cache = SlotPool(config, capacity * batch, model.dtype, GPU)
    for pool in (*cache.k, *cache.v):
        pool.normal_()
    rings = [cache.allocate(capacity, capacity) for _ in range(batch)]
    cache.append(dict.fromkeys(rings, history))
    sampler = Sampler(batch, config.vocab_size, GPU)
    rows = list(range(batch))
    for row in rows:
        sampler.start(row, SamplingParams(), [1])
    runner = GraphRunner(model, cache, sampler)
    before = runner.launch(rings, rows, [1] * batch)

    def step() -> None:
        nonlocal before
        now = runner.launch(rings, rows, None)
        before.token_ids()
        before = now

    return step


def seconds_of(step: Callable[[], None]) -> float:
    """The seconds of a step among many steps: the median of several runs."""
    samples = []
    for run in range(1 + RUNS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        if run > 0:  # the first captures, compiles and loads
            samples.append((time.perf_counter() - begin) / STEPS)
    return statistics.median(samples)


def kernel_seconds(step: Callable[[], None], launches: int) -> list[float] | None:
    """The seconds of each of our kernels in a step, in order. None if a step has fewer than
    `launches` kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = sorted(
        (event for event in profile.events() if "mistral::" in event.name),
        key=lambda event: event.time_range.start,
    )
    if len(kernels) != launches:
        print(f"the profiler saw {len(kernels)} kernels of a step, expected {launches}")
        return None
    return [event.time_range.elapsed_us() * 1e-6 for event in kernels]


@contextmanager
def torch_products() -> Iterator[None]:
    """In the block, torch makes all products, those of few tokens too."""
    most, routing.MOST_TOKENS_ON_CUDA = routing.MOST_TOKENS_ON_CUDA, 0
    try:
        yield
    finally:
        routing.MOST_TOKENS_ON_CUDA = most


def measure(
    model: Transformer, name: str, batch: int, history: int, bandwidth: float, matrix: float
) -> dict[str, Any]:
    """Measures one of CASES, prints it, and returns it for the report."""
    launches = list(decode_step(model.config, name, batch, history))
    floor = sum(launch.floor(bandwidth, matrix) for launch in launches)
    step = our_step(model, batch, history)
    seconds = seconds_of(step)
    kernels = kernel_seconds(step, len(launches))
    print(
        f"\n{name}, {batch} sequences after {history} tokens: {batch / seconds:.1f} tokens/s, "
        f"{floor / seconds:.0%} of the floor",
        flush=True,
    )
    print_table(launches, bandwidth, matrix, kernels)
    case = {"weights": name, "batch": batch, "history": history, "seconds": seconds}
    return case | {"launches": kernels}


def peer_seconds(
    config: MistralConfig, history: int, wanted: str
) -> Iterator[tuple[str, float | str]]:
    """Yields the name of each peer that `wanted` is a part of, with the seconds of its step, or
    with what went wrong."""
    weights = random_weights_on_gpu(config)
    ids = torch.randint(3, config.vocab_size, (history,)).tolist()

    def with_torch_products() -> float:
        with torch_products():
            return seconds_of(our_step(Transformer(config, weights), 1, history))

    # The window does not matter so early, and without one its cache is simpler.
    transformers = functools.cache(
        lambda: Transformers(dataclasses.replace(config, sliding_window=None), weights)
    )
    peers = {
        "torch's products, CUDA graph": with_torch_products,
        "transformers, eager": lambda: seconds_of(transformers().decoder(1, ids)),
        "transformers, compiled": lambda: seconds_of(transformers().compiled_decoder(1, ids)),
    }
    for name, run in peers.items():
        if wanted not in name:
            continue
        try:
            yield name, run()
        except Exception as error:  # whatever a peer does, the rest goes on
            yield name, f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--weights", nargs="+", choices=("none", *KINDS), default=list(KINDS))
    parser.add_argument("--peers", choices=("none", "torch", "transformers", "all"), default="all")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if _C.cuda_architectures is None or not torch.cuda.is_available():
        raise SystemExit("decode_cuda: needs a CUDA device and a build with CUDA")

    config = mistral_7b(args.layers)
    limits = ceilings(2**30)
    bandwidth, matrix = limits["copy_bytes"], limits["matmul_flops"]
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e9:.0f} GB/s")
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "layers": args.layers,
        "copy_bandwidth": bandwidth,
        "matrix_rate": matrix,
        "overlapping": _C.overlapping(),
        "cases": [],
        "peers": {},
    }

    def save() -> None:
        if args.json:
            write_json(args.json, report)

    for name in (name for name in KINDS if name in args.weights):
        model = Transformer(config, random_weights_on_gpu(config, name))
        for case in (case for case in CASES if case[0] == name):
            report["cases"].append(measure(model, *case, bandwidth, matrix))
            save()
        del model  # before the next one's weights are made
    if args.peers != "none":
        wanted = "" if args.peers == "all" else args.peers
        for peer, result in peer_seconds(config, CASES[0][2], wanted):
            report["peers"][peer] = result
            shown = result
            if isinstance(result, float):
                shown = f"{1 / result:.1f} tokens/s"
                if report["cases"]:
                    ours = report["cases"][0]["seconds"]
                    shown += f", ours {result / ours:.2f} times that"
            print(f"{peer}: {shown}", flush=True)
            save()


if __name__ == "__main__":
    main()
