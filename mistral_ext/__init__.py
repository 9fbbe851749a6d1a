"""A small engine for Mistral 7B, with hand-written kernels and a ring buffer as cache.

A name of this package is imported when it is first used. The reason is that importing torch takes
seconds, and commands such as `mistral-ext --help` do not need it.
"""

from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # pyproject.toml reads the version of the package here

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

if TYPE_CHECKING:  # type checkers and editors do not see names that __getattr__ imports
    from mistral_ext import llm as llm
    from mistral_ext import ops
    from mistral_ext.chat import Chat
    from mistral_ext.engine.params import SamplingParams, TokenLogprob
    from mistral_ext.engine.request import Completion, Timing
    from mistral_ext.engine.stream import Stream
    from mistral_ext.llm import Mistral, generate
else:
    _MODULES = ("llm", "ops")
    _HOMES = {
        "Chat": "chat",
        "Completion": "engine.request",
        "Mistral": "llm",
        "SamplingParams": "engine.params",
        "Stream": "engine.stream",
        "Timing": "engine.request",
        "TokenLogprob": "engine.params",
        "generate": "llm",
    }

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            value = import_module(f"{__name__}.{name}")
        elif name == "_C":
            value = _compiled_module()
        elif name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # later look-ups do not call this function
        return value

    def _compiled_module() -> object:
        """Imports `_C`, which each version of Python needs a build of."""
        try:
            return import_module(f"{__name__}._C")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{__path__[0]} has no _C{EXTENSION_SUFFIXES[0]}, the compiled module for this "
                "Python: run 'pip install .' in the source tree, or leave the tree if you did"
            ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
