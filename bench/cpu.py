"""Measures the CPU path, and compares it with the limits of the machine and with other engines.

    python bench/cpu.py --out bench/results
    python bench/cpu.py [--only decode,prefill,linear] [--weights bf16,int8,int4] [--peers NAMES]
                        [--layers 8] [--turns 1.0] [--threads N] [--prompts 256,1024]
    python bench/cpu.py --only decode,prefill --weights q4_k_m,iq4_xs,q8_0,int4 --peers llama.cpp

It takes less than fifteen minutes on two cores and prints:

1. The limits: how fast the threads read memory, and how fast they multiply (see
   mistral_ext/bench/peaks.cpp).
2. A model of Mistral 7B's shape with 8 layers and random weights in bf16, int8 and int4, beside
   transformers (bf16) and, if it is installed, llama.cpp with as many bits (see peers.py). With
   other weights, of a type of GGUF files, both run the same file, which llama.cpp has made:
   - first: seconds from weights in memory (from a file: in the page cache) to the first token after
     a prompt of 256, making and packing the model included
   - decode 1, 4 and 8: tokens per second of 1 sequence and of 4 and 8 together, after 16 tokens;
     `of read` is the bytes of the weights over the time of a step, as a share of the bandwidth that
     a read loop has just then; `cost` is the time of a step over that for 1 sequence
   - prefill 256 and 1024: prompt tokens per second; `of peak` is the FLOPs that it takes over the
     time, as a share of what the best bf16 instruction does in registers (with int8 instructions
     more than 100 % is possible); see `flops` in
     mistral_ext/bench/models.py
   "x NAME" is our speed over that engine's.
3. linear alone: our kernels and torch's bf16 linear; for int8 and int4 our speed over our bf16.

Machines are noisy, virtual ones above all, whose memory may be twice as fast in the next second.
So engines take turns; in decode a turn is two steps, of which the second is timed. The limit is
measured before and after each, shares and ratios are taken within a turn, and the medians of those
are shown. Where other programs run all the time, use --only decode,prefill --threads 1
--processor-time.

--out writes cpu.json and cpu_roofline.png into a folder; plot.py draws it, which needs matplotlib.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from linear_cpu import linear_table
from measure import (
    machine,
    print_header,
    print_machine,
    print_row,
    write_json,
)
from models import mistral_7b, quantized, random_weights
from peers import (
    FILE_TYPES,
    LLAMA_CPP_TYPES,
    PEERS,
    LlamaCpp,
    LlamaCppFiles,
    Transformers,
    available,
    llama_cpp_build,
)
from torch import Tensor
from turns import OURS, Clock, summarize, take_turns

from mistral_ext import Mistral
from mistral_ext.bench import DEFAULT_WEIGHTS as MADE  # weights that this package makes
from mistral_ext.bench.models import flops, step_bytes
from mistral_ext.bench.peaks import INSTRUCTIONS, matrix_rate, rates, read_bandwidth
from mistral_ext.engine.slots import SlotPool
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import Quantized

PARTS = ("decode", "prefill", "linear")
WEIGHTS = tuple(LLAMA_CPP_TYPES)

BATCHES = (1, 4, 8)
PROMPTS = (256, 1024)
CONTEXT = 16  # tokens before a decode
DECODE_TURNS, PREFILL_TURNS = 20, 4
READ_PASSES = 4


class Ours:
    """mistral_ext as an engine, in the sense of peers.py."""

    name = OURS

    def __init__(self, llm: Mistral):
        self._llm = llm
        self.nbytes = step_bytes(self._llm.model)
        self._prompts = 0

    @classmethod
    def of_weights(cls, config: MistralConfig, weights: dict[str, Tensor | Quantized]) -> Ours:
        return cls(Mistral(config, Transformer(config, weights), None, Path("random")))

    @classmethod
    def of_file(cls, path: Path) -> Ours:
        return cls(Mistral.from_pretrained(path, progress=False))

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
    """Reads a prompt in each of `batch` sequences, and returns a function that decodes a token of
    each.

    Args:
        adapters: the slot of each sequence's adapter. None: the sequences have no adapters.
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


