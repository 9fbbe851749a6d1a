"""A small engine for Mistral 7B: hand-written kernels, a ring cache, and text."""

from importlib.metadata import version

from mistral_ext import ops
from mistral_ext.generation import Chat, Mistral, Stream, generate
from mistral_ext.sampling import SamplingParams, TokenLogprob
from mistral_ext.scheduler import Completion, Timing

__version__ = version("mistral_ext")

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
