"""Times prompt reading and decoding end to end, next to transformers on the same weights.

    python bench/generate.py [--layers 8] [--prompt 256] [--tokens 16] [--threads N] [--json FILE]
    python bench/generate.py --model FOLDER [--no-peer]

Without --model it makes a model of Mistral 7B's shape with random bf16 weights and as many layers
as asked for (8 are 2.0 billion parameters, 4.0 GB); the speed per layer is that of the full model.
A decode step has to read every weight once: `GB/s` is the bytes of the weights over the time of a
step, and `of read` its share of the bandwidth that a plain multithreaded read has in the same run.
Both sides take turns, and the medians of several runs are shown, because machines are noisy:
compare the ratios. Memory is the peak resident set of the process after the runs of that side.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from measure import machine, print_header, print_machine, print_row, write_json
from models import mistral_7b, random_weights
from peers import Transformers

from mistral_ext import Mistral
from mistral_ext.bench.models import step_bytes
from mistral_ext.bench.peaks import read_bandwidth
from mistral_ext.model.transformer import Transformer
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.hub import resolve


def run_ours(llm: Mistral, ids: list[int], tokens: int) -> tuple[float, float]:
    """Returns the prompt tokens and the decoded tokens per second."""
    (completion,) = llm.generate([ids], max_tokens=tokens + 1, ignore_eos=True, drafts=0)
    timing = completion.timing
    return timing.prompt_rate, timing.decode_rate


def run_theirs(peer: Transformers, ids: list[int], tokens: int) -> tuple[float, float]:
    begin = time.perf_counter()
    step = peer.decoder(1, ids)
    first = time.perf_counter()
    for _ in range(tokens):
        step()
    return len(ids) / (first - begin), tokens / (time.perf_counter() - first)


def peak_memory() -> int:
    """The most bytes that have been resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder or hub id; default: random weights")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--prompt", type=int, default=256, metavar="N", help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="tokens decoded")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    facts = machine()
    print_machine(facts)
    begin = time.perf_counter()
    if args.model:
        model = read_folder(resolve(args.model))
        folder, config, weights = model.path, model.config, load_weights(model)
    else:
        folder, config = Path("random"), mistral_7b(args.layers)
        weights = random_weights(config)
    llm = Mistral(config, Transformer(config, weights), None, folder)
    nbytes = step_bytes(llm.model)
    print(
        f"{config.n_layers} layers, {nbytes / 1e9:.2f} GB of {llm.model.dtype} weights a step, "
        f"ready after {time.perf_counter() - begin:.1f} s; prompt {args.prompt} tokens"
    )
    ids = torch.randint(3, config.vocab_size, (args.prompt,)).tolist()

    runs = {"mistral_ext": lambda: run_ours(llm, ids, args.tokens)}
    if not args.no_peer:
        peer = Transformers(config, weights)
        runs["transformers"] = lambda: run_theirs(peer, ids, args.tokens)
    rates = {name: [] for name in runs}
    memory = {}
    reads = []  # the bandwidth of shared machines comes and goes: measured in every turn
    for turn in range(args.runs + 1):
        reads.append(read_bandwidth())
        for name, run in runs.items():
            rate = run()
            memory.setdefault(name, peak_memory())
            if turn > 0:  # the first one warms up
                rates[name].append(rate)

    facts["read_bandwidth"] = statistics.median(reads[1:])
    print(f"reads {' '.join(f'{read / 1e9:.1f}' for read in reads[1:])} GB/s between the runs")
    columns = [("", -12), ("prompt tok/s", 12), ("decode tok/s", 12), ("GB/s", 6)]
    columns += [("of read", 7), ("peak memory", 11)]
    print_header(columns)
    report = {"machine": facts, "config": {"layers": config.n_layers, "weights": nbytes}}
    for name, samples in rates.items():
        prompt, decode = (statistics.median(rate) for rate in zip(*samples, strict=True))
        bandwidth = decode * nbytes
        share = bandwidth / facts["read_bandwidth"]
        cells = [f"{prompt:.1f}", f"{decode:.2f}", f"{bandwidth / 1e9:.1f}", f"{share:.0%}"]
        print_row(columns, [name, *cells, f"{memory[name] / 1e9:.2f} GB"])
        report[name] = {
            "prompt_tokens_per_second": prompt,
            "decode_tokens_per_second": decode,
            "weight_bytes_per_second": bandwidth,
            "peak_memory": memory[name],
        }
    if len(rates) == 2:
        ours, theirs = (report[name] for name in rates)
        ratios = [
            ours[key] / theirs[key]
            for key in ("prompt_tokens_per_second", "decode_tokens_per_second")
        ]
        print(f"ratio to transformers: prompt {ratios[0]:.2f}, decode {ratios[1]:.2f}")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