def no_limit(*_: Any) -> float:
    return 0.0


def measure_decode(
    engines: list[Any], config: MistralConfig, ids: list[int], n_turns: int, clock: Clock
) -> dict[str, dict[str, Any]]:
    for engine in engines:
        engine.prompt(ids)  # forgets longer ones
    steps = {
        (engine.name, batch): engine.decoder(batch, ids) for engine in engines for batch in BATCHES
    }
    # The timed step follows another one of its engine, as in use: what is not weights is in caches.
    limit = functools.partial(read_bandwidth, READ_PASSES)
    if clock is time.process_time:
        limit = no_limit
    turns = take_turns(steps, limit, n_turns, clock, in_a_row=2)
    return summarize(
        "decode",
        turns,
        engines,
        n_flops=lambda batch: flops(config, batch, 1, len(ids)),
        work=lambda engine, batch: engine.nbytes,
    )


def measure_prefill(
    engines: list[Any],
    config: MistralConfig,
    ids: list[int],
    lengths: list[int],
    n_turns: int,
    clock: Clock,
) -> dict[str, dict[str, Any]]:
    prompts = {
        (engine.name, tokens): functools.partial(engine.prompt, ids[:tokens])
        for tokens in lengths
        for engine in engines
    }
    limit = no_limit if clock is time.process_time else matrix_rate
    turns = take_turns(prompts, limit, n_turns, clock)
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
    ("cost", 5),
    ("decode 8", 8),
    ("cost", 5),
)


def model_columns(prompts: list[int]) -> list[tuple[str, int]]:
    columns = list(MODEL_COLUMNS)
    for tokens in prompts:
        columns += [(f"pf. {tokens}", 8), ("of peak", 7)]
    return columns


def print_model(weights: str, report: dict[str, dict[str, Any]], prompts: list[int]) -> None:
    columns = model_columns(prompts)

    def text(row: dict, key: str, form: Callable[[dict], str]) -> str:
        return form(row[key]) if key in row else ""

    for name, row in report.items():
        cells = [weights, name, f"{row['nbytes'] / 1e9:.2f}", f"{row['first_token']:.2f}"]
        for batch in BATCHES:
            key = f"decode {batch}"
            cells.append(text(row, key, lambda x, n=batch: f"{n / x['seconds']:.2f}"))
            if batch == 1:
                cells.append(text(row, key, lambda x: f"{x['share']:.0%}" if x["limit"] else ""))
            else:
                cells.append(text(row, key, lambda x: f"{x['cost']:.2f}"))
        for tokens in prompts:
            key = f"prefill {tokens}"
            cells.append(text(row, key, lambda x, n=tokens: f"{n / x['seconds']:.1f}"))
            cells.append(text(row, key, lambda x: f"{x['share']:.0%}" if x["limit"] else ""))
        print_row(columns, cells)
    for name, row in report.items():
        if name == OURS:
            continue
        keys = ["decode 1", "", "decode 4", "", "decode 8", ""]
        keys += [key for tokens in prompts for key in (f"prefill {tokens}", "")]
        first = row["first_token"] / report[OURS]["first_token"]
        ratios = [text(row, key, lambda x: f"x{x['ours_over_it']:.2f}") for key in keys]
        print_row(columns, ["", f"x {name}", "", f"x{first:.2f}", *ratios])


