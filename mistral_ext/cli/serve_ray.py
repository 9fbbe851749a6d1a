"""`mistral-ext serve --ray`: run replicas of the server on a Ray cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_ext.cli.extras import expect_extra
from mistral_ext.cli.options import model_arguments
from mistral_ext.serve.settings import UNFIT_FOR_REPLICAS

if TYPE_CHECKING:
    from mistral_ext.serve.settings import Settings


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the options for Ray to the parser of `mistral-ext serve`."""
    group = parser.add_argument_group("replicas (extra [ray])")
    group.add_argument(
        "--ray",
        action="store_true",
        help="serve replicas with Ray Serve, on the cluster of the variable RAY_ADDRESS, else on "
        "this machine; --threads is of each replica",
    )
    group.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N|LEAST,MOST",
        help="processes with a model each (default 1); LEAST,MOST: as many as the load needs",
    )


def check(args: argparse.Namespace) -> None:
    """Raises an error if options cannot be combined, or if ray is missing."""
    if not args.ray:
        if args.replicas:
            raise ValueError("--replicas is given without --ray, expected both")
        return
    expect_extra("ray", "ray")
    for name, why in UNFIT_FOR_REPLICAS.items():
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --ray: {why}")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Serves until it is stopped (see `serve.ray.run`), and returns the exit status. Call `start`
    first: if --threads is not given, the replicas share the number of threads that torch has."""
    import torch

    from mistral_ext.serve import ray
    from mistral_ext.serve.replicas import Replicas

    least, most = args.replicas or (1, 1)
    threads = args.threads or max(1, torch.get_num_threads() // max(1, most))
    arguments = {
        **model_arguments(args),
        "model": _found(args.model),
        "dtype": args.dtype,
        "max_batch": args.max_batch,
        "drafts": args.drafts,
        "draft_model": _found(args.draft_model),
        "adapters": {name: _found(path) for name, path in args.adapter},
    }
    if args.generation_config != "auto":
        arguments["generation_config"] = _found(args.generation_config)
    return ray.run(settings, arguments, Replicas(least, most, threads))


def _found(path: str | None) -> str | None:
    """Returns the absolute form of a path that exists on this machine. Replicas need it because
    they have another working directory. Other names, such as hub ids, do not change."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def _replicas(text: str) -> tuple[int, int]:
    least, _, most = text.partition(",")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or LEAST,MOST, e.g. 1,4") from None
