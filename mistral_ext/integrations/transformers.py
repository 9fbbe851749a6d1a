"""Runs transformers' models on our kernels (extra `[transformers]`).

    from mistral_ext.integrations.transformers import accelerate_model, register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mistral_ext")
    accelerate_model(model)  # optional: norms, feed-forward blocks and projections as well

`register` adds the attention function "mistral_ext" and its mask function. They support causal
models with grouped-query attention, with or without a sliding window: Mistral, Llama and similar
models. The head dimension must be one of `ops.head_dims(device)`. Padding may be anywhere.
Sequences may be packed (transformers recognises them by position_ids that start again). Caches may
be dynamic, static or sliding. As in FlashAttention 2, a window counts tokens and not the padding
between them, and the outputs at padding are arbitrary.

Models can be trained with this attention if a call has whole sequences, without keys of earlier
calls. If there are keys of earlier calls, a tensor that requires a gradient raises RuntimeError:
call the model in `torch.no_grad()`.

The attention depends on the values of the mask, which torch.compile cannot follow. So
`fullgraph=True` is not possible. (With a static cache on a GPU, `generate` compiles the model by
itself: set `disable_compile=True`.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from mistral_ext import ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "mistral_ext"

# The place of a sequence in a row of the batch: its keys are [begin, end).
Span = tuple[int, int]


def register() -> None:
    """Adds the attention function "mistral_ext" and its mask function to transformers.

    Raises:
        ImportError: transformers is missing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, document_mask)


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor | None:
    """The mask function of transformers. It finds the sequence to which each key belongs.

    Args:
        batch_size: B, the number of rows of the batch.
        q_length: T, the number of new tokens in each row of the batch.
        kv_length: the number of keys that the attention function gets. A static cache has room for
            more keys than there are tokens.
        q_offset, kv_offset: the positions of the first new token and of the first key.
        mask_function: a function of (row, head, query, key). It says whether a query sees a key.
            None: each row is one sequence.
        attention_mask: [B, keys] bool, False at padding. None: there is no padding.
        use_vmap: whether the model or its caller has added conditions to `mask_function`.
        device: the device of the result.

    Returns:
        [B, K] int64 for the K keys up to the last new token: the number of each key's sequence,
        from 1 on, or 0 for padding. None: each row is one sequence of kv_length keys.

    Raises:
        ValueError: the mask is neither causal nor causal within packed sequences, or `use_vmap` is
            True.
    """
    offset = int(q_offset)
    keys = offset - kv_offset + q_length
    if use_vmap:
        raise ValueError(f"attn_implementation={NAME!r}: the model's mask is a function of its own")
    documents = None
    if mask_function is not None and q_length > 1:
        documents = _documents(mask_function, batch_size, q_length, offset, device)
    if attention_mask is not None:
        # Keeps only the tokens that have keys. The mask may begin with tokens that have left the
        # sliding window, and go on beyond the new tokens.
        attention_mask = attention_mask[:, : offset + q_length][:, -keys:]
        if not attention_mask.all():
            return attention_mask.long()
    if documents is not None and offset == 0:
        return documents
    if keys == kv_length:
        return None
    return torch.ones(batch_size, keys, dtype=torch.int64, device=device)


def _documents(
    mask_function: Callable[..., Tensor],
    batch_size: int,
    count: int,
    offset: int,
    device: torch.device | str,
) -> Tensor | None:
    """The number of the packed sequence to which each token belongs, [B, T], from 1 on. Returns
    None if each row is one sequence.

    A sequence begins with a token that does not see the token before it.
    """
    rows = torch.arange(batch_size, device=device).unsqueeze(1)
    tokens = torch.arange(offset + 1, offset + count, device=device)
    head = torch.zeros((), dtype=torch.int64, device=device)

    def sees(queries: Tensor, keys: Tensor) -> Tensor:
        return mask_function(rows, head, queries, keys).expand(batch_size, count - 1)

    if sees(tokens - 1, tokens).any():
        raise ValueError(f"attn_implementation={NAME!r}: a token sees a later one, expected none")
    begins = ~sees(tokens, tokens - 1)
    if not begins.any():
        return None
    return 1 + torch.nn.functional.pad(begins.long(), (1, 0)).cumsum(1)


class _Layout(NamedTuple):
    """The places of the sequences in a batch.

    The kernel needs the keys of a sequence side by side. So if a sequence has padding between its
    tokens, the batch is reordered: key_order [B, K] and query_order [B, T] put the padding of each
    row before its tokens. Otherwise both are None.
    """

    # The sequences of each row, after reordering. Neighbouring padding counts as a sequence, too.
    spans: tuple[tuple[Span, ...], ...]
    key_order: Tensor | None = None
    query_order: Tensor | None = None


