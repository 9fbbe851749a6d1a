"""Fine-tuning: LoRA adapters for models whose own weights, of whatever format, stay as they are."""

from mistral_ext.finetune.options import TrainingOptions
from mistral_ext.finetune.trainer import Interrupted, Trainer, TrainingResult

__all__ = ["Interrupted", "Trainer", "TrainingOptions", "TrainingResult"]
