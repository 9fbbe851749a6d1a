"""Trains LoRA adapters. The model's own weights, in whatever format, do not change.

The trainer is imported when it is first used, so that the command line can read the options without
importing torch.
"""

from typing import TYPE_CHECKING

from mistral_ext.finetune.options import TrainingOptions

__all__ = ["Interrupted", "Trainer", "TrainingOptions", "TrainingResult"]

if TYPE_CHECKING:
    from mistral_ext.finetune.trainer import Interrupted, Trainer, TrainingResult
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from mistral_ext.finetune import trainer

        return getattr(trainer, name)
