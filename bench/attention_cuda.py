"""The rows of attention for ops_cuda.py: decodes, prompts and chunks, beside other kernels."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from measure_cuda import Call, Case, compiled, flashinfer
from shapes import (
    GPU,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    WINDOW,
    Rings,
    scaled,
)
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

from mistral_ext import _C, ops


def decode_cases(dtype: torch.dtype) -> Iterator[Case]:
    group = HEADS // KV_HEADS

    def plain(rings):
        # The heads of a group become queries of one head, at least as fast as enable_gqa.
        q = rings.q.view(-1, KV_HEADS, group, HEAD_DIM)
        return functional.scaled_dot_product_attention(q, rings.k_cache, rings.v_cache)

    def flexible(rings):
        q = rings.q[:, :, None]
        return compiled(flex.flex_attention)(q, rings.k_cache, rings.v_cache, enable_gqa=True)

    def ours(rings):
        return ops.attention(*rings.arguments(), WINDOW, max_count=1)

    for sequences in (1, 8, 32, 128):

        def make(sequences=sequences):
            return Rings(sequences, 1, 3 * WINDOW + 57, WINDOW, dtype, GPU)

        def paged(sequences=sequences):
            page = 16
            pages = sequences * WINDOW // page
            workspace = torch.empty(2**27, dtype=torch.uint8, device=GPU)
            wrapper = flashinfer().BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=True
            )
            int32 = {"dtype": torch.int32, "device": GPU}
            wrapper.plan(
                torch.arange(0, pages + 1, WINDOW // page, **int32),
                torch.arange(pages, **int32),
                torch.full((sequences,), page, **int32),
                HEADS,
                KV_HEADS,
                HEAD_DIM,
                page,
                q_data_type=dtype,
            )
            shape = (pages, KV_HEADS, page, HEAD_DIM)

            def theirs(rings):
                return wrapper.run(rings.q, (rings.k_cache.view(shape), rings.v_cache.view(shape)))

            return theirs

        nbytes = 2 * sequences * KV_HEADS * WINDOW * HEAD_DIM * dtype.itemsize
        peers = {"sdpa": lambda: plain, "flashinfer": paged}
        if sequences == 32:  # each shape takes long to compile
            peers["flex"] = lambda: flexible
        shape = f"decode, {sequences} x {WINDOW} keys"
        yield Case("attention", shape, make, ours, nbytes, peers=peers)


def visible_pairs(tokens: int, history: int, window: int | None) -> int:
    """The number of pairs of a new token and a token that it sees."""
    return sum(min(p + 1, window or p + 1) for p in range(history, history + tokens))


@dataclass
class Chunk:
    """New tokens of one sequence on a full ring, and calls of the peers that do the same
    attention."""

    tokens: int
    history: int
    window: int | None
    dtype: torch.dtype

    @property
    def seen(self) -> int:
        """The number of keys of the history that a peer is given."""
        return min(self.history, self.window or self.history)

    def make(self) -> Any:
        capacity = self.window or self.history + self.tokens
        rings = Rings(1, self.tokens, self.history, capacity, self.dtype, GPU)
        keys = [
            torch.cat((cache[0, :, : self.seen], new.transpose(0, 1)), 1)[None]
            for cache, new in ((rings.k_cache, rings.k), (rings.v_cache, rings.v))
        ]
        return SimpleNamespace(rings=rings, q=rings.q.transpose(0, 1)[None], keys=keys)

    def ours(self, given: Any) -> Any:
        return ops.attention(*given.rings.arguments(), self.window, max_count=self.tokens)

    def sdpa(self, *backends: SDPBackend) -> Call:
        def call(given):
            with sdpa_kernel(list(backends)) if backends else nullcontext():
                return functional.scaled_dot_product_attention(
                    given.q, *given.keys, is_causal=True, enable_gqa=True
                )

        return call

    def masked_sdpa(self) -> Call:
        query = torch.arange(self.seen, self.seen + self.tokens, device=GPU)[:, None]
        key = torch.arange(self.seen + self.tokens, device=GPU)
        mask = (key <= query) & (key > query - self.window)

        def call(given):
            # A copy for each query head: with a mask torch has no fast kernel for groups.
            if not hasattr(given, "wide"):
                given.wide = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in given.keys]
            return functional.scaled_dot_product_attention(given.q, *given.wide, attn_mask=mask)

        return call

    def flex(self) -> Call:
        seen, window, tokens = self.seen, self.window, self.tokens

        def sees(batch, head, query, key):
            causal = key <= query + seen
            return causal & (key > query + seen - window) if window else causal

        blocks = flex.create_block_mask(sees, None, None, tokens, seen + tokens, device=GPU)

        def call(given):
            return compiled(flex.flex_attention)(
                given.q, *given.keys, block_mask=blocks, enable_gqa=True
            )

        return call

    def flashinfer(self) -> Call:
        def call(given):
            keys = [x[0] for x in given.keys]
            left = self.window - 1 if self.window else -1
            return flashinfer().single_prefill_with_kv_cache(
                given.rings.q, *keys, causal=True, kv_layout="HND", window_left=left
            )

        return call

    def flash_attention(self, module: str) -> Call:
        """FlashAttention 2 or 3. Its last query has the position of the last key."""
        attend = importlib.import_module(module).flash_attn_func

        def call(given):
            q, k, v = (x.transpose(1, 2) for x in (given.q, *given.keys))
            window = (self.window - 1, 0) if self.window else (-1, -1)
            return attend(q, k, v, causal=True, window_size=window)

        return call

    def case(self, op: str, ours: Call, peers: dict[str, Callable[[], Call]]) -> Case:
        keys = self.seen + self.tokens
        shape = f"prefill, {self.tokens}"
        shape += f" after {self.history}" if self.history else ""
        shape += f", window {self.window}" if self.window else ", causal"
        return Case(
            op,
            shape,
            self.make,
            ours,
            2 * (HEADS * self.tokens + KV_HEADS * keys) * HEAD_DIM * self.dtype.itemsize,
            4 * HEADS * HEAD_DIM * visible_pairs(self.tokens, self.history, self.window),
            peers,
        )


def prefill_cases(dtype: torch.dtype) -> Iterator[Case]:
    prompts = [(tokens, 0, None) for tokens in (512, 1024, 2048, 4096, 8192, 16384)]
    for tokens, history, window in (
        *prompts,
        (8192, 0, WINDOW),
        (16384, 0, WINDOW),
        (1024, 3 * WINDOW, WINDOW),
    ):
        chunk = Chunk(scaled(tokens), history, window, dtype)
        peers = {"sdpa mask": chunk.masked_sdpa} if window else {"sdpa": chunk.sdpa}
        if tokens >= 8192:
            peers["flex"] = chunk.flex
        peers["flashinfer"] = chunk.flashinfer
        yield chunk.case("attention", chunk.ours, peers)


SM90 = "attention sm90"  # measured only if asked for: the kernel has not run on hardware yet


def sm90_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Prompts in one piece, and their last chunks of 2048. The kernel of sm_80 is one of the peers.
    Where it is faster, a model gets it by default."""
    prompts = [(tokens, 0, None) for tokens in (512, 1024, 2048, 4096, 8192, 16384, 32768)]
    windows = [(tokens, 0, WINDOW) for tokens in (8192, 16384, 32768)]
    chunks = [(2048, 14336, None), (2048, 14336, WINDOW)]
    for tokens, history, window in (*prompts, *windows, *chunks):
        chunk = Chunk(scaled(tokens), scaled(history) if history else 0, window, dtype)

        def ours(given, chunk=chunk):
            _C.select_attention("sm90")
            try:
                return chunk.ours(given)
            finally:
                _C.select_attention("sm80")

        peers = {"sm80": lambda chunk=chunk: chunk.ours}
        if not (history or window):
            peers["flash"] = functools.partial(chunk.sdpa, SDPBackend.FLASH_ATTENTION)
            peers["cudnn"] = functools.partial(chunk.sdpa, SDPBackend.CUDNN_ATTENTION)
        if tokens in (8192, 16384):  # each shape takes long to compile
            peers["flex"] = chunk.flex
        peers["flashinfer"] = chunk.flashinfer
        for module in ("flash_attn", "flash_attn_interface"):
            peers[module] = functools.partial(chunk.flash_attention, module)
        yield chunk.case(SM90, ours, peers)
