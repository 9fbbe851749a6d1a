"""`mistral-ext serve`: serve a model over HTTP, with OpenAI's API."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from mistral_ext.cli import options, serve_ray
from mistral_ext.cli.extras import expect_extra
from mistral_ext.cli.options import load_model
from mistral_ext.cli.start import start
from mistral_ext.engine.params import MOST_DRAFTS, expect_drafts
from mistral_ext.files import read_text_file
from mistral_ext.serve.settings import (
    KEY_VARIABLE,
    TEMPLATES,
    expect_own_names,
    keys_of_environment,
    settings_for,
    texts_of,
)


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
        choices=TEMPLATES,
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
        help=f"clients need it; may be repeated; better: the variable {KEY_VARIABLE}",
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
    serve_ray.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    expect_extra("server", "starlette", "uvicorn", "prometheus_client")
    if args.drafts is not None:
        expect_drafts(args.drafts)
    settings = settings_for(
        args.model,
        model_name=args.served_model_name,
        host=args.host,
        port=args.port,
        template=args.template,
        adapter_updates=args.adapter_updates,
        max_tokens=args.max_tokens,
        max_queue=args.max_queue,
        max_unread=args.max_unread,
        max_body=args.max_body,
        request_seconds=args.request_seconds,
        ping_seconds=args.ping_seconds,
        drain_seconds=args.drain_seconds,
        api_keys=_api_keys(args),
        moderate=None if args.moderate is None else texts_of("moderate", args.moderate),
        cors_origins=tuple(args.cors_origin),
        log_requests=None if args.log_requests is None else Path(args.log_requests),
    )
    expect_own_names(settings.model_name, [name for name, _ in args.adapter])
    serve_ray.check(args)
    start(args)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("mistral_ext").setLevel(logging.INFO)
    if args.ray:
        return serve_ray.run(args, settings)

    from mistral_ext.serve.server import Server

    with Server(settings) as server:
        more = {"max_batch": args.max_batch, "drafts": args.drafts}
        more["draft_model"] = args.draft_model
        return server.run(load_model(args, adapters=dict(args.adapter), **more))


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = list(args.api_key)
    if args.api_key_file is not None:
        lines = read_text_file(args.api_key_file).splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{args.api_key_file} has no key, expected a key a line")
        keys += found
    return (*keys, *keys_of_environment())
