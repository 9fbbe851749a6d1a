"""Servers in processes of their own, as users run them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
from children import child

CLI = (sys.executable, "-m", "mistral_ext.cli", "serve")


class Server:
    """A server that runs.

    Attributes:
        url: its address.
        http: a client that speaks to it.
        lines: of its stderr, so far.
    """

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.lines: list[str] = []
        self._has_begun = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._has_begun.wait(250)
        pattern = r"serving \S+ at (http://\S+)"
        (address,) = (m for line in self.lines if (m := re.search(pattern, line)))
        self.url = address[1]
        self.http = httpx.Client(base_url=self.url, timeout=200)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if "serving" in line:
                self._has_begun.set()
        self._has_begun.set()

    def client(self, kind=openai.OpenAI, **options):
        """OpenAI's client of this server."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 200, **options}
        return kind(base_url=f"{self.url}/v1", **options)

    def post(self, path: str, body) -> httpx.Response:
        # In ASCII, as lone surrogates have no other form.
        headers = {"content-type": "application/json"}
        return self.http.post(path, content=json.dumps(body), headers=headers)

    def chat(self, text: str = "Once upon a time", **fields) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return self.post("/v1/chat/completions", body)

    def metric(self, name: str, **labels: str) -> float:
        """A figure of /metrics, summed over the labels that are not given."""
        text = self.http.get("/metrics").text
        total = 0.0
        for found in re.finditer(rf"^mistral_ext_{name}(\{{.*?\}})? (\S+)$", text, re.M):
            if all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    @property
    def load(self) -> tuple[float, float]:
        """Completions that run, and that wait."""
        return self.metric("num_requests_running"), self.metric("num_requests_waiting")

    def wait_for_load(self, running: int, waiting: int = 0) -> None:
        """Waits until so many completions run and wait."""
        wait_until(lambda: self.load == (running, waiting))

    def next_line(self, seen: int, words: str) -> str:
        """The first line with these words after so many lines, once it has come: it is written when
        the answer is on its way already."""
        wait_until(lambda: any(words in line for line in self.lines[seen:]))
        return next(line for line in self.lines[seen:] if words in line)

    def end(self) -> None:
        self.http.close()
        self.process.kill()
        self._reader.join()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it, and returns its status."""
        self.process.send_signal(number)
        return self.process.wait(60)


def wait_until(condition, seconds: float = 0.02) -> None:
    """Returns when the condition holds; the limit of the test is the limit of the wait.

    Args:
        condition: a function, which is asked again and again.
        seconds: between two times.
    """
    while not condition():
        time.sleep(seconds)


@contextmanager
def serving(*args: str, command=CLI, **options) -> Iterator[Server]:
    """Runs a server for the time of the block."""
    command = [*command, "--port", "0", "--threads", "1", *args]
    with child(command, seconds=900, stderr=subprocess.PIPE, text=True, **options) as process:
        server = Server(process)
        try:
            yield server
        finally:
            server.end()
