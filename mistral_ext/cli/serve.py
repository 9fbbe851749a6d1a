"""`mistral-ext serve`: serve a model over HTTP, with OpenAI's API."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from mistral_ext.cli import options
from mistral_ext.cli.extras import expect_extra
from mistral_ext.cli.options import load_model
from mistral_ext.cli.start import start
from mistral_ext.engine.params import MOST_DRAFTS, expect_drafts
from mistral_ext.files import read_text_file

_KEY_VARIABLE = "MISTRAL_EXT_API_KEY"
_DEMO_NAME = "demo"
_DEMO_TOKENS = 256  # default length of a reply: the demo model's tales have no end


def add_to(commands: options.Commands) -> None:
    parser = commands.add_parser(
        "serve",
        parents=[options.common(), options.model(), options.draft_model()],
        help="serve a model over HTTP, with OpenAI's API",
        description="Serve a model over HTTP, with OpenAI's API and a page to chat. "
        "SIGTERM and Ctrl-C let requests finish; a second one does not.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="port (default 8000; 0: any)")
    group.add_argument("--served-model-name", metavar="NAME", help="default: as --model is given")
    options.add_adapter(
        group,
        "LoRA adapter, served as the model NAME; may be repeated",
        action="append",
        default=[],
    )
    group.add_argument(
        "--adapter-updates",
        action="store_true",
        help="clients may load and unload adapters, from any path that the server can read",
    )
    group.add_argument(
        "--template",
        choices=("v1", "v2", "v3", "plain"),
        help="chat template; plain: messages as one text, for base models and by default the demo",
    )
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="of a reply, if the request says none"
    )
    group.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="completions at a time (default 8)"
    )
    group.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="completions that may wait (64)"
    )
    group.add_argument(
        "--drafts",
        type=int,
        metavar="N",
        help=f"tokens to guess at a time, which changes the speed alone (default {MOST_DRAFTS}; on "
        "CUDA 0)",
    )
    group.add_argument(
        "--max-body", type=int, default=4 * 2**20, metavar="BYTES", help="of a request (4 MiB)"
    )
    group.add_argument(
        "--max-unread",
        type=int,
        default=1024,
        metavar="N",
        help="tokens that a client may leave unread before its request ends (1024)",
    )
    for name, default, text in (
        ("--request-seconds", 600.0, "that a request may take"),
        ("--ping-seconds", 10.0, "of silence, after which a stream gets a comment"),
        ("--drain-seconds", 30.0, "that requests get to finish at the end"),
    ):
        group.add_argument(
            name, type=float, default=default, metavar="S", help=f"seconds {text} ({default:g})"
        )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"clients need it; may be repeated; better: the variable {_KEY_VARIABLE}",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="the same, a key a line")
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may call the server, as https://example.org; may be repeated",
    )
    group.add_argument(
        "--moderate",
        metavar="input,output",
        help="have the model refuse prompts, or replies, that it takes for harmful",
    )
    group.add_argument(
        "--log-requests", metavar="FILE", help="write requests and answers to FILE, as JSON lines"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    expect_extra("server", "starlette", "uvicorn", "prometheus_client")
    _check(args)
    keys = _api_keys(args)
    start(args)

    from mistral_ext.serve.server import Server
    from mistral_ext.serve.settings import Settings

    is_demo = args.model is None
    settings = Settings(
        model_name=_model_name(args),
        host=args.host,
        port=args.port,
        template=args.template or ("plain" if is_demo else None),
        adapter_updates=args.adapter_updates,
        max_tokens=args.max_tokens or (_DEMO_TOKENS if is_demo else None),
        max_queue=args.max_queue,
        max_unread=args.max_unread,
        body_bytes=args.max_body,
        request_seconds=args.request_seconds,
        ping_seconds=args.ping_seconds,
        drain_seconds=args.drain_seconds,
        api_keys=keys,
        moderate=_moderated(args.moderate),
        cors_origins=tuple(args.cors_origin),
        log_requests=Path(args.log_requests) if args.log_requests else None,
    )
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("mistral_ext").setLevel(logging.INFO)
    with Server(settings) as server:
        more = {"max_batch": args.max_batch, "drafts": args.drafts}
        more["draft_model"] = args.draft_model
        return server.run(load_model(args, adapters=dict(args.adapter), **more))


def _model_name(args: argparse.Namespace) -> str:
    return args.served_model_name or args.model or _DEMO_NAME


def _check(args: argparse.Namespace) -> None:
    if args.drafts is not None:
        expect_drafts(args.drafts)
    for name, least in (("max_queue", 0), ("max_unread", 2), ("max_body", 1), ("max_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {least} or more")
    for name in ("request_seconds", "ping_seconds", "drain_seconds"):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value:g}, expected a number above 0")
    names = [_model_name(args), *(name for name, _ in args.adapter)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--adapter has the name {name!r}, expected one that no model has")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port is {args.port}, expected 0 to 65535")


def _moderated(given: str | None) -> tuple[str, ...]:
    names = tuple(given.split(",")) if given else ()
    if not {*names} <= {"input", "output"}:
        raise ValueError(f"--moderate is {given!r}, expected input, output or input,output")
    return names


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = list(args.api_key)
    if args.api_key_file:
        lines = read_text_file(args.api_key_file).splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{args.api_key_file} has no key, expected a key a line")
        keys += found
    if _KEY_VARIABLE in os.environ:
        keys.append(os.environ[_KEY_VARIABLE])
    if not all(key and key.isascii() and key.isprintable() for key in keys):
        raise ValueError("an API key is empty or not printable ASCII, expected text for a header")
    return tuple(keys)
