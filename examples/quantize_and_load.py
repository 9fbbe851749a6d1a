"""Write a model with weights in 4 bits, and load it: python examples/quantize_and_load.py OUT"""

import sys
from pathlib import Path

import mistral_ext
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

if "--help" in sys.argv or len(sys.argv) < 2:
    sys.exit(__doc__)
folder = quantize_checkpoint(DEMO_MODEL, sys.argv[1], bits=4)
for name in (DEMO_MODEL, folder):
    size = Path(name, "model.safetensors").stat().st_size
    text = mistral_ext.generate("Once upon a time", name, max_tokens=20)
    print(f"{size / 1e6:.1f} MB: {text!r}")
