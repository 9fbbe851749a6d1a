"""Complete a prompt: python examples/generate.py ["a prompt" [a model folder or hub id]]"""

import sys

import mistral_ext

if "--help" in sys.argv:
    sys.exit(__doc__)
prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
model = sys.argv[2] if len(sys.argv) > 2 else None  # None: the demo model of the package

print(prompt + mistral_ext.generate(prompt, model, max_tokens=60))
