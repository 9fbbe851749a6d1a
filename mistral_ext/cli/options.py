"""Options that several commands share, and functions that use their values, above all to load the
model.

Some functions return a parser. A command passes it to `add_parser` as one of the `parents`, and so
takes over its options.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mistral_ext.cli.start import start
from mistral_ext.engine.params import MOST_DRAFTS, SamplingParams
from mistral_ext.files import read_text_file

if TYPE_CHECKING:
    import torch

    from mistral_ext.llm import Mistral

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# The keys of weights.quantize.NAMES, which is not imported because its module imports torch.
QUANTIZE = ("int8", "int4")
_DTYPES = ("float32", "bfloat16", "float16")


def common() -> argparse.ArgumentParser:
    """Makes a parser of the options of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads to use; default: one per core, of a container its share",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def model() -> argparse.ArgumentParser:
    """Makes a parser of the options of a command that loads a model."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="PATH_OR_ID", help="folder, GGUF file or hub id; default: demo"
    )
    group.add_argument("--device", metavar="DEVICE", help="cpu (default) or cuda")
    add_dtype(group, "default: as stored")
    group.add_argument("--quantize", choices=QUANTIZE, help="round the weights while they are read")
    group.add_argument(
        "--sliding-window", type=int, metavar="W", help="override the config; 0: no window"
    )
    group.add_argument("--rope-theta", type=float, metavar="BASE", help="override the config")
    group.add_argument("--max-positions", type=int, metavar="N", help="override the config")
    group.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens in one pass"
    )
    group.add_argument(
        "--generation-config",
        metavar="auto|PATH",
        help="take sampling defaults from the model's generation_config.json, or that in PATH",
    )
    group.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="tokens that the cache has room for; default: 'mistral-ext info' says how many",
    )
    return parser


def add_dtype(parser: argparse._ActionsContainer, text: str) -> None:
    """Adds the option --dtype, which `dtype_of` reads."""
    parser.add_argument("--dtype", choices=_DTYPES, help=text)


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """Returns the dtype that --dtype names, or None if the option was not given. Imports torch,
    which takes long, so call it after the options are checked."""
    import torch

    dtype: torch.dtype | None = getattr(torch, args.dtype) if args.dtype else None
    return dtype


def config_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `MistralConfig` that the options of `model` set."""
    overrides: dict[str, Any] = {}
    if args.sliding_window is not None:
        overrides["sliding_window"] = args.sliding_window or None
    if args.rope_theta is not None:
        overrides["rope_theta"] = args.rope_theta
    if args.max_positions is not None:
        overrides["max_positions"] = args.max_positions
    return overrides


def load_model(args: argparse.Namespace, **more: Any) -> Mistral:
    """Calls `start`, and loads the model that the options of `model` name.

    Args:
        args: the parsed options.
        more: further arguments of `Mistral.from_pretrained`.
    """
    start(args)
    from mistral_ext.llm import Mistral
    from mistral_ext.weights.hub import DEMO_MODEL

    model = DEMO_MODEL if args.model is None else args.model
    return Mistral.from_pretrained(model, dtype=dtype_of(args), **model_arguments(args), **more)


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `Mistral.from_pretrained` that the options of `model` set, except
    the model itself and its dtype."""
    return {
        "device": args.device,
        "prefill_chunk": args.prefill_chunk,
        "quantize": args.quantize,
        "cache_tokens": args.cache_tokens,
        "generation_config": args.generation_config,
        **config_overrides(args),
    }


def draft_model() -> argparse.ArgumentParser:
    """Makes a parser of the option --draft-model, for commands that generate text."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--draft-model",
        metavar="PATH_OR_ID",
        help="smaller model of the same vocabulary, to guess tokens: changes the speed alone",
    )
    return parser


def adapter() -> argparse.ArgumentParser:
    """Makes a parser of the option --adapter, for commands that use one LoRA adapter."""
    parser = argparse.ArgumentParser(add_help=False)
    add_adapter(parser, "LoRA adapter to use: a folder, file or hub id")
    return parser


def add_adapter(
    parser: argparse._ActionsContainer, text: str, flag: str = "--adapter", **more: Any
) -> None:
    """Adds an option for LoRA adapters. Its value is a pair of a name and a path or hub id."""
    parser.add_argument(flag, type=_named_path, metavar="NAME=PATH_OR_ID", help=text, **more)


def load_adapted_model(args: argparse.Namespace, **more: Any) -> tuple[Mistral, str | None]:
    """Loads the model as `load_model` does, with the adapter that --adapter names. Returns the
    model and the name of the adapter (None: no adapter was named).

    Args:
        args: the parsed options.
        more: further arguments of `Mistral.from_pretrained`.
    """
    if args.adapter is None:
        return load_model(args, **more), None
    name, path = args.adapter
    return load_model(args, adapters={name: path}, **more), name


def sampling() -> argparse.ArgumentParser:
    """Makes a parser of the options of a command that samples tokens."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("sampling")
    for name, kind, text in (
        ("max_tokens", int, "tokens to generate at most"),
        ("temperature", float, "0: always the most likely token"),
        ("top_p", float, "keep the most likely tokens up to this probability"),
        ("top_k", int, "keep this many of the most likely tokens; 0: all"),
        ("min_p", float, "keep tokens this likely relative to the most likely"),
        ("repetition_penalty", float, "divide logits of tokens seen before"),
        ("presence_penalty", float, "subtract from logits of tokens generated before"),
        ("frequency_penalty", float, "the same for each time they were generated"),
        ("seed", int, "same seed, same text"),
        ("logprobs", int, "show the log-probability of each token and of N others"),
        (
            "drafts",
            int,
            f"tokens to guess at a time: changes the speed alone (default {MOST_DRAFTS}; CUDA: 0)",
        ),
    ):
        default = getattr(SamplingParams, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            help=text if default is None else f"{text} (default {default})",
        )
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_token_bias,
        default=[],
        metavar="ID=X",
        help="add X to the logit of token ID; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", help="do not end at the end of text")
    for name, text in (
        ("--schema", "write JSON that matches the JSON schema in FILE"),
        ("--grammar", "write what matches the Lark grammar in FILE"),
    ):
        group.add_argument(name, type=_contents, metavar="FILE", help=text)
    group.add_argument("--regex", type=str, metavar="REGEX", help="write what matches as a whole")
    return parser


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `SamplingParams` that the options of `sampling` set."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    given["logit_bias"] = dict(args.logit_bias)
    return given


def expect_folder_of(option: str, file: str) -> None:
    """Raises ValueError unless the folder of a file that an option names exists. Call this before
    the work whose results go into the file."""
    if not Path(file).parent.is_dir():
        raise ValueError(f"{option} is {file!r}, expected a file in a folder that exists")


def _named_path(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH_OR_ID, e.g. sql=./sql-adapter")
    return name, path


def filled(text: str) -> str:
    """Returns the value of an option, or refuses it if it is empty."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no value (is a variable not set?)")
    return text


def _contents(path: str) -> str:
    try:
        return read_text_file(filled(path))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _token_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=X, e.g. 1234=-5.0") from None
