"""Adapters for tests: random, with B other than 0, written by peft."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_peft(model, folder: Path, seed: int = 1, **settings) -> peft.PeftModel:
    """Gives `model` (transformers') a random adapter, and writes it to `folder`.

    `settings` go to peft's LoraConfig.
    """
    given = {"r": 4, "lora_alpha": 6, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**(given | settings)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # as initialised, B is 0 and tests nothing
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted.eval()
