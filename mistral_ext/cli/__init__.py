"""The command line: `mistral-ext generate`, `chat`, `perplexity`, `quantize` and `info`.

Text goes to stdout, timings and errors to stderr. An error is one line and exit status 1 (2 for
wrong usage, 130 for Ctrl-C); --traceback shows where it came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import NoReturn

import torch

from mistral_ext import _C, __version__, ops
from mistral_ext.engine.params import SamplingParams
from mistral_ext.engine.request import Completion
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.llm import DEMO_MODEL, Mistral
from mistral_ext.text.text_file import decode_text, read_text_file
from mistral_ext.weights.quantize import GROUPS
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is {args.threads}, expected 1 or more")
            torch.set_num_threads(args.threads)
        return args.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, `head` say, has gone. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError) as error:
        if args.traceback:
            raise
        print(f"mistral-ext: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _generate(args: argparse.Namespace) -> int:
    prompt = _read_prompt(args)
    options = _sampling_options(args)
    SamplingParams.from_options(options)  # complain before the model is loaded
    llm = _load(args)
    if args.json or args.n > 1:
        for completion in llm.generate(prompt, **options):
            if args.json:
                print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False))
                _print_timing(completion)
            else:
                print((prompt if args.echo else "") + completion.text)
                _report(llm, completion)
        return 0
    stream = llm.stream(prompt, **options)
    if args.echo:
        print(prompt, end="")
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    _report(llm, stream.completion)
    return 0


def _chat(args: argparse.Namespace) -> int:
    options = _sampling_options(args)
    SamplingParams.from_options(options)
    llm = _load(args)
    chat = llm.start_chat(system=args.system, template=args.template)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history for input()

        print("Ctrl-C stops a reply, Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            message = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if not message:
            continue
        try:
            for piece in chat.send(message, **options):
                print(piece, end="", flush=True)
            print()
            _report(llm, chat.completion)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _perplexity(args: argparse.Namespace) -> int:
    texts = [_read_text(file) for file in args.file]
    result = perplexity(_load(args), texts, args.max_tokens)
    if args.json:
        shown = {"perplexity": result.value, **dataclasses.asdict(result), "rate": result.rate}
        print(json.dumps(shown))
        return 0
    print(f"perplexity {result.value:.4f}")
    print(
        f"[{result.nll:.5f} nats a token, {result.tokens} tokens in {result.segments} "
        f"segment{'s' if result.segments > 1 else ''}, {result.rate:.1f} tokens/s]",
        file=sys.stderr,
    )
    return 0


def _quantize(args: argparse.Namespace) -> int:
    dtype = _DTYPES[args.dtype] if args.dtype else None
    folder = quantize_checkpoint(args.source, args.target, args.bits, args.group, dtype)
    weights = folder / "model.safetensors"
    print(f"{weights}: {weights.stat().st_size / 1e9:.2f} GB", file=sys.stderr)
    return 0


def _info(args: argparse.Namespace) -> int:
    lines = {
        "mistral_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor_name(),
        "instruction set": f"{ops.active_isa()} (of {', '.join(ops.supported_isas())})",
        "threads": str(torch.get_num_threads()),
        "demo model": str(DEMO_MODEL),
    }
    if _C.cuda_architectures is None:
        lines["CUDA"] = "not in this build (no nvcc was found, or MISTRAL_EXT_CUDA=off)"
    else:
        lines["CUDA"] = f"built for {_C.cuda_architectures}"
        devices, problem = _C.cuda_devices()
        lines["CUDA devices"] = "; ".join(map(_describe, devices)) or f"none ({problem})"
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    return 0


def _describe(device: dict) -> str:
    major, minor = device["capability"]
    return (
        f"{device['name']} (sm_{major}{minor}, {device['multiprocessors']} multiprocessors, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB)"
    )


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise ValueError("a prompt and --file were given, expected one of them")
    if args.prompt not in (None, "-"):
        return args.prompt
    if args.file is None and args.prompt is None and sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, with --file, or on stdin")
    # Editors and echo end a text with a newline that nobody means as part of a prompt.
    return _read_text(args.file or "-").removesuffix("\n")


def _read_text(file: str) -> str:
    """The text of a file; of stdin, if it is called '-'."""
    if file == "-":
        return decode_text(sys.stdin.buffer.read(), "stdin")
    return read_text_file(file)


def _load(args: argparse.Namespace) -> Mistral:
    overrides = {}
    if args.sliding_window is not None:
        overrides["sliding_window"] = args.sliding_window or None
    if args.rope_theta is not None:
        overrides["rope_theta"] = args.rope_theta
    if args.max_positions is not None:
        overrides["max_positions"] = args.max_positions
    return Mistral.from_pretrained(
        args.model or DEMO_MODEL,
        device=args.device,
        dtype=_DTYPES[args.dtype] if args.dtype else None,
        prefill_chunk=args.prefill_chunk,
        quantize=args.quantize,
        **overrides,
    )


def _sampling_options(args: argparse.Namespace) -> dict[str, object]:
    options = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(SamplingParams)
    }
    options["logit_bias"] = dict(args.logit_bias)
    return options


def _token_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=X, e.g. 1234=-5.0") from None


def _report(llm: Mistral, completion: Completion) -> None:
    _print_timing(completion)
    if completion.logprobs is not None:
        _print_logprobs(llm, completion)


def _print_timing(completion: Completion) -> None:
    timing = completion.timing
    line = (
        f"[prompt {timing.prompt_tokens} tokens, {timing.prompt_rate:.1f} tokens/s; "
        f"completion {len(completion.token_ids)} tokens"
    )
    if timing.decode_tokens:
        line += f", {timing.decode_rate:.1f} tokens/s"
    print(f"{line}; {completion.finish_reason}]", file=sys.stderr)


def _print_logprobs(llm: Mistral, completion: Completion) -> None:
    def show(token_id: int, logprob: float) -> str:
        text = llm.tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")
        return f"{text!r} {logprob:.3f}"

    for token in completion.logprobs:
        others = "  ".join(show(i, logprob) for i, logprob in token.top.items())
        print(f"{show(token.token_id, token.logprob):24} {others}".rstrip(), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviated options, and reports wrong usage in one line."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mistral-ext", description="Run Mistral 7B models.")
    parser.add_argument("--version", action="version", version=f"mistral-ext {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, metavar="N", help="threads to use")
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        parents=[common, _model_options(), _sampling_option_group()],
        help="complete a prompt",
        description="Complete a prompt; the completion streams to stdout.",
    )
    generate.add_argument("prompt", nargs="?", help="the prompt; '-' or none: read it from stdin")
    generate.add_argument(
        "--file", metavar="PATH", help="read the prompt, but for a last newline, from a file"
    )
    generate.add_argument("--echo", action="store_true", help="print the prompt, too")
    generate.add_argument("--json", action="store_true", help="print a JSON object per completion")
    generate.add_argument("--n", type=int, default=1, help="number of completions")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat",
        parents=[common, _model_options(), _sampling_option_group()],
        help="talk to an Instruct model",
        description="Talk to an Instruct model, a line a message. The cache is kept between turns.",
    )
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument(
        "--template",
        choices=("v1", "v2", "v3"),
        help="one of Mistral's chat templates; default: the model's own",
    )
    chat.set_defaults(run=_chat, n=1)

    measure = commands.add_parser(
        "perplexity",
        parents=[common, _model_options()],
        help="measure how well a model predicts a text",
        description="Print the perplexity of texts: each token is predicted from all before it "
        "that the model's window lets it see. A longer text than a model without a window knows "
        "positions is cut into segments of that length.",
    )
    measure.add_argument(
        "--file",
        metavar="PATH",
        action="append",
        required=True,
        help="the text, '-' for stdin; may be repeated, each is a text of its own",
    )
    measure.add_argument("--max-tokens", type=int, metavar="N", help="the first N of each text")
    measure.add_argument("--json", action="store_true", help="print a JSON object")
    measure.set_defaults(run=_perplexity)

    quantize = commands.add_parser(
        "quantize",
        parents=[common],
        help="write a model with weights in 8 or 4 bits",
        description="Write a model folder with weights in 8 or 4 bits, which loads without the "
        "original. It is there when it is complete; an interrupted run leaves nothing.",
    )
    quantize.add_argument("source", metavar="IN", help="model folder or hub id")
    quantize.add_argument("target", metavar="OUT", help="folder to make")
    quantize.add_argument("--bits", type=int, choices=(8, 4), required=True)
    quantize.add_argument(
        "--group", type=int, choices=GROUPS, help="weights that share a scale, for 4 bits"
    )
    quantize.add_argument(
        "--dtype", choices=_DTYPES, help="of embeddings and norms; default: as stored"
    )
    quantize.set_defaults(run=_quantize)

    info = commands.add_parser(
        "info", parents=[common], help="show the version, the instruction set and the devices"
    )
    info.set_defaults(run=_info)
    return parser


def _model_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="PATH_OR_ID", help="folder or hub id; default: the demo")
    group.add_argument("--device", metavar="DEVICE", help="cpu (default) or cuda")
    group.add_argument("--dtype", choices=_DTYPES, help="default: as stored")
    group.add_argument(
        "--quantize", choices=("int8", "int4"), help="round the weights while they are read"
    )
    group.add_argument(
        "--sliding-window", type=int, metavar="W", help="override the config; 0: no window"
    )
    group.add_argument("--rope-theta", type=float, metavar="BASE", help="override the config")
    group.add_argument("--max-positions", type=int, metavar="N", help="override the config")
    group.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens in one pass"
    )
    return parser


def _sampling_option_group() -> argparse.ArgumentParser:
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
    ):
        default = getattr(SamplingParams, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
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
    return parser
