"""Load on the server, which runs in a process of its own, and on others with the same weights.

    python bench/serve.py                             # the demo model
    python bench/serve.py --model FOLDER --tokens 64
    python bench/serve.py --gguf FILE --peers llama.cpp --llama-server build/bin/llama-server
    python bench/serve.py --soak 10000

For each number of clients, and each rate of a Poisson process, a line: tokens per second, requests
per second that meet the limits (goodput), p50/p90/p99 of the time to the first token and between
two tokens, errors, the server's resident memory, and tokens per second of its processor time,
which tells more on a busy machine, with `--threads 1`. `--long-prompt` then measures the gap
between tokens of a stream while another client's long prompt is read. Servers take turns:
each load goes to one after the other, while the others are idle. Machines are noisy: compare the
ratios of one run.
All servers run from the start, so memory must hold the models and caches of all of them at once.

`--soak N` instead sends N requests of all kinds, a third of which hang up at a random time, and
says what was not as it should be: errors, memory that grows, slots that are lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from measure import machine, print_machine, write_json
from serve_load import (
    Call,
    Target,
    closed_loop,
    complete,
    gap_beside_long_prompt,
    poisson,
    prompt,
    summary,
)
from serve_soak import soak

OURS = "mistral_ext"
LLAMA_SERVER = "llama-server"

# How requests ask servers to ignore the end of a text. The field `ignore_eos` is for us, vLLM and
# llama.cpp. For other servers the token of the end also gets a low bias.
ENDLESS = {"ignore_eos": True}
PEER_ENDLESS = {**ENDLESS, "logit_bias": {"2": -100}}


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command that starts each server, by its name. {port} in a command stands for the port."""
    model = args.gguf or args.model
    ours = [sys.executable, "-m", "mistral_ext.cli", "serve", "--port", "{port}"]
    ours += ["--max-batch", str(args.max_batch), "--max-queue", "256"]
    ours += [*threads(args, "--threads"), *shlex.split(args.options)]
    found = {OURS: [*ours, "--model", model] if model else ours}
    if args.peers == "llama.cpp":
        found["llama.cpp"] = llama_cpp(args)
    for text in args.peer:
        name, _, command = text.partition("=")
        found[name] = shlex.split(command)
    return found


def threads(args: argparse.Namespace, option: str) -> list[str]:
    """The arguments with which a server gets the number of --threads. Empty if that was not given,
    so that the server's default holds."""
    return [option, str(args.threads)] if args.threads else []


