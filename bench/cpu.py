"""Measures the CPU path, and compares it with the limits of the machine and with other engines.

    python bench/cpu.py --out bench/results
    python bench/cpu.py [--only decode,prefill,linear] [--weights bf16,int8,int4] [--peers NAMES]
                        [--layers 8] [--turns 1.0] [--threads N]

It takes less than ten minutes on two cores and prints:

1. The limits: how fast the threads read memory, and how fast they multiply (see
   mistral_ext/bench/peaks.cpp).
2. A model of Mistral 7B's shape with 8 layers and random weights in bf16, int8 and int4, beside
   transformers (bf16) and, if it is installed, llama.cpp with as many bits (see peers.py):
   - first: seconds from weights in memory (llama.cpp: from a file in the page cache) to the first
     token after a prompt of 256, making and packing the model included
   - decode 1 and 4: tokens per second of 1 sequence and of 4 together, after 16 tokens; `of read`
     is the bytes of the weights over the time of a step, as a share of the bandwidth that a read
     loop has just then; `cost` is the time of a step for 4 over that for 1
   - prefill 256 and 1024: prompt tokens per second; `of peak` is the FLOPs that it takes over the
     time, as a share of what the best bf16 instruction does in registers (with int8 instructions
     more than 100 % is possible); see `flops` in
     mistral_ext/bench/models.py
   "x NAME" is our speed over that engine's.
3. linear alone: our kernels and torch's bf16 linear; for int8 and int4 our speed over our bf16.

Machines are noisy, virtual ones above all, whose memory may be twice as fast in the next second.
So engines take turns; in decode a turn is two steps, of which the second is timed. The limit is
measured before and after each, shares and ratios are taken within a turn, and the medians of those
are shown.

--out writes cpu.json and cpu_roofline.png into a folder; plot.py draws it, which needs matplotlib.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import (
    PAUSE,
    keep_freed_memory,
    machine,
    median_seconds,
    print_header,
    print_machine,
    print_row,
    spin,
    write_json,
)
from models import mistral_7b, quantized, random_weights
from peers import (
    LLAMA_CPP_TYPES,
    PEERS,
    LlamaCpp,
    LlamaCppFiles,
    Transformers,
    available,
    llama_cpp_build,
)
from shapes import random
from torch import Tensor
from torch.nn import functional

from mistral_ext import Mistral, ops
from mistral_ext.bench.models import flops, step_bytes
from mistral_ext.bench.peaks import INSTRUCTIONS, matrix_rate, rates, read_bandwidth
from mistral_ext.engine.slots import SlotPool
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import Quantized
from mistral_ext.weights.quantize import NAMES, quantize

PARTS = ("decode", "prefill", "linear")
WEIGHTS = ("bf16", "int8", "int4")
OURS = "mistral_ext"

BATCHES = (1, 4)
PROMPTS = (256, 1024)
CONTEXT = 16  # tokens before a decode
DECODE_TURNS, PREFILL_TURNS = 20, 4
MOST_SECONDS = 40.0  # for decode or prefill of one kind of weights, if two turns take no longer
READ_PASSES = 4
LINEAR_SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))  # in, out
LINEAR_TOKENS = (256, 512, 1024)


class Ours:
    """mistral_ext as an engine, in the sense of peers.py."""

    name = OURS

    def __init__(self, config: MistralConfig, weights: dict[str, Tensor | Quantized]):
        self._llm = Mistral(config, Transformer(config, weights), None, Path("random"))
        self.nbytes = step_bytes(self._llm.model)
        self._prompts = 0

    def prompt(self, ids: list[int]) -> None:
        # Another first token each time: the engine keeps prompts, and would not read them again.
        self._prompts += 1
        self._llm.generate([[self._prompts, *ids[1:]]], max_tokens=1)

    def decoder(self, batch: int, ids: list[int]) -> Callable[[], None]:
        return decoder(self._llm.model, batch, ids)

    def close(self) -> None:
        self._llm = None


def decoder(
    model: Transformer, batch: int, ids: list[int], adapters: list[int] | None = None
) -> Callable[[], None]:
    """Reads a prompt in each of `batch` sequences, and returns what decodes a token of each.

    Args:
        adapters: the slot of the adapter of each sequence; None: they have none.
    """
    capacity = len(ids) + 1024
    cache = SlotPool(model.config, capacity * batch, model.dtype)
    rings = [cache.allocate(capacity, capacity) for _ in range(batch)]
    new = [ids] * batch

    @torch.inference_mode()
    def step() -> None:
        nonlocal new
        counts = torch.tensor([len(tokens) for tokens in new])
        sequences = cache.append(dict(zip(rings, counts.tolist(), strict=True)))
        flat = torch.tensor([token for tokens in new for token in tokens])
        slots = None
        if adapters is not None:
            slots = torch.tensor(adapters, dtype=torch.int32).repeat_interleave(counts)
        last = counts.cumsum(0) - 1
        h = model.step(flat, sequences, cache, int(counts.max()), last, slots)
        _, chosen = model.greedy(h, model.config.vocab_size)
        new = [[token] for token in chosen.tolist()]

    step()
    return step


def seconds_of(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


Turn = dict[tuple[str, int], tuple[float, float]]  # (engine, batch or tokens): (seconds, limit)


def take_turns(
    functions: dict[tuple[str, int], Callable[[], Any]],
    limit: Callable[[], float],
    turns: int,
    in_a_row: int = 1,
) -> list[Turn]:
    """Calls the functions in turn.

    Args:
        functions: by name of the engine and number of what it does.
        limit: measures the machine; called between all of them, each time after a pause, in which
            the threads of the function before go to sleep.
        turns: how many, or fewer where they take too long, but at least two.
        in_a_row: calls of a function in its turn, of which the last one is timed.

    Returns:
        For each turn the seconds of each function, and the mean of the limits before and after.
    """

    def limit_after_pause() -> float:
        spin(PAUSE)
        return limit()

    result: list[Turn] = []
    stop = time.perf_counter() + MOST_SECONDS
    before = limit_after_pause()
    while len(result) < 2 or (len(result) < turns and time.perf_counter() < stop):
        result.append({})
        for key, function in functions.items():
            for _ in range(in_a_row):
                seconds = seconds_of(function)
            after = limit_after_pause()
            result[-1][key] = seconds, (before + after) / 2
            before = after
    return result


def summarize(
    what: str,
    turns: list[Turn],
    engines: list[Any],
    n_flops: Callable[[int], int],
    work: Callable[[Any, int], float],
) -> dict[str, dict[str, Any]]:
    """Reports the measurements of take_turns.

    Args:
        what: "decode" or "prefill".
        turns: from take_turns; each number once for each engine.
        engines: ours is one of them.
        n_flops: of what is done with a number.
        work: of an engine with a number, in the unit of the limit.

    Returns:
        {engine: {"decode 1": {...}, ...}} with the medians of seconds and limit and, as medians of
        what they are within a turn, the share of the limit, our speed over that of the engine, and
        the cost: the time over that of the engine's first number.
    """
    numbers = list(dict.fromkeys(number for _, number in turns[0]))
    report: dict[str, dict[str, Any]] = {engine.name: {} for engine in engines}
    for engine in engines:
        for number in numbers:
            key, first, ours = (engine.name, number), (engine.name, numbers[0]), (OURS, number)
            seconds, limits = zip(*(turn[key] for turn in turns), strict=True)
            amount = work(engine, number)
            report[engine.name][f"{what} {number}"] = {
                "turns": len(turns),
                "seconds": statistics.median(seconds),
                "limit": statistics.median(limits),
                "flops": n_flops(number),
                "share": statistics.median(
                    amount / took / limit if limit else 0.0
                    for took, limit in zip(seconds, limits, strict=True)
                ),
                "ours_over_it": statistics.median(t[key][0] / t[ours][0] for t in turns),
                "cost": statistics.median(t[key][0] / t[first][0] for t in turns),
            }
    return report


def measure_decode(
    engines: list[Any], config: MistralConfig, ids: list[int], n_turns: int
) -> dict[str, dict[str, Any]]:
    for engine in engines:
        engine.prompt(ids)  # forgets longer ones
    steps = {
        (engine.name, batch): engine.decoder(batch, ids) for engine in engines for batch in BATCHES
    }
    # The timed step follows another one of its engine, as in use: what is not weights is in caches.
    limit = functools.partial(read_bandwidth, READ_PASSES)
    turns = take_turns(steps, limit, n_turns, in_a_row=2)
    return summarize(
        "decode",
        turns,
        engines,
        n_flops=lambda batch: flops(config, batch, 1, len(ids)),
        work=lambda engine, batch: engine.nbytes,
    )


def measure_prefill(
    engines: list[Any], config: MistralConfig, ids: list[int], n_turns: int
) -> dict[str, dict[str, Any]]:
    prompts = {
        (engine.name, tokens): functools.partial(engine.prompt, ids[:tokens])
        for tokens in PROMPTS
        for engine in engines
    }
    turns = take_turns(prompts, matrix_rate, n_turns)
    return summarize(
        "prefill",
        turns,
        engines,
        n_flops=lambda tokens: flops(config, 1, tokens),
        work=lambda engine, tokens: flops(config, 1, tokens),
    )


MODEL_COLUMNS = (
    ("weights", -7),
    ("engine", -16),
    ("GB/step", 7),
    ("first s", 7),
    ("decode 1", 8),
    ("of read", 7),
    ("decode 4", 8),
    ("of read", 7),
    ("cost", 5),
    ("pf. 256", 7),
    ("of peak", 7),
    ("pf. 1024", 8),
    ("of peak", 7),
)


def print_model(weights: str, report: dict[str, dict[str, Any]]) -> None:
    def text(row: dict, key: str, form: Callable[[dict], str]) -> str:
        return form(row[key]) if key in row else ""

    for name, row in report.items():
        cells = [weights, name, f"{row['nbytes'] / 1e9:.2f}", f"{row['first_token']:.2f}"]
        for batch in BATCHES:
            cells.append(text(row, f"decode {batch}", lambda x, n=batch: f"{n / x['seconds']:.2f}"))
            cells.append(text(row, f"decode {batch}", lambda x: f"{x['share']:.0%}"))
        cells.append(text(row, "decode 4", lambda x: f"{x['cost']:.2f}"))
        for tokens in PROMPTS:
            key = f"prefill {tokens}"
            cells.append(text(row, key, lambda x, n=tokens: f"{n / x['seconds']:.1f}"))
            cells.append(text(row, key, lambda x: f"{x['share']:.0%}" if x["limit"] else ""))
        print_row(MODEL_COLUMNS, cells)
    for name, row in report.items():
        if name == OURS:
            continue
        keys = ["decode 1", "", "decode 4", "", "", "prefill 256", "", "prefill 1024", ""]
        first = row["first_token"] / report[OURS]["first_token"]
        ratios = [text(row, key, lambda x: f"x{x['ours_over_it']:.2f}") for key in keys]
        print_row(MODEL_COLUMNS, ["", f"x {name}", "", f"x{first:.2f}", *ratios])


def measure_model(
    makers: list[Callable[[], Any]], config: MistralConfig, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Makes the engines and measures all of them: {engine: {"nbytes": ..., "decode 1": {...}}}."""
    ids = torch.randint(3, config.vocab_size, (max(PROMPTS),)).tolist()
    engines, report = [], {}
    for make in makers:
        begin = time.perf_counter()
        engine = make()
        engine.prompt(ids[: min(PROMPTS)])
        first_token = time.perf_counter() - begin
        engines.append(engine)
        report[engine.name] = {"nbytes": engine.nbytes, "first_token": first_token}
    for part, measure, context, turns in (
        ("decode", measure_decode, CONTEXT, DECODE_TURNS),
        ("prefill", measure_prefill, max(PROMPTS), PREFILL_TURNS),
    ):
        if part in options.only:
            measured = measure(engines, config, ids[:context], round(turns * options.turns))
            for name, row in measured.items():
                report[name] |= row
    for engine in engines:
        engine.close()
    return report


