"""`mistral-ext info`: show the version, the instruction set, the devices and the cache's size."""

from __future__ import annotations

import argparse
import platform
from typing import TYPE_CHECKING

from mistral_ext.cli import options
from mistral_ext.cli.start import start

if TYPE_CHECKING:
    from mistral_ext._C import _Device


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "info",
        parents=[options.common(), options.model()],
        help="show the version, the instruction set, the devices and the size of the cache",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start(args)
    import torch

    from mistral_ext import _C, __version__, ops
    from mistral_ext.bench.machine import processor_name
    from mistral_ext.weights.hub import DEMO_MODEL

    lines = {
        "mistral_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
        "instruction set": f"{ops.active_isa()} (of {', '.join(ops.supported_isas())})",
        "threads": str(torch.get_num_threads()),
        "demo model": str(DEMO_MODEL),
        "cache": _cache_size(args),
    }
    found = _C.cuda_devices()
    if found is None:
        lines["CUDA"] = "not in this build (no nvcc was found, or MISTRAL_EXT_CUDA=off)"
    else:
        devices, problem = found
        lines["CUDA"] = f"built for {_C.cuda_architectures}"
        lines["CUDA devices"] = "; ".join(map(_describe, devices)) or f"none ({problem})"
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    return 0


def _cache_size(args: argparse.Namespace) -> str:
    """Returns a text that says for how many tokens the model's cache would have room. No weights
    are read for this."""
    from mistral_ext.engine.memory import default_slots
    from mistral_ext.llm import DEFAULT_MAX_BATCH
    from mistral_ext.weights.checkpoint import Checkpoint
    from mistral_ext.weights.device import find_device
    from mistral_ext.weights.folder import read_folder
    from mistral_ext.weights.hub import DEMO_MODEL, resolve
    from mistral_ext.weights.quantize import Quantization

    device = find_device(args.device)
    model = DEMO_MODEL if args.model is None else args.model
    folder = read_folder(resolve(model), **options.config_overrides(args))
    quantization = Quantization.from_name(args.quantize) if args.quantize else None
    weights = Checkpoint(folder, options.dtype_of(args), quantization)
    of_model = folder.config, weights.dtype, device, DEFAULT_MAX_BATCH, weights.nbytes
    tokens = args.cache_tokens or default_slots(*of_model, loaded=False)
    mebibytes = tokens * folder.config.cache_bytes(weights.dtype) / 2**20
    return (
        f"{tokens} tokens, {mebibytes:.0f} MiB, for {args.model or 'the demo model'} on "
        f"{device.type} (--cache-tokens changes it)"
    )


def _describe(device: _Device) -> str:
    major, minor = device["capability"]
    return (
        f"{device['name']} (sm_{major}{minor}, {device['multiprocessors']} multiprocessors, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB)"
    )
