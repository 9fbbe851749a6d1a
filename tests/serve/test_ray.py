"""The server as replicas on a Ray cluster. One cluster serves all tests; the last of them ends
it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from servers import serving, wait_until
from test_cancelling import LONG, ONCE, hanging_request

from mistral_ext.llm import DEMO_MODEL

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")

# Between two times that replicas are asked who they are: requests take time of the processor from
# replicas that start.
PAUSE = 1.0

EXAMPLE = Path(__file__).parents[2] / "examples/ray_batch.py"


@pytest.fixture(scope="module")
def cluster():
    """Two replicas of two slots and a place in the queue, on a cluster of this machine with cores
    for two more, which the example uses."""
    options = ("--ray", "--replicas", "2,4", "--max-batch", "2", "--max-queue", "1")
    environment = {**os.environ, "RAY_agent_register_timeout_ms": "200000"}  # of a busy machine
    environment.pop("RAY_ADDRESS", None)
    with serving(*options, "--ping-seconds", "0.2", env=environment) as server:
        yield server


def replicas_that_answer(cluster, **body) -> set[str]:
    """The names of the replicas behind a few answers."""
    answers = [cluster.chat(max_tokens=1, **body) for _ in range(6)]
    return {answer.headers["x-replica"] for answer in answers if answer.is_success}


def processes(cluster) -> dict[str, int]:
    """The process of each replica that has answered."""
    pattern = r"pid=(\d+)\)\S* (\w+) \S+ /v1/"
    found = (re.search(pattern, line) for line in cluster.lines)
    return {match[2]: int(match[1]) for match in found if match}


def test_replicas_share_requests(cluster):
    wait_until(lambda: len(replicas_that_answer(cluster)) == 2, PAUSE)
    answers = [cluster.chat(max_tokens=8, seed=1) for _ in range(4)]
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1
    assert all("," not in answer.headers["x-request-id"] for answer in answers)
    wrong = cluster.chat(max_tokens=0)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")
    assert cluster.http.get("/health").json() == {"status": "ok"}
    assert cluster.http.get("/").text.startswith("<!doctype html>")


def test_streams_come_through(cluster):
    client = cluster.client()
    options = {"model": "demo", "messages": ONCE, "max_tokens": 20, "seed": 1}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stream = client.chat.completions.create(**options, stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(parts) > 10
    assert "".join(parts) == whole
    with client.chat.completions.create(**options, stream=True, extra_body=LONG) as endless:
        assert next(iter(endless)).choices


def test_requests_beyond_the_queue_are_refused_and_a_disconnect_makes_room(cluster):
    seen = len(cluster.lines)
    with ExitStack() as connections:
        while replicas_that_answer(cluster):  # a request may meet the replica that is full
            connections.enter_context(hanging_request(cluster, **LONG, n=3, stream=True))
        refused = cluster.chat(max_tokens=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
    wait_until(lambda: len(replicas_that_answer(cluster, n=3)) == 2)
    wait_until(lambda: sum("499 disconnected" in line for line in cluster.lines[seen:]) >= 2)


class Stream(threading.Thread):
    """A client that reads a stream of 400 tokens, and comes again while there is no room."""

    def __init__(self, cluster) -> None:
        super().__init__()
        self.replica = None
        self.text = ""
        self._cluster = cluster
        self.start()

    def run(self) -> None:
        with suppress(httpx.HTTPError):
            while not self.text:
                self._read()

    def _read(self) -> None:
        body = {"messages": ONCE, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with self._cluster.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 200:
                self.replica = response.headers["x-replica"]
                for line in response.iter_lines():
                    self.text += line


def test_a_replica_that_dies_costs_its_own_requests_at_most(cluster):
    wait_until(lambda: len(replicas_that_answer(cluster) & processes(cluster).keys()) == 2)
    streams = [Stream(cluster) for _ in range(4)]  # a replica has room for three
    wait_until(lambda: all(stream.replica for stream in streams))
    killed, survivor = {stream.replica for stream in streams}
    os.kill(processes(cluster)[killed], signal.SIGKILL)
    wait_until(lambda: cluster.chat(max_tokens=1).is_success)
    for stream in streams:
        stream.join()
        is_whole = stream.text.endswith("data: [DONE]") and '"error"' not in stream.text
        assert is_whole == (stream.replica == survivor)
    wait_until(lambda: replicas_that_answer(cluster) - {killed, survivor}, PAUSE)  # in its place


def test_batches_on_the_cluster(cluster, tmp_path):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts = [f"The {animal} said" for animal in ("wolf", "fox", "bear")]
    source.write_text(
        "".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in enumerate(prompts))
    )
    (line,) = (line for line in cluster.lines if "RAY_ADDRESS=" in line)
    environment = {**os.environ, **dict(re.findall(r"(RAY_\w+)=(\S+)", line))}
    command = [sys.executable, str(EXAMPLE), str(source), str(target), str(DEMO_MODEL)]
    subprocess.run(command, env=environment, check=True, timeout=250)
    lines = [line for file in target.iterdir() for line in file.read_text().splitlines()]
    found = sorted((json.loads(line) for line in lines), key=lambda record: record["id"])
    assert [record["prompt"] for record in found] == prompts
    assert all(len(record["completion"]) > 20 for record in found)


def test_sigterm_lets_requests_finish(cluster):
    stream = Stream(cluster)
    wait_until(lambda: stream.replica)
    assert cluster.stop() == 0
    stream.join()
    assert stream.text.endswith("data: [DONE]")
