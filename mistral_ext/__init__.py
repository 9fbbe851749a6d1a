"""A small engine for Mistral 7B: hand-written kernels, a ring cache, and text."""

from mistral_ext import ops
from mistral_ext.engine.params import SamplingParams, TokenLogprob
from mistral_ext.engine.request import Completion, Timing
from mistral_ext.llm import Chat, Mistral, Stream, generate

__version__ = "0.1.0"  # of the package too: pyproject.toml reads it here

__all__ = [
    "Chat",
    "Completion",
    "Mistral",
    "SamplingParams",
    "Stream",
    "Timing",
    "TokenLogprob",
    "__version__",
    "generate",
    "ops",
]
