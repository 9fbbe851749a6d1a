"""How CUDA kernels are launched: shared memory, and what becomes of the runtime's errors. The
emulator has the runtime's part (tests/emulator/runtime.cpp)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from backends import use

from mistral_ext import ops

INSUFFICIENT_DRIVER, UNKNOWN = 35, 999  # of cudaError_t


@contextmanager
def failing(emulator, function: str, status: int = UNKNOWN) -> Iterator[None]:
    """Within it, this function of the runtime fails."""
    emulator.make_fail(function, status)
    try:
        yield
    finally:
        emulator.make_fail(function, 0)


def product_with_norm(generator, tokens: int) -> torch.Tensor:
    """Each block keeps the tokens' normalised rows in shared memory, and so takes over 48 KB."""
    x = torch.randn(tokens, 2048, generator=generator).bfloat16()
    weight = torch.randn(16, 2048, generator=generator).bfloat16()
    return ops.linear(x, weight, norm=torch.ones(2048, dtype=torch.bfloat16))


def test_a_launch_never_lowers_the_limit_of_shared_memory(emulator, generator):
    """Another thread's launch may need it: the emulator refuses to lower it."""
    with use(emulator):
        for tokens in (4, 1, 4):
            product_with_norm(generator, tokens)
    sizes = [launch["shared_bytes"] for launch in emulator.take_launches()]
    assert sizes[0] > sizes[1] > 48 * 1024


@pytest.mark.parametrize(
    "function",
    ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaLaunchKernelEx"],
)
def test_an_error_is_reported_once(emulator, generator, function):
    """By the launch that it is of, not by the next, or by whoever asks the runtime next."""
    with use(emulator):
        with (
            failing(emulator, function),
            pytest.raises(RuntimeError, match=f"launch failed with cudaError_t {UNKNOWN}"),
        ):
            product_with_norm(generator, 4)
        assert emulator.last_error() == 0
        product_with_norm(generator, 4)


def test_a_kernel_whose_code_is_unknown_does_not_overlap(emulator, generator):
    """And leaves no error, as it then runs like any other."""
    with use(emulator), failing(emulator, "cudaFuncGetAttributes"):
        product_with_norm(generator, 4)
    assert emulator.last_error() == 0


def test_an_error_is_reported_in_the_runtimes_words(emulator):
    """One of a driver that is too old, for instance, of which nothing can be asked either."""
    with (
        failing(emulator, "cudaDeviceGetAttribute", INSUFFICIENT_DRIVER),
        pytest.raises(
            RuntimeError,
            match=r"^rms_norm: the launch failed: cudaError35, description of cudaError35 "
            r"\(CUDA version of the driver: 12\.2, of mistral_ext's runtime: 13\.0\)$",
        ),
    ):
        emulator.fail_launch("rms_norm", 0, INSUFFICIENT_DRIVER)
    assert emulator.last_error() == 0


def test_versions_that_cannot_be_asked_for(emulator):
    with (
        failing(emulator, "cudaDriverGetVersion"),
        pytest.raises(RuntimeError, match=r"driver: none, of mistral_ext's runtime: 13\.0"),
    ):
        emulator.fail_launch("rms_norm", 0, UNKNOWN)
    assert emulator.last_error() == 0


def test_an_old_device_is_named(emulator):
    emulator.configure(capability=75)
    with pytest.raises(ValueError, match=r"cuda:1 has compute capability 7\.5, expected 8\.0"):
        emulator.fail_launch("rms_norm", 1, UNKNOWN)
