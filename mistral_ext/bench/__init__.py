"""Measures speed: the limits of a machine, and models with random weights.

This file has the names of weight formats in benchmarks. It does not import torch, because
`mistral-ext --help` reads these names and must be quick.
"""

# For each format of plain weights, torch's name of its dtype.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# The formats that are measured by default.
DEFAULT_WEIGHTS = ("bf16", "int8", "int4")
