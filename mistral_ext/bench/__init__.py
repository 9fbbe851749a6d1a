"""Measuring speed: the limits of a machine, and models with random weights.

The names by which benchmarks call weights are here, where `mistral-ext --help` finds them without
torch.
"""

# Plain weights -> torch's name of their dtype.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# The weights that are measured by default.
DEFAULT_WEIGHTS = ("bf16", "int8", "int4")