def measure_model(
    makers: list[Callable[[], Any]], config: MistralConfig, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Makes the engines and measures all of them: {engine: {"nbytes": ..., "decode 1": {...}}}."""
    ids = torch.randint(3, config.vocab_size, (max(options.prompts),)).tolist()
    clock = time.process_time if options.processor_time else time.perf_counter
    engines, report = [], {}
    for make in makers:
        begin = clock()
        engine = make()
        engine.prompt(ids[: min(options.prompts)])
        first_token = clock() - begin
        engines.append(engine)
        report[engine.name] = {"nbytes": engine.nbytes, "first_token": first_token}
    measured: list[dict[str, dict[str, Any]]] = []
    if "decode" in options.only:
        turns = round(DECODE_TURNS * options.turns)
        measured.append(measure_decode(engines, config, ids[:CONTEXT], turns, clock))
    if "prefill" in options.only:
        turns = round(PREFILL_TURNS * options.turns)
        measured.append(measure_prefill(engines, config, ids, options.prompts, turns, clock))
    for part in measured:
        for name, row in part.items():
            report[name] |= row
    for engine in engines:
        engine.close()
    return report


def model_table(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints the model with each kind of weights."""
    config = mistral_7b(options.layers)
    weights = random_weights(config)
    print(f"\n{config.n_layers} layers of Mistral 7B; tokens per second\n")
    print_header(model_columns(options.prompts))
    files = None
    if "llama.cpp" in options.peers or not set(options.weights) <= set(MADE):
        files = LlamaCppFiles(config, weights, options.files)
    if "transformers" in options.peers:
        Transformers(config, weights).close()  # its import is no part of the first token
    report = {}
    try:
        for kind in options.weights:
            if kind in MADE:
                ours = weights if kind == "bf16" else quantized(weights, kind)
                makers = [functools.partial(Ours.of_weights, config, ours)]
            else:
                makers = [functools.partial(Ours.of_file, files.path(LLAMA_CPP_TYPES[kind]))]
            if "transformers" in options.peers:
                makers.append(functools.partial(Transformers, config, weights))
            if "llama.cpp" in options.peers:
                makers.append(functools.partial(LlamaCpp, files.path(LLAMA_CPP_TYPES[kind])))
            report[kind] = measure_model(makers, config, options)
            print_model(kind, report[kind], options.prompts)
            if files and LLAMA_CPP_TYPES[kind] in FILE_TYPES:
                files.release(LLAMA_CPP_TYPES[kind])
    finally:
        if files:
            files.close()
    return report


def lengths(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers of 1 or more")
    return numbers


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
    parser.add_argument(
        "--weights",
        type=some_of(WEIGHTS),
        default=list(MADE),
        metavar="KINDS",
        help=f"of {', '.join(WEIGHTS)}; default: {','.join(MADE)}",
    )
    parser.add_argument(
        "--peers",
        type=some_of(tuple(PEERS)),
        metavar="NAMES",
        help="default: all that are installed",
    )
    parser.add_argument(
        "--prompts",
        type=lengths,
        default=list(PROMPTS),
        metavar="N,N",
        help="tokens of prompts (default: 256,1024)",
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--turns", type=float, default=1.0, help="more or fewer, by this factor")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--files", type=Path, metavar="FOLDER", help="keep llama.cpp's files, for the next run"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="time what processors do, of all threads, not how long it takes: on a busy machine, "
        "with --threads 1. The limits are not measured",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for cpu.json and the plot")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    if options.peers is None:
        options.peers = available()
    for name in options.peers:
        if name not in available():
            parser.error(f"{name} needs the packages {', '.join(PEERS[name])}")
    if options.processor_time and "linear" in options.only:
        parser.error(
            "--processor-time times the model only, expected --only decode,prefill with it"
        )
    for kind in options.weights:
        if kind not in MADE and "llama.cpp" not in available():
            needed = ", ".join(PEERS["llama.cpp"])
            parser.error(f"{kind} needs the packages {needed}, which make its file")
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
    report["clock"] = "processor" if options.processor_time else "wall"
    if "decode" in options.only or "prefill" in options.only:
        report["model"] = model_table(options)
    if "linear" in options.only:
        report["linear"] = linear_table(options.weights, options.turns)
    report["seconds"] = time.perf_counter() - begin
    print(f"\n{report['seconds']:.0f} s")
    if options.json:
        write_json(options.json, report)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "cpu.json", report)
        if "model" in report:
            import plot  # needs matplotlib

            plot.roofline(report, options.out / "cpu_roofline.png")


if __name__ == "__main__":
    main()
