"""What `mistral_ext.integrations.transformers` saves a transformers model on the CPU.

    python bench/transformers_attention.py [--tokens 4096] [--window 1024] [--turns 3] [--threads N]

The first table times the attention of one layer of Mistral 7B's shape, as transformers calls it,
over a prompt with a sliding window: sdpa with its mask, and ours. The second times models of two
such layers with random weights, as loaded and after `accelerate_model`, both with our attention.
Figures are seconds of processor time, of all threads: other programs on the machine disturb them
less than wall clock. Both sides take turns, and medians are shown.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import transformers
from measure import machine, print_header, print_machine, print_row
from shapes import DIM, DTYPES, EPS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCABULARY, random

from mistral_ext.integrations.transformers import accelerate_model, register

ATTENTIONS = ("sdpa", "mistral_ext")
COLUMNS = (("what", -28), ("dtype", -5), ("before s", 9), ("after s", 9), ("x", 6))


def processor_seconds(functions: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """The median processor time of one call of each function."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(turns + 1):
        for function, samples in zip(functions, times, strict=True):
            begin = time.process_time()
            function()
            if turn:  # the first warms up
                samples.append(time.process_time() - begin)
    return [statistics.median(samples) for samples in times]


def make_config(window: int | None, attention: str) -> transformers.MistralConfig:
    return transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=EPS,
        sliding_window=window,
        attn_implementation=attention,
    )


def attention_call(name: str, tokens: int, window: int, dtype: torch.dtype) -> Callable[[], object]:
    """A call of an attention function with the mask that transformers makes for it."""
    config = make_config(window, name)
    with torch.device("meta"):
        layer = transformers.models.mistral.modeling_mistral.MistralAttention(config, 0).eval()
    x = torch.empty(1, tokens, DIM, dtype=dtype)
    mask = transformers.masking_utils.create_sliding_window_causal_mask(config, x, None, None)
    function = transformers.AttentionInterface()[name]
    q, k, v = (
        random(1, heads, tokens, HEAD_DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return lambda: function(layer, q, k, v, mask, scaling=HEAD_DIM**-0.5, sliding_window=window)


def make_model(window: int, dtype: torch.dtype) -> transformers.MistralForCausalLM:
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(make_config(window, "mistral_ext"))
    model = model.to_empty(device="cpu").to(dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for parameter in model.parameters():
        parameter.data = random(*parameter.shape, dtype=dtype).mul_(0.02)
    return model


def print_pair(what: str, dtype: str, seconds: Sequence[float]) -> None:
    before, after = seconds
    cells = [what, dtype, f"{before:.3f}", f"{after:.3f}", f"{before / after:.2f}"]
    print_row(COLUMNS, cells)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    register()
    print_machine(machine())
    print(
        f"\nattention: before sdpa, after ours, {options.tokens} tokens, window {options.window}\n"
    )
    print_header(COLUMNS)
    for name in ("fp32", "bf16"):
        given = options.tokens, options.window, DTYPES[name]
        calls = [attention_call(attention, *given) for attention in ATTENTIONS]
        print_pair("attention of a layer", name, processor_seconds(calls, options.turns))
    print("\naccelerate_model: two layers and the output matrix\n")
    print_header(COLUMNS)
    for name in ("fp32", "bf16"):
        plain = make_model(options.window, DTYPES[name])
        with torch.device("meta"):
            faster = transformers.MistralForCausalLM(plain.config).eval()
        faster.load_state_dict(plain.state_dict(), assign=True)
        faster.model.rotary_emb = plain.model.rotary_emb
        accelerate_model(faster)
        for count in (1, 4, 256):
            ids = torch.randint(VOCABULARY, (1, count))
            calls = [functools.partial(model, ids, use_cache=False) for model in (plain, faster)]
            print_pair(f"{count} tokens", name, processor_seconds(calls, options.turns))


if __name__ == "__main__":
    main()
