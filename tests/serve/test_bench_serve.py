"""bench/serve.py, on a server that runs already."""

from __future__ import annotations

import argparse
import asyncio
import os

import pytest
import serve
from serve_load import Call, Target, closed_loop, percentiles, poisson, summary
from serve_soak import soak


def test_loads_of_all_kinds(demo, capsys):
    args = argparse.Namespace(
        clients=[1, 3], rates=[20], requests=6, prompt=5, tokens=4, long_prompt=200
    )
    args.most_first = args.most_gap = 100
    server = Target(demo.url, serve.ENDLESS), os.getpid()
    found = asyncio.run(serve.measure(args, {"first": server, "second": server}))
    rows = found["first"]
    assert len(found["second"]) == len(rows)
    assert [row["load"] for row in rows] == [
        "1 clients",
        "3 clients",
        "20 requests/s",
        "long prompt",
    ]
    for row in rows[:3]:
        assert (row["requests"], row["failed"], row["errors"]) == (6, 0, [])
        assert 0 < row["gap"]["p50"] <= row["gap"]["p99"]
        assert row["first"]["p50"] > 0
        assert row["tokens"] == 24
        assert row["tokens_per_second"] / row["good_per_second"] == pytest.approx(4)
    assert sum(row["processor_seconds"] for row in rows[:3]) > 0  # of this process: its clients
    assert rows[3]["p99_gap_beside"] > 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["first", "second"] * 4


def test_the_command_of_a_peer(tmp_path, monkeypatch):
    args = argparse.Namespace(gguf="m.gguf", model=None, options="", peer=[], peers="llama.cpp")
    args.max_batch, args.context, args.threads = 4, 512, 2
    args.llama_server = str(tmp_path / "llama-server")
    with pytest.raises(SystemExit, match="llama-server, expected a program"):
        serve.commands(args)
    (tmp_path / "llama-server").touch(0o755)
    found = serve.commands(args)
    assert [command[command.index("--port") + 1] for command in found.values()] == ["{port}"] * 2
    command = " ".join(found["llama.cpp"])
    assert command.startswith(f"{tmp_path}/llama-server -m m.gguf ")
    assert "-c 2048 -np 4 -t 2" in command
    assert "--threads 2" in " ".join(found[serve.OURS])
    args.threads = None  # each server's default
    found = serve.commands(args)
    assert "-t" not in found["llama.cpp"]
    assert "--threads" not in found[serve.OURS]
    args.gguf = None
    with pytest.raises(SystemExit, match="needs --gguf FILE"):
        serve.commands(args)


def test_soak_finds_no_fault_here(demo):
    result = asyncio.run(soak(demo.url, 120, lambda: 1.0))
    assert sum(result["outcomes"].values()) == 120
    assert result["outcomes"]["done"] > 40
    assert result["slots_lost"] == 0


def test_soak_finds_faults(demo):
    with pytest.raises(RuntimeError, match="status 404"):
        asyncio.run(soak(f"{demo.url}/nowhere", 20, lambda: 1.0))


def test_a_call_that_fails_counts_as_such():
    good, late, bad = Call(0.0, [1.0, 1.5, 2.0], 3), Call(0.0, [3.0], 1), Call(0.0, error="no")
    row = summary([good, late, bad], seconds=2, most_first=2, most_gap=1)
    assert (row["requests"], row["failed"], row["errors"]) == (3, 1, ["no"])
    assert (row["tokens_per_second"], row["good_per_second"]) == (2, 0.5)
    assert row["gap"]["p50"] == 0.5


def test_percentiles():
    assert percentiles([]) == {}
    assert percentiles([3.0]) == {"p50": 3, "p90": 3, "p99": 3}
    assert percentiles(range(101))["p50"] == pytest.approx(50, abs=1)


def test_loads_ask_as_often_as_they_say():
    async def all_kinds():
        running, most = 0, 0

        async def ask(number: int) -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            return number

        closed = await closed_loop(3, 20, ask)
        return sorted(closed), most, await poisson(1000, 20, ask)

    closed, most, opened = asyncio.run(all_kinds())
    assert closed == opened == list(range(20))
    assert most == 3
