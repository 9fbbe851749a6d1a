"""One model, several LoRA adapters: python examples/lora.py FOLDER_OR_ID NAME=ADAPTER... "a prompt"

ADAPTER is a folder or file as peft, Mistral or GGUF write it. The weights of the model stay as they
are, in whatever format, and a batch may mix adapters.
"""

import sys

import mistral_ext

if "--help" in sys.argv or len(sys.argv) < 3:
    sys.exit(__doc__)
model, *named, prompt = sys.argv[1:]
adapters = dict(item.split("=", 1) for item in named)
llm = mistral_ext.Mistral.from_pretrained(model, adapters=adapters)

names = [None, *adapters]  # None: the model itself
completions = llm.generate([prompt] * len(names), adapter=names, max_tokens=40)
for name, completion in zip(names, completions, strict=True):
    print(f"[{name or 'no adapter'}] {prompt}{completion.text}\n")

for name in adapters:  # a server does so while it runs: mistral-ext serve --adapter-updates
    llm.unload_adapter(name)