def _layout_of_mask(mask: Tensor, count: int) -> _Layout:
    """The layout of a mask that `document_mask` has returned, with `count` new tokens in each
    row."""
    rows = mask.tolist()
    spans = tuple(_runs(row) for row in rows)
    numbers = [[row[begin] for begin, _ in runs] for row, runs in zip(rows, spans, strict=True)]
    if all(len([n for n in of_row if n]) == len({*of_row} - {0}) for of_row in numbers):
        return _Layout(spans)
    is_token = (mask > 0).byte()
    key_order = is_token.argsort(dim=1, stable=True)
    query_order = is_token[:, -count:].argsort(dim=1, stable=True)
    ordered = mask.gather(1, key_order).tolist()
    return _Layout(tuple(_runs(row) for row in ordered), key_order, query_order)


def _runs(values: list[int]) -> tuple[Span, ...]:
    """The range [begin, end) of each group of neighbours with equal values."""
    begins = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return tuple(zip(begins, [*begins[1:], len(values)], strict=True))


class _LastLayout:
    """Keeps the layout of the last mask, because neighbouring layers of a model get the same mask.
    If each layer read the mask again, each would wait for the GPU."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, _Layout] | None = None

    def of(self, mask: Tensor, count: int) -> _Layout:
        last = self._last
        if last and last[0] is mask and last[1] == count:
            return last[2]
        layout = _layout_of_mask(mask, count)
        self._last = mask, count, layout
        return layout


_last_layout = _LastLayout()


@functools.lru_cache(maxsize=64)
def _table(
    spans: tuple[tuple[Span, ...], ...],
    count: int,
    kv_heads: int,
    capacity: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Returns the sequence table (see `mistral_ext.ops`), and the largest number of new tokens of a
    sequence.

    The table has a row for each key/value head of a sequence, as if the head were a sequence of its
    own. The head's ring is where its keys lie in the tensor [B, Hkv, C, D]. So a sequence may begin
    anywhere in its row of the batch, and contiguous keys need not be copied.

    Args:
        spans: the sequences in each row of the batch.
        count: T, the number of new tokens in each row.
        kv_heads, capacity: Hkv, the number of key/value heads, and C, the number of keys in a row.
        device: the device of the table.
    """
    table, token = [], 0
    for row, of_row in enumerate(spans):
        first_new = of_row[-1][1] - count
        for head in range(kv_heads):
            for begin, end in of_row:
                if end > first_new:
                    first = max(begin, first_new)
                    ring = (row * kv_heads + head) * capacity + begin
                    table.append((token, end - first, first - begin, ring, end - begin))
                    token += end - first
    most = max(row[1] for row in table)
    return torch.tensor(table, dtype=torch.int64, device="cpu").to(device), most


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers, computed by `ops.attention`.

    Args:
        module: the attention layer.
        query: [B, Hq, T, D], rotated.
        key, value: [B, Hkv, K, D], the cache and the new tokens. The new tokens are at the end or,
            in a static cache, where the mask ends.
        attention_mask: the result of `document_mask`.
        dropout: the dropout, which must be 0.
        scaling: the factor of the scores. None: 1 / sqrt(D).
        sliding_window: the number of keys that a query sees, including its own key. None: a query
            sees all keys up to its own.
        kwargs: other arguments that transformers passes. An argument that would change the result
            raises ValueError.

    Returns:
        ([B, T, Hq, D], None). In `torch.autocast` it has the dtype of autocast.

    Raises:
        ValueError: an argument asks for a feature that the kernel does not have.
        RuntimeError: a tensor requires a gradient, and there are keys of earlier calls.
    """
    _expect_supported(module, dropout, attention_mask, kwargs)
    query, key, value = _cast_by_autocast(query, key, value)
    count = query.shape[2]
    if attention_mask is None:
        layout = _Layout((((0, key.shape[2]),),) * len(query))
    else:
        layout = _last_layout.of(attention_mask, count)
    if layout.key_order is None or layout.query_order is None:
        return _attention(query, key, value, layout.spans, scaling, sliding_window), None
    key, value = (_reorder(x, layout.key_order) for x in (key, value))
    query = _reorder(query, layout.query_order)
    out = _attention(query, key, value, layout.spans, scaling, sliding_window)
    back = layout.query_order.argsort(dim=1)
    return out.gather(1, back[:, :, None, None].expand_as(out)), None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: tuple[tuple[Span, ...], ...],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Computes the result [B, T, Hq, D] of `attention_forward`, for sequences without padding
    between their tokens."""
    batch, heads, count, dim = query.shape
    kv_heads, end = key.shape[1], spans[0][-1][1]
    table, most = _table(spans, count, kv_heads, key.shape[2], query.device)
    # q is [B * Hkv * T, Hq / Hkv, D]: for each key/value head, the query heads that share it.
    q = query.unflatten(1, (kv_heads, -1)).transpose(2, 3).reshape(-1, heads // kv_heads, dim)
    k, v = (x[:, :, end - count : end].reshape(-1, 1, dim) for x in (key, value))
    k_pool = v_pool = None
    if end > count or not _needs_gradient(query, key, value):
        k_pool, v_pool = (x.contiguous().view(-1, dim) for x in (key, value))
    out = ops.attention(q, k, v, k_pool, v_pool, table, window, scale, most)
    return out.view(batch, kv_heads, count, -1, dim).transpose(1, 2).flatten(2, 3)


def _cast_by_autocast(*tensors: Tensor) -> list[Tensor]:
    """In `torch.autocast`, casts tensors to its dtype, as it does for torch's own attention. Models
    in float32 have rotated queries and keys in float32 there, but values in the lower dtype."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return [*tensors]
    dtype = torch.get_autocast_dtype(kind)
    return [tensor.to(dtype) for tensor in tensors]


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Reorders the first n tokens of x [B, H, n or more, D], and drops the other tokens. `order` is
    [B, n]: token i of row b of the result is token order[b, i] of row b of x."""
    x = x[:, :, : order.shape[1]]
    return x.gather(2, order[:, None, :, None].expand_as(x))


def _expect_supported(
    module: torch.nn.Module, dropout: float, mask: Tensor | None, given: dict[str, Any]
) -> None:
    wrong = {name: given[name] for name in ("softcap", "s_aux") if given.get(name) is not None}
    if dropout:
        wrong["dropout"] = dropout
    config = getattr(module, "config", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None:
        wrong["attention_chunk_size"] = chunk
    is_causal = given.get("is_causal")
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        wrong["is_causal"] = False
    for name, value in wrong.items():
        expected = {"dropout": "0", "is_causal": "True"}.get(name, "None")
        raise ValueError(f"{name} is {value!r:.40}, expected {expected} with {NAME!r} attention")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, expected [batch, keys] or None with "
            f"{NAME!r} attention: a mask of queries by keys is not possible"
        )


def accelerate_model(model: PreTrainedModel) -> int:
    """Makes the modules of a loaded model use our kernels, where this is faster.

    The model's RMSNorms change. In bfloat16 and float16 its feed-forward blocks, projections and
    output matrix change as well, if they are plain `torch.nn.Linear` without a bias. Quantised
    layers, adapters and modules with a hook of accelerate (such as offloaded weights) do not
    change. Adapters may also be attached later. In float32 only the norms change, because torch's
    products are faster, for one token and for prompts. docs/performance.md has measurements.

    The model keeps its parameters and modules, so `state_dict` and saving work as before. The
    changed modules are for inference. They raise RuntimeError where torch records gradients of
    their parameters, and feed-forward blocks also where it records gradients of their input.

    Args:
        model: a Mistral or Llama of transformers, in the dtype in which it will run.

    Returns:
        The number of modules that have changed.

    Raises:
        ValueError: the model is of another type, or has another activation than SiLU.
    """
    config = model.config
    if config.model_type not in ("mistral", "llama"):
        raise ValueError(f"model is of type {config.model_type!r}, expected mistral or llama")
    if config.hidden_act != "silu":
        raise ValueError(f"model has hidden_act {config.hidden_act!r}, expected silu")
    changed = 0
    for module in model.modules():
        forward = _replacement(module)
        if forward is not None:
            module.forward = functools.partial(forward, module)
            changed += 1
    return changed


def _replacement(module: torch.nn.Module) -> Callable[..., Tensor] | None:
    """The function that replaces a module's `forward`, or None if the module does not change."""
    if _has_hook(module):
        return None
    name = type(module).__name__
    if name in ("MistralRMSNorm", "LlamaRMSNorm"):
        return _rms_norm
    if name in ("MistralMLP", "LlamaMLP"):
        return _feed_forward if _is_plain_block(module) else None
    return _linear if _is_taken(module) else None


def _is_taken(module: object) -> bool:
    """Whether a module is a projection that our kernels multiply faster than torch."""
    if type(module) is not torch.nn.Linear or module.bias is not None or _has_hook(module):
        return False
    return module.weight.dtype in (torch.bfloat16, torch.float16)


def _is_plain_block(module: Any) -> bool:
    """Whether our kernels multiply all three projections of a feed-forward block faster than
    torch."""
    return all(map(_is_taken, (module.gate_proj, module.up_proj, module.down_proj)))


def _has_hook(module: torch.nn.Module) -> bool:
    """Whether the library accelerate has put a hook on a module's `forward`. Such a hook may fetch
    the weights, so `forward` must not be replaced."""
    return hasattr(module, "_hf_hook")


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return ops.rms_norm(x.flatten(0, -2), module.weight, module.variance_epsilon).view(x.shape)


def _linear(module: Any, x: Tensor) -> Tensor:
    return ops.linear(x.flatten(0, -2), module.weight).view(*x.shape[:-1], -1)


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    if not _is_plain_block(module):  # an adapter has wrapped a projection since accelerate_model
        return cast(Tensor, type(module).forward(module, x))
    weights = [module.gate_proj.weight, module.up_proj.weight]
    hidden = ops.linear_swiglu(x.flatten(0, -2), weights)
    return ops.linear(hidden, module.down_proj.weight).view(x.shape)
