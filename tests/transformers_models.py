"""Small models of transformers, with sdpa and with our attention, and what the tests of both do."""

from __future__ import annotations

import torch
import transformers
from transformers import DynamicCache, StaticCache

VOCABULARY, WINDOW = 131, 16
MISTRAL = (transformers.MistralConfig, transformers.MistralForCausalLM)
LLAMA = (transformers.LlamaConfig, transformers.LlamaForCausalLM)


def make_pair(kind=MISTRAL, **changes):
    """A random model with sdpa, and the same with our attention."""
    config_type, model_type = kind
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if kind is MISTRAL:
        settings["sliding_window"] = WINDOW
    settings |= changes
    torch.manual_seed(0)
    theirs = model_type(config_type(**settings, attn_implementation="sdpa")).eval()
    for parameter in theirs.parameters():
        # As initialised, logits hardly differ and attention hardly matters.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.08)
    ours = model_type(config_type(**settings, attn_implementation="mistral_ext")).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random_ids(batch: int, count: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(1, VOCABULARY, (batch, count))


def padding_mask(side: str, padding: list[int], count: int) -> torch.Tensor:
    mask = torch.ones(len(padding), count, dtype=torch.int64)
    for row, n in zip(mask, padding, strict=True):
        row[slice(0, n) if side == "left" else slice(count - n, None)] = 0
    return mask


@torch.no_grad()
def run_chunks(model, ids, cache, mask, sizes, positions):
    """The logits of ids, read in chunks over a cache."""
    out, begin = [], 0
    for size in sizes:
        end = begin + size
        given = None if mask is None else mask[:, :end]
        chunk = ids[:, begin:end]
        result = model(
            chunk,
            attention_mask=given,
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        out.append(result.logits)
        begin = end
    return torch.cat(out, dim=1)


def make_cache(kind: str, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=64)
    return DynamicCache(config=model.config) if kind == "sliding" else DynamicCache()


def gradients(model, ids, **given):
    """The gradients of all parameters, of the loss on ids."""
    labels = ids.masked_fill(given.get("attention_mask", torch.ones_like(ids)) == 0, -100)
    model.zero_grad()
    model(ids, labels=labels, **given).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
