"""Run a transformers model on our kernels: python examples/transformers_attention.py [a model]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mistral_ext.integrations.transformers import accelerate_model, register
from mistral_ext.llm import DEMO_MODEL

if "--help" in sys.argv:
    sys.exit(__doc__)
name = sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL
register()  # the attention function "mistral_ext"
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mistral_ext")
changed = accelerate_model(model)  # norms, and in bfloat16 the products too

tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
prompts = ["Once upon a time", "The wolf"]
batch = tokenizer(prompts, return_tensors="pt", padding=True)
with torch.inference_mode():
    out = model.generate(**batch, max_new_tokens=30, do_sample=False)
print(f"[{changed} modules of {type(model).__name__} run on mistral_ext]")
for text in tokenizer.batch_decode(out, skip_special_tokens=True):
    print(text, end="\n\n")
