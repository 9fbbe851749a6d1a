"""The instruction sets of the CPU kernels, and the precision of their products."""

from __future__ import annotations

from mistral_ext import _C


def supported_isas() -> list[str]:
    """Returns the instruction sets that the CPU kernels can use on this machine, the slowest
    first."""
    return _C.supported_isas()


def active_isa() -> str:
    """Returns the instruction set that the CPU kernels use.

    It is the set that `select_isa` or the environment variable MISTRAL_EXT_ISA has named, else the
    fastest set. If the variable names a set that this machine lacks, this function, `select_isa`
    and the ops on the CPU that depend on the set raise ValueError.
    """
    return _C.active_isa()


def select_isa(name: str) -> None:
    """Makes the CPU kernels use the instruction set `name`. Raises ValueError if this machine lacks
    the set."""
    _C.select_isa(name)


def exact_products() -> bool:
    """Whether products keep the precision of activations (see `set_exact_products`). Before the
    first call of that function, the environment variable MISTRAL_EXT_EXACT decides."""
    return _C.exact_products()


def set_exact_products(exact: bool) -> None:
    """Sets how CPUs with AVX2 or NEON multiply by weights of 4 to 6 bits.

    The setting is for the whole process. MISTRAL_EXT_EXACT=1 in the environment turns exact
    products on from the start.

    Args:
        exact: True: activations keep their precision. False, the default: each block of 32
            activations is rounded to 8 bits, which makes products of up to 8 tokens up to several
            times as fast. Products of more tokens are up to 1.9 times as fast, but with some
            formats and CPUs their activations are not rounded (see `linear`).
    """
    _C.set_exact_products(exact)


def head_dims(device_type: str) -> list[int]:
    """Returns the head dimensions that all ops support on a device of the type "cpu" or "cuda". The
    list is empty if this build has no kernels for such devices."""
    has_kernels = device_type != "cuda" or _C.cuda_architectures is not None
    return _C.head_dims(device_type) if has_kernels else []
