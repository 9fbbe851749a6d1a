"""Measures steps of fine-tuning on the CPU: tokens per second, and the memory that a process needs.

    python bench/finetune.py [--weights bf16,int8,int4] [--peers peft] [--layers 8]
                             [--tokens 2048] [--steps 2] [--rank 16] [--threads N] [--json FILE]

A model of Mistral 7B's shape with random weights and fewer layers trains an adapter on all linear
layers, in one pass of one sample: loss, gradients with checkpoints at the layers, AdamW. The peer
is peft over transformers' model in bf16, with sdpa and its gradient checkpointing. Each engine runs
in a process of its own. A step before those that are timed warms it up. `cpu s` is the time of the
processor, of all threads, which other processes disturb less; memory is the peak of the process
in the steps, weights included, as Linux reports it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine, print_header, print_machine, print_row, write_json
from models import mistral_7b, random_weights
from peers import Transformers

from mistral_ext import ops
from mistral_ext.bench import models
from mistral_ext.finetune.batches import passes
from mistral_ext.finetune.data import Sample
from mistral_ext.finetune.layers import TrainedAdapter, loss
from mistral_ext.finetune.options import TARGETS
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer

PEERS = ("peft",)
COLUMNS = (("engine", -16), ("tokens/s", 9), ("cpu s", 8), ("peak MB", 9), ("weights MB", 11))


def our_step(
    config: MistralConfig, name: str, ids: torch.Tensor, rank: int
) -> tuple[Callable[[], float], int]:
    if name == "bf16":
        weights = dict(random_weights(config))
    else:  # as they are, so that the weights of 32 layers fit
        weights = models.random_weights(config, name, torch.bfloat16, torch.device("cpu"))
    model = Transformer(config, weights)
    del weights
    adapter = TrainedAdapter.new(config, rank, 2.0, TARGETS, 0, model.device)
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=1e-4)
    (batch,) = passes([Sample(ids.int(), torch.ones(len(ids)))], len(ids))

    def step() -> float:
        optimizer.zero_grad()
        value = loss(model, adapter, batch) / len(batch.token_ids)
        value.backward()
        optimizer.step()
        return value.item()

    return step, model.nbytes


def peft_step(
    config: MistralConfig, ids: torch.Tensor, rank: int
) -> tuple[Callable[[], float], int]:
    import peft

    engine = Transformers(config, random_weights(config))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules)
    model = peft.get_peft_model(engine._model, settings).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        value = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        value.backward()
        optimizer.step()
        return value.item()

    return step, engine.nbytes


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures an engine in this process, and returns its figures."""
    config = mistral_7b(options.layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (options.tokens + 1,), generator=generator)
    if name in PEERS:
        step, nbytes = peft_step(config, ids, options.rank)
    else:
        step, nbytes = our_step(config, name, ids, options.rank)
    _forget_peak()
    losses = [step()]
    wall, cpu = time.perf_counter(), time.process_time()
    losses += [step() for _ in range(options.steps)]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert all(torch.tensor(losses).isfinite())
    return {
        "engine": name,
        "tokens_per_second": options.tokens * options.steps / wall,
        "cpu_seconds": cpu / options.steps,
        "peak_bytes": _peak_bytes(),
        "weight_bytes": nbytes,
    }


def _forget_peak() -> None:
    """Has `_peak_bytes` count only what comes after this call. Before, in the set-up, there were
    weights of two formats in memory."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="bf16,int8,int4", help="of bf16, int8, int4")
    parser.add_argument("--peers", default="", help="of peft")
    parser.add_argument("--layers", type=int, default=8, help="of 32")
    parser.add_argument("--tokens", type=int, default=2048, help="in a step")
    parser.add_argument("--steps", type=int, default=2, help="that are timed")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the engine of this process
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.only:
        ops.set_exact_products(True)
        print(json.dumps(measure(options.only, options)))
        return

    facts = machine() | {"layers": options.layers, "tokens": options.tokens, "rank": options.rank}
    print_machine(facts)
    print_header(COLUMNS)
    rows = []
    for name in filter(None, [*options.weights.split(","), *options.peers.split(",")]):
        command = [sys.executable, *sys.argv, "--only", name]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(out.splitlines()[-1])
        rows.append(row)
        sizes = (f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "weight_bytes"))
        speed = f"{row['tokens_per_second']:.1f}", f"{row['cpu_seconds']:.1f}"
        print_row(COLUMNS, [name, *speed, *sizes])
    if options.json:
        write_json(options.json, {"machine": facts, "rows": rows})


if __name__ == "__main__":
    main()
