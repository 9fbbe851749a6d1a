"""Measures speed: the limits of a machine, and models with random weights.

This file has the names that benchmarks use for weights, because `mistral-ext --help` reads them
without importing torch.
"""

# Plain weights -> torch's name of their dtype.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# The weights that are measured by default.
DEFAULT_WEIGHTS = ("bf16", "int8", "int4")