def model_table(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the model with each kind of weights."""
    config = mistral_7b(options.layers)
    weights = random_weights(config)
    print(f"\n{config.n_layers} layers of Mistral 7B; tokens per second\n")
    print_header(MODEL_COLUMNS)
    files = LlamaCppFiles(config, weights) if "llama.cpp" in options.peers else None
    if "transformers" in options.peers:
        Transformers(config, weights).close()  # its import is no part of the first token
    report = {}
    try:
        for kind in options.weights:
            ours = weights if kind == "bf16" else quantized(weights, kind)
            makers = [functools.partial(Ours, config, ours)]
            if "transformers" in options.peers:
                makers.append(functools.partial(Transformers, config, weights))
            if files:
                makers.append(functools.partial(LlamaCpp, files.path(LLAMA_CPP_TYPES[kind])))
            report[kind] = measure_model(makers, config, options)
            print_model(kind, report[kind])
    finally:
        if files:
            files.close()
    return report


LINEAR_COLUMNS = (
    ("in x out", -12),
    ("tokens", 6),
    ("bf16 GFLOP/s", 12),
    ("of peak", 7),
    ("torch", 6),
    ("of peak", 7),
    ("x torch", 7),
    ("int8 x bf16", 11),
    ("int4 x bf16", 11),
)


@torch.inference_mode()
def linear_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures and prints linear alone."""
    print("\nlinear\n")
    print_header(LINEAR_COLUMNS)
    keep_freed_memory()
    rows = []
    for inputs, outputs in LINEAR_SHAPES:
        weight = random(outputs, inputs, dtype=torch.bfloat16).mul_(0.02)
        weights = {
            kind: weight if kind == "bf16" else quantize(weight, NAMES[kind])
            for kind in WEIGHTS
            if kind == "bf16" or kind in options.weights
        }
        for tokens in LINEAR_TOKENS:
            x = random(tokens, inputs, dtype=torch.bfloat16)
            functions = {
                kind: functools.partial(ops.linear, x, each) for kind, each in weights.items()
            }
            functions["torch"] = functools.partial(functional.linear, x, weight)
            before = matrix_rate()
            seconds = dict(
                zip(
                    functions,
                    median_seconds(list(functions.values()), 0.5 * options.turns),
                    strict=True,
                )
            )
            peak = (before + matrix_rate()) / 2
            n_flops = 2 * tokens * inputs * outputs
            rows.append({"in": inputs, "out": outputs, "tokens": tokens, "flops": n_flops})
            rows[-1] |= {"seconds": seconds, "peak": peak}
            cells = [f"{inputs} x {outputs}", f"{tokens}"]
            for name in ("bf16", "torch"):
                rate = n_flops / seconds[name]
                cells += [f"{rate / 1e9:.0f}", f"{rate / peak:.0%}" if peak else ""]
            cells.append(f"{seconds['torch'] / seconds['bf16']:.2f}")
            for kind in ("int8", "int4"):
                cells.append(f"{seconds['bf16'] / seconds[kind]:.2f}" if kind in seconds else "")
            print_row(LINEAR_COLUMNS, cells)
    return rows


def parse_options() -> argparse.Namespace:
    def some_of(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = [name for name in text.split(",") if name]
            for name in names:
                if name not in allowed:
                    raise argparse.ArgumentTypeError(f"{name!r}, expected {','.join(allowed)}")
            return names

        return parse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=some_of(PARTS), default=list(PARTS), metavar="PARTS")
    kinds = WEIGHTS
    parser.add_argument("--weights", type=some_of(kinds), default=list(kinds), metavar="KINDS")
    parser.add_argument(
        "--peers",
        type=some_of(tuple(PEERS)),
        metavar="NAMES",
        help="default: all that are installed",
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--turns", type=float, default=1.0, help="more or fewer, by this factor")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for cpu.json and the plot")
    options = parser.parse_args()
    if options.peers is None:
        options.peers = available()
    for name in options.peers:
        if name not in available():
            parser.error(f"{name} needs the packages {', '.join(PEERS[name])}")
    return options


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    facts = machine() | {"peaks": rates()}
    print_machine(facts)
    for name, rate in facts["peaks"].items():
        print(f"{INSTRUCTIONS[name]}: {rate / 1e9:.0f} GFLOP/s in registers")
    if "llama.cpp" in options.peers:
        facts["llama.cpp"] = llama_cpp_build()
        print(f"llama.cpp built with {facts['llama.cpp']}")
    report: dict[str, Any] = {"machine": facts, "layers": options.layers}
    if "decode" in options.only or "prefill" in options.only:
        report["model"] = model_table(options)
    if "linear" in options.only:
        report["linear"] = linear_table(options)
    report["seconds"] = time.perf_counter() - begin
    print(f"\n{report['seconds']:.0f} s")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "cpu.json", report)
        if "model" in report:
            import plot  # needs matplotlib

            plot.roofline(report, options.out / "cpu_roofline.png")


if __name__ == "__main__":
    main()
