"""The instruction sets of the CPU kernels."""

from __future__ import annotations

from mistral_ext import _C


def supported_isas() -> list[str]:
    """The instruction sets that the CPU kernels can use on this machine, slowest first."""
    return _C.supported_isas()


def active_isa() -> str:
    """The one that they use: what `select_isa` or MISTRAL_EXT_ISA asked for, else the fastest.

    But for amx, which has to be asked for: on hardware, it has not been tested or measured yet.
    ValueError, as from every op, if the environment variable names one that this machine lacks.
    """
    return _C.active_isa()


def select_isa(name: str) -> None:
    """Makes the CPU kernels use instruction set `name`; ValueError if this machine cannot."""
    _C.select_isa(name)


def head_dims(device_type: str) -> list[int]:
    """The head dimensions that all ops take on a "cpu" or "cuda" device; none where this build has
    no kernels for it."""
    has_kernels = device_type != "cuda" or _C.cuda_architectures is not None
    return _C.head_dims(device_type) if has_kernels else []
