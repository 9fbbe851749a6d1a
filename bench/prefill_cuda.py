"""Times how long a whole Mistral 7B takes to read a prompt on a GPU, with each attention kernel.

    python bench/prefill_cuda.py [--layers 32] [--prompt 2048] [--chunk N] [--attention sm80]
                                 [--json FILE]

Random weights, as loading puts them, from the token ids to the logits of the last token, an empty
cache each time. The kernels take turns; the median of the runs is shown. The kernel of sm_90a is
left out where the device or the build lacks it. Aimed at on an H200: 2048 tokens in at most 45 ms.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from measure import write_json
from models import mistral_7b, random_weights_on_gpu
from shapes import GPU, scaled

from mistral_ext import _C
from mistral_ext.engine.slots import SlotPool
from mistral_ext.model.transformer import Transformer

RUNS = 10


def kernels() -> list[str]:
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return [name for name in _C.attention_kernels() if hopper or name != "sm90"]


def read(model: Transformer, ids: torch.Tensor, chunk: int) -> float:
    """Reads a prompt, and returns the seconds that it took."""
    capacity = min(len(ids), model.config.sliding_window)
    cache = SlotPool(model.config, capacity, model.dtype, GPU)
    ring = cache.allocate(capacity, capacity)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for new in ids.split(chunk):
        last = torch.tensor([len(new) - 1])
        model.forward(new, cache.append({ring: len(new)}), cache, last)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=scaled(2048), metavar="N", help="tokens")
    parser.add_argument("--chunk", type=int, metavar="N", help="tokens in one pass; default: all")
    parser.add_argument("--attention", choices=("sm80", "sm90"), help="this kernel alone")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if _C.cuda_architectures is None or not torch.cuda.is_available():
        raise SystemExit("prefill_cuda: needs a CUDA device and a build with CUDA")

    config = mistral_7b(options.layers)
    model = Transformer(config, random_weights_on_gpu(config))
    ids = torch.randint(3, model.config.vocab_size, (options.prompt,))
    asked = [options.attention] if options.attention else kernels()
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for run in range(1 + RUNS):
        for name, samples in seconds.items():
            _C.select_attention(name)
            sample = read(model, ids, options.chunk or options.prompt)
            if run > 0:  # the first loads kernels and plans products
                samples.append(sample)
    print(f"{torch.cuda.get_device_name()}: {options.prompt} tokens, {options.layers} layers, bf16")
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    for name, median in medians.items():
        rate = options.prompt / median
        print(f"attention {name}: {median * 1e3:.1f} ms, {rate:.0f} tokens/s")
    if options.json:
        write_json(options.json, {"options": vars(options), "seconds": medians})


if __name__ == "__main__":
    main()
