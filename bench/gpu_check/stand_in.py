"""Runs a script of bench/ with a CPU in the place of a GPU, at shapes so small that it is quick.

    python -m gpu_check.stand_in bench/decode_cuda.py [its arguments]

For --dry-run: everything runs but the kernels and CUDA itself, whose functions do nothing here, so
the figures mean nothing. What is captured runs once and is not repeated.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

BENCH = Path(__file__).parent.parent


class Event:
    def __init__(self, **_) -> None:
        self._time = 0.0

    def record(self, *_) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return (later._time - self._time) * 1e3


class Stream:
    cuda_stream = 0

    def __init__(self, *_) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass


class Graph:
    def capture_begin(self, **_) -> None:
        pass

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass


class Profile(contextlib.nullcontext):
    """Takes the place of torch's profiler, and records nothing."""

    def __init__(self, **_) -> None:
        super().__init__(self)

    def events(self) -> list:
        return []


def nothing(*_, **__) -> contextlib.nullcontext:
    return contextlib.nullcontext()


def stand_in_for_cuda() -> None:
    device = SimpleNamespace(
        name="stand-in", multi_processor_count=2, L2_cache_size=2**16, total_memory=2**30
    )
    cuda = {
        "is_available": lambda: True,
        "synchronize": nothing,
        "get_device_name": lambda *_: device.name,
        "get_device_properties": lambda *_: device,
        "get_device_capability": lambda *_: (9, 0),
        "graph_pool_handle": lambda: None,
        "current_stream": Stream,
        "stream": nothing,
        "graph": nothing,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch.profiler.profile = Profile
    torch.compile = lambda function=None, **_: function
    empty = torch.empty
    torch.empty = lambda *shape, pin_memory=False, **options: empty(*shape, **options)


def stand_in_for_kernels() -> None:
    from mistral_ext import _C

    _C.cuda_architectures = "none: a stand-in"
    _C.attention_kernels = lambda: ["sm80", "sm90"]
    _C.select_attention = nothing
    _C.overlapping = lambda: os.environ.get("MISTRAL_EXT_OVERLAP") == "1"
    _C.set_exact_products(True)  # a GPU does not round activations


def shrink() -> None:
    import shapes

    shapes.GPU, shapes.SHRINK = "cpu", 64
    shapes.DIM, shapes.HIDDEN, shapes.VOCABULARY = 256, 512, 384
    shapes.HEADS, shapes.KV_HEADS, shapes.HEAD_DIM, shapes.WINDOW = 4, 2, 64, 64

    import dataclasses

    import measure_cuda
    import models

    mistral_7b = models.mistral_7b
    models.mistral_7b = lambda layers: dataclasses.replace(
        mistral_7b(min(layers, 2)),
        vocab_size=shapes.VOCABULARY,
        dim=shapes.DIM,
        n_heads=shapes.HEADS,
        n_kv_heads=shapes.KV_HEADS,
        head_dim=shapes.HEAD_DIM,
        hidden_dim=shapes.HIDDEN,
        sliding_window=shapes.WINDOW,
    )
    measure_cuda.SECONDS, measure_cuda.LEAST, measure_cuda.MOST = 1e-3, 1, 2


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(BENCH))
    stand_in_for_cuda()
    stand_in_for_kernels()
    shrink()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
