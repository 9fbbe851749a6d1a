"""`mistral-ext finetune`: train a LoRA adapter."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from mistral_ext.cli import options
from mistral_ext.cli.options import load_model
from mistral_ext.cli.start import start
from mistral_ext.finetune.options import TARGETS, TrainingOptions


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "finetune",
        parents=[options.common(), options.model()],
        help="train a LoRA adapter",
        description="Train a LoRA adapter on texts or conversations. The model's own weights stay "
        "as they are, in whatever format. Ctrl-C saves the state, and --resume goes on.",
    )
    group = parser.add_argument_group("training")
    group.add_argument("--data", metavar="FILE", required=True, help="training data: JSON lines")
    group.add_argument(
        "--output", metavar="DIR", required=True, help="folder to make, with the adapter"
    )
    group.add_argument("--eval-data", metavar="FILE", help="held-out data: JSON lines")
    group.add_argument(
        "--template",
        choices=("v1", "v2", "v3"),
        help="chat template of conversations (default: the model's, which a base model lacks)",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --output"
    )
    for name, kind, text in _OPTIONS:
        default = getattr(TrainingOptions, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            help=text if default is None else f"{text} (default {default:g})",
        )
    group.add_argument(
        "--targets", metavar="NAMES", help=f"weights to adapt (default {','.join(TARGETS)})"
    )
    group.add_argument("--tensorboard", action="store_true", help="write for TensorBoard, too")
    parser.set_defaults(run=run)


# Fields of TrainingOptions that have an option: name, type, help.
_OPTIONS = (
    ("rank", int, "of the adapter"),
    ("alpha", float, "the update is alpha / rank * B A (default twice the rank)"),
    ("epochs", int, "passes over the data"),
    ("max_steps", int, "end after so many steps"),
    ("batch_size", int, "samples in a step"),
    ("tokens_per_pass", int, "that are in memory at once, and at most in a sample"),
    ("learning_rate", float, "the highest"),
    ("warmup", float, "share of the steps in which it rises"),
    ("weight_decay", float, "of AdamW"),
    ("max_grad_norm", float, "longer gradients are shortened to this length"),
    ("eval_every", int, "steps between evaluations (default: an epoch)"),
    ("patience", int, "end after so many evaluations without a lower loss of --eval-data"),
    ("checkpoint_every", int, "steps between checkpoints (default: an epoch)"),
    ("sample_tokens", int, "text to write at each evaluation, 0: none"),
    ("seed", int, "of the order of the samples and the adapter's first values"),
)


def run(args: argparse.Namespace) -> int:
    training = _training_options(args)
    start(args)
    from tqdm.contrib.logging import logging_redirect_tqdm

    from mistral_ext.finetune import Interrupted, Trainer

    TrainingOptions(**training)  # reports wrong options before the model is loaded
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("mistral_ext").setLevel(logging.INFO)
    llm = load_model(args)
    trainer = Trainer(
        llm,
        args.data,
        args.output,
        args.eval_data,
        args.resume,
        template=args.template,
        **training,
    )
    try:
        with logging_redirect_tqdm():
            result = trainer.train()
    except Interrupted as interrupted:
        print(f"mistral-ext: {interrupted}; --resume goes on from there", file=sys.stderr)
        return 130
    lost = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
    print(f"{result.output}: adapter after {result.steps} steps{lost}", file=sys.stderr)
    return 0


def _training_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `TrainingOptions` that the user has given."""
    names = [name for name, _, _ in _OPTIONS]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.targets is not None:
        given["targets"] = tuple(args.targets.split(","))
    if args.tensorboard:
        given["tensorboard"] = True
    return given