def llama_cpp(args: argparse.Namespace) -> list[str]:
    """The command of llama.cpp's server, or of llama-cpp-python's server if llama.cpp's is not
    installed."""
    if not args.gguf:
        raise SystemExit("--peers llama.cpp needs --gguf FILE, the weights that both can read")
    context = str(args.max_batch * args.context)
    program = shutil.which(args.llama_server)
    if program:
        options = ["-c", context, "-np", str(args.max_batch), *threads(args, "-t")]
        return [program, "-m", args.gguf, "--port", "{port}", *options]
    if args.llama_server != LLAMA_SERVER:
        raise SystemExit(f"--llama-server is {args.llama_server}, expected a program")
    if importlib.util.find_spec("llama_cpp"):
        module = [sys.executable, "-m", "llama_cpp.server", "--model", args.gguf]
        options = ["--n_ctx", context, *threads(args, "--n_threads")]
        return [*module, "--port", "{port}", *options]
    raise SystemExit("--peers llama.cpp: neither llama-server nor llama_cpp.server is installed")


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """Starts a server, and gives its address and process id once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [part.replace("{port}", str(port)) for part in command]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended with {process.returncode}: see {log}")
                with contextlib.suppress(httpx.HTTPError):
                    if _is_ready(url):
                        break
                time.sleep(0.2)
            yield url, process.pid
        finally:
            process.terminate()


def _is_ready(url: str) -> bool:
    """Whether a server has loaded its model; not all of them have /health."""
    return (
        httpx.get(f"{url}/v1/models").is_success and httpx.get(f"{url}/health").status_code != 503
    )


def processor_seconds(pid: int) -> float:
    """The seconds of processor time that a process has used so far, in all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """The resident memory of a process in MiB, mapped weights included."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def measure(
    args: argparse.Namespace, servers: dict[str, tuple[Target, int]]
) -> dict[str, list[dict]]:
    """Puts all loads on all servers, which take turns.

    Args:
        servers: for each server's name its address and process id.

    Returns:
        The rows of each server, a row for each load.
    """
    rows: dict[str, list[dict]] = {name: [] for name in servers}
    loads = [("clients", clients) for clients in args.clients]
    loads += [("requests/s", rate) for rate in args.rates]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def load_of(target: Target, kind: str, size: int, requests: int, first: int) -> dict:
            async def ask(number: int) -> Call:
                text = prompt(args.prompt, first + number)  # no load has prompts of another load
                return await complete(client, target, text, args.tokens)

            run, began = closed_loop if kind == "clients" else poisson, time.perf_counter()
            calls = await run(size, requests, ask)
            return summary(calls, time.perf_counter() - began, args.most_first, args.most_gap)

        for target, _ in servers.values():
            await load_of(target, "clients", 2, 4, first=0)  # warm-up
        for i, (kind, size) in enumerate(loads, 1):
            for name, (target, pid) in servers.items():
                before = processor_seconds(pid)
                row = await load_of(target, kind, size, args.requests, i * 10**6)
                row["processor_seconds"] = processor_seconds(pid) - before
                row = {"load": f"{size} {kind}", **row, "resident_mib": resident_mib(pid)}
                rows[name].append(row)
                show(name, row)
        for name, (target, _) in servers.items() if args.long_prompt else ():
            row = await gap_beside_long_prompt(client, target, args.long_prompt)
            rows[name].append({"load": "long prompt", **row})
            shown = ", ".join(f"{key} {1000 * value:.1f} ms" for key, value in row.items())
            print(f"  {name:>12} {'long prompt':>13} {shown}")
    return rows


def show(name: str, row: dict) -> None:
    """Prints the line of a server and a load."""

    def milliseconds(name: str) -> str:
        return "/".join(f"{1000 * value:.0f}" for value in row[name].values()) or "-"

    print(
        f"  {name:>12} {row['load']:>13} {row['tokens_per_second']:8.1f} tokens/s "
        f"{row['good_per_second']:6.2f} good/s  first {milliseconds('first')} ms  "
        f"gap {milliseconds('gap')} ms  {row['failed']} failed  {row['resident_mib']:.0f} MiB  "
        f"{row['tokens'] / max(row['processor_seconds'], 1e-9):.1f} tokens/processor s",
        flush=True,
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id; default: the demo model")
    parser.add_argument("--gguf", help="the same as a GGUF file, which llama.cpp reads too")
    parser.add_argument("--options", default="", help="more options of our server")
    parser.add_argument("--peers", choices=["llama.cpp"], help="other servers to measure")
    parser.add_argument(
        "--llama-server", default=LLAMA_SERVER, metavar="PATH", help="the program of llama.cpp"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another server with OpenAI's API; {port} in its command is replaced",
    )
    parser.add_argument("--clients", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--rates", type=numbers, default=[1, 2, 4], help="requests per second")
    parser.add_argument("--requests", type=int, default=48, help="of each load")
    parser.add_argument("--prompt", type=int, default=64, help="words")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a slot of a peer")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of each server; default: its own")
    parser.add_argument("--long-prompt", type=int, default=0, metavar="WORDS")
    parser.add_argument("--most-first", type=float, default=2, help="seconds, for goodput")
    parser.add_argument("--most-gap", type=float, default=0.2, help="seconds, for goodput")
    parser.add_argument("--soak", type=int, metavar="N", help="requests with random aborts")
    parser.add_argument("--log", type=Path, default=Path("/tmp"), help="folder of servers' output")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the servers would stay behind
    facts = machine()
    print_machine(facts)
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, command in commands(args).items():
            url, pid = stack.enter_context(running(command, args.log / f"serve-{name}.log"))
            servers[name] = Target(url, ENDLESS if name == OURS else PEER_ENDLESS), pid
        if args.soak:
            target, pid = servers[OURS]
            results = {OURS: asyncio.run(soak(target.url, args.soak, lambda: resident_mib(pid)))}
        else:
            results = asyncio.run(measure(args, servers))
    if args.json:
        write_json(args.json, {"machine": facts, "servers": results})


if __name__ == "__main__":
    main()
