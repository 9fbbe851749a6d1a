"""How every op becomes a torch operator, `torch.ops.mistral_ext.<name>`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("mistral_ext", "DEF")
_DEVICES = ("cpu", "cuda")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes an op of torch.library.

    Args:
        schema: name, arguments, and which of them the op changes.
        run: the op, on the CPU and on CUDA devices, with the arguments of the schema.
        fake: gives torch.compile and torch.export the shapes without running anything.
    """
    name = _library.define(schema)
    torch.library.impl(f"mistral_ext::{name}", _DEVICES, run, lib=_library)
    torch.library.register_fake(f"mistral_ext::{name}", fake, lib=_library)
