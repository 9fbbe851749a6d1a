"""Measures how fast a model reads a prompt and decodes, as shares of the machine's limits.

A machine is not equally fast at all times. The memory of a virtual machine may be twice as fast in
the next second. So a measurement has several turns. In each turn the model completes a prompt, and
the limits are measured before and after. Shares are computed for each turn, and the medians of all
turns are shown.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mistral_ext.bench import machine, peaks, peaks_cuda
from mistral_ext.bench.models import flops, formats_of, step_bytes
from mistral_ext.llm import Mistral

_LEAST_TURNS, _MOST_TURNS = 2, 8
# After this time no more turns begin, except to reach _LEAST_TURNS.
_SECONDS = 6.0
_READ_PASSES = 2
_COPY_BYTES = 2**30
_PRODUCT_SIZE = 8192


class Limits(NamedTuple):
    """The limits of a device.

    Attributes:
        read: the bytes of memory per second that a CPU's threads read, or a GPU's copy moves.
        products: the operations per second. On a CPU they are those of `peaks.matrix_rate`, on a
            GPU those of a product of large bf16 matrices. 0: not measured, because there is no C++
            compiler.
    """

    read: float
    products: float


def limits_of(device: torch.device) -> Limits:
    """Measures the current limits of a device."""
    if device.type == "cpu":
        return Limits(peaks.read_bandwidth(_READ_PASSES), peaks.matrix_rate())
    nbytes = min(_COPY_BYTES, torch.cuda.get_device_properties(device).total_memory // 8)
    return Limits(
        peaks_cuda.copy_bandwidth(device, nbytes), peaks_cuda.product_rate(device, _PRODUCT_SIZE)
    )


@dataclass(frozen=True)
class Rate:
    """The speed of one kind of work.

    Attributes:
        tokens_per_second: the median of the turns.
        share: the share of the limit that the work reached, the median of the turns. None: the
            limit was not measured.
        limit: the limit in bytes or operations per second, the median of the turns.
        flops_per_byte: the number of operations for each byte of weights, if the weights are read
            once.
    """

    tokens_per_second: float
    share: float | None
    limit: float
    flops_per_byte: float


@dataclass(frozen=True)
class Speed:
    """The speed of a model.

    Attributes:
        weights: the formats of the model's matrices. The format with the most bytes comes first.
        step_bytes: the bytes of weights that a decode step reads.
        decode: the rate of decoding. Its limit is `Limits.read`.
        prompt: the rate of reading a prompt. Its limit is `Limits.products`.
        first_token_seconds: the seconds from the very first prompt to its first token. They include
            making the engine and its cache.
        memory: the bytes of memory in use after the first prompt. On a CPU this is the resident
            memory of the process, with the model. On a GPU it is the most that torch has reserved.
            None: the system does not report it.
        turns: the number of turns.
    """

    weights: str
    step_bytes: int
    decode: Rate
    prompt: Rate
    first_token_seconds: float
    memory: int | None
    turns: int


class _Turn(NamedTuple):
    limits: Limits
    prompt_seconds: float
    decode_seconds: float  # of one step


def measure(llm: Mistral, prompt_tokens: int, decode_tokens: int) -> Speed:
    """Measures a model with one sequence at a time.

    Args:
        llm: the model. It must not have made a completion yet.
        prompt_tokens: the number of tokens in a prompt.
        decode_tokens: the number of tokens to generate after the first token.

    Raises:
        ValueError: the prompt is too long for the model, or the model does not write text.
    """
    device = llm.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory of an earlier benchmark does not count for this model
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    _complete(llm, prompt_tokens, 0)
    first_token_seconds = time.perf_counter() - begin
    memory = _memory(device)  # before `limits_of` makes its buffers

    turns: list[_Turn] = []
    stop = time.perf_counter() + _SECONDS
    before = limits_of(device)
    while len(turns) < _LEAST_TURNS or (len(turns) < _MOST_TURNS and time.perf_counter() < stop):
        seconds = _complete(llm, prompt_tokens, decode_tokens)
        after = limits_of(device)
        means = Limits(*(sum(pair) / 2 for pair in zip(before, after, strict=True)))
        turns.append(_Turn(means, *seconds))
        before = after

    nbytes = step_bytes(llm.model)
    prompt_flops = flops(llm.config, 1, prompt_tokens)
    products = [turn.limits.products for turn in turns]
    return Speed(
        weights=formats_of(llm.model),
        step_bytes=nbytes,
        decode=Rate(
            1 / statistics.median(turn.decode_seconds for turn in turns),
            statistics.median(nbytes / t.decode_seconds / t.limits.read for t in turns),
            statistics.median(turn.limits.read for turn in turns),
            flops(llm.config, 1, 1, prompt_tokens) / nbytes,
        ),
        prompt=Rate(
            prompt_tokens / statistics.median(turn.prompt_seconds for turn in turns),
            statistics.median(prompt_flops / t.prompt_seconds / t.limits.products for t in turns)
            if all(products)
            else None,
            statistics.median(products),
            prompt_flops / nbytes,
        ),
        first_token_seconds=first_token_seconds,
        memory=memory,
        turns=len(turns),
    )


def _complete(llm: Mistral, prompt_tokens: int, decode_tokens: int) -> tuple[float, float]:
    """Completes a new prompt. Returns the seconds until its first token, and the mean seconds of
    the decode steps after it. The engine copies each token to the CPU before it takes the time, so
    the times include all work of a GPU."""
    # Each prompt has other tokens, because the engine would not read a known prompt again.
    ids = torch.randint(llm.config.vocab_size, (prompt_tokens,)).tolist()
    (completion,) = llm.generate([ids], max_tokens=1 + decode_tokens, ignore_eos=True, drafts=0)
    timing = completion.timing
    assert timing.prompt_tokens == prompt_tokens
    return timing.prompt_seconds, timing.decode_seconds / max(1, timing.decode_tokens)


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    resident = machine.resident_bytes()
    return None if resident is None else resident - peaks.buffer_bytes()
