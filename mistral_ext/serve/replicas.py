"""Reads the options of replicas on a Ray cluster, and checks them before Ray starts a replica."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from mistral_ext.engine.params import expect_drafts
from mistral_ext.llm import Mistral
from mistral_ext.serve.settings import (
    UNFIT_FOR_REPLICAS,
    Settings,
    expect_integer,
    expect_own_names,
    settings_for,
    texts_of,
)
from mistral_ext.weights.checkpoint import DTYPES
from mistral_ext.weights.quantize import NAMES


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The number of replicas, and the resources of each.

    Args:
        least, most: bounds of the number of replicas. If they differ, Ray Serve adds and removes
            replicas so that each has about as many requests as fit into its batch.
        threads: the number of cores that a replica reserves, which is also the number of threads
            that its model uses.

    Raises:
        ValueError: a number is not in its range.
    """

    least: int = 1
    most: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        counts = self.least, self.most
        if not all(isinstance(count, int) for count in counts) or not 1 <= self.least <= self.most:
            given = repr(self.least)
            if self.least != self.most:
                given += f" to {self.most!r}"
            raise ValueError(f"replicas is {given}, expected integers of 1 or more, in order")
        expect_integer("threads", self.threads, 1)


def read_options(options: Mapping[str, Any]) -> tuple[Settings, dict[str, Any], Replicas]:
    """Makes the arguments of `ray.application` from options.

    Args:
        options: as in `ray.app`.

    Raises:
        ValueError, TypeError: an option is unknown or wrong. The message names the option.
    """
    given = dict(options)
    count = given.pop("replicas", 1)
    least, most = count if isinstance(count, list) and len(count) == 2 else (count, count)
    replicas = Replicas(least, most, given.pop("threads", 1))
    fields = {field.name for field in dataclasses.fields(Settings)}
    names = fields - {"host", "port", *UNFIT_FOR_REPLICAS}
    chosen = {name: given.pop(name) for name in names & given.keys()}
    for name in chosen.keys() & {"api_keys", "cors_origins", "moderate"}:
        chosen[name] = texts_of(name, chosen[name])
    model = given.setdefault("model", None)
    signature = inspect.signature(Mistral.from_pretrained)
    arguments = signature.parameters.keys() - {"progress", "config_overrides"}
    if unknown := given.keys() - arguments:
        known = {"replicas", "threads", *names, *arguments}
        text = f"option {min(unknown)!r} is unknown, expected one of {', '.join(sorted(known))}"
        raise ValueError(text)
    expect_arguments(given)
    settings = settings_for(model, **chosen)
    expect_own_names(settings.model_name, given.get("adapters") or ())
    return settings, given, replicas


def expect_arguments(arguments: Mapping[str, Any]) -> None:
    """Checks those arguments of `Mistral.from_pretrained` that can be checked without the model.
    Raises ValueError or TypeError if one is wrong. Here `dtype` is a name, such as "bfloat16", and
    `model` may be None, which means the demo model."""
    for name in ("model", "draft_model", "generation_config"):
        value = arguments.get(name)
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError(f"{name} is {value!r}, expected a path or hub id")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    for name, known in (("dtype", dtypes), ("quantize", NAMES)):
        value = arguments.get(name)
        if value not in (None, *known):
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    for name in ("max_batch", "prefill_chunk"):
        expect_integer(name, arguments.get(name, 1), 1)
    if arguments.get("cache_tokens") is not None:
        expect_integer("cache_tokens", arguments["cache_tokens"], 1)
    if arguments.get("drafts") is not None:
        expect_drafts(arguments["drafts"])
    adapters = arguments.get("adapters") or {}
    pairs = [*adapters.items()] if isinstance(adapters, Mapping) else [(None, adapters)]
    if not all(isinstance(text, str) and text for pair in pairs for text in pair):
        raise ValueError(f"adapters is {adapters!r}, expected names, and the path of each")
    gpus_for(arguments.get("device"))


def gpus_for(device: object) -> int:
    """The number of GPUs that a replica reserves. `device` is the argument of
    `Mistral.from_pretrained`.

    Raises:
        ValueError: `device` is not a device, or is a GPU other than the first. Ray shows a replica
            only the GPU that is reserved for it, so that GPU is always the first.
    """
    if device is None or device == "cpu":
        return 0
    if device in ("cuda", "cuda:0") or (type(device) is int and device == 0):
        return 1
    text = f"device is {device!r}, expected cpu or cuda, as a replica sees its own GPU alone"
    raise ValueError(text)
