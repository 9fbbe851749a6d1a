"""Runs the stages of a plan: lanes side by side, a log for each step, and an end for what takes too
long. After every step, and every few seconds, report.json and logs.tar.gz are written anew."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import plan, report

ROOT = Path(__file__).parents[2]
GRACE = 3  # seconds from asking a process to end to ending it, within the limit of its step
SAVED_EVERY = 5  # seconds

ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'bench'}", "PYTHONUNBUFFERED": "1"}


class Running:
    """A step under way."""

    def __init__(self, step: plan.Step, limit: float, work: Path) -> None:
        self.step, self.limit = step, limit
        self.log = work / f"{step.name}.log"
        self._begin = time.monotonic()
        self._asked = self._killed = False
        command = [part.replace("{work}", str(work)) for part in step.command]
        with open(self.log, "wb") as log:
            try:
                self._process: subprocess.Popen | None = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=os.environ | ENVIRONMENT | dict(step.environment),
                    preexec_fn=os.setpgrp,  # a group, which ends as one
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                self._process = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def ended(self) -> bool:
        """Whether the step has ended. If its time is up, this ends it."""
        if self._process is None or self._process.poll() is not None:
            return True
        if self.seconds > self.limit and not self._killed:
            self._killed = True
            self._signal(signal.SIGKILL)
        elif self.seconds > self.limit - GRACE and not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)
        # A process that survives its signals is left behind: the others have limits of their own.
        return self._killed and self.seconds > self.limit + 1

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def result(self) -> dict[str, Any]:
        status = self._process.poll() if self._process is not None else 127
        if self._asked:
            word = "too long"
        elif status == 0:
            word = "ok"
        elif self.step.impossible and self.step.impossible in self.log.read_text(errors="replace"):
            word = "impossible"
        else:
            word = "failed"
        return entry(self.step, word, self.seconds, report.summary(self.log), exit=status)


def entry(step: plan.Step, status: str, seconds: float, text: str, **more: Any) -> dict[str, Any]:
    found = {"name": step.name, "status": status, "seconds": round(seconds, 1)}
    return found | {"limit": step.limit, "summary": text, **more}


class Check:
    """One command.

    Args:
        command: the command, "first" or "second".
        stages: the plan of the command.
        out: the folder for report.json and logs.tar.gz.
        work: an empty folder for logs and figures.
        facts: facts for `Step.needs`, besides those that machine.py finds out.
        patience: a factor of all limits, for a machine whose speed is not the point.
    """

    def __init__(
        self,
        command: str,
        stages: Sequence[plan.Stage],
        out: Path,
        work: Path,
        facts: dict[str, Any],
        patience: int = 1,
    ) -> None:
        self._patience = patience
        self._stages, self._out, self._work, self._facts = list(stages), out, work, facts
        self._begin = self._saved = time.monotonic()
        self._limit = plan.LIMITS[command]
        now = datetime.datetime.now(datetime.timezone.utc)
        self._head = {"command": command, "date": now.isoformat(timespec="seconds")}
        self._results: list[dict[str, Any]] = []
        self._running: dict[int, Running] = {}  # lane -> its step under way

    def run(self) -> int:
        """Runs all steps. Returns 1 if a step failed, took too long, or could not run at all, else
        0."""
        try:
            for i, stage in enumerate(self._stages):
                self._run_stage(stage, self._scale(self._stages[i:]))
        finally:  # an interrupt, too
            for running in self._running.values():
                running.kill()
                self._note(entry(running.step, "broken off", running.seconds, ""))
            self._running = {}
            known = {result["name"] for result in self._results}
            for step in (step for stage in self._stages for lane in stage for step in lane):
                if step.name not in known:
                    self._note(entry(step, "not run", 0, "the command was broken off"))
            self._save()
        healthy = ("ok", "left out", "impossible")
        return int(any(result["status"] not in healthy for result in self._results))

    def _scale(self, left: Sequence[plan.Stage]) -> float:
        """The factor for limits: below 1 if something outside the plan has taken time."""
        planned = sum(map(plan.seconds_of, left))
        passed = (time.monotonic() - self._begin) / self._patience
        remaining = max(self._limit - plan.RESERVE - passed, 0)
        return min(1.0, remaining / planned) if planned else 1.0

    def _run_stage(self, stage: plan.Stage, scale: float) -> None:
        lanes = [deque(lane) for lane in stage]
        while any(lanes) or self._running:
            for i, lane in enumerate(lanes):
                while lane and i not in self._running:
                    self._start(i, lane.popleft(), scale)
            for i, running in list(self._running.items()):
                if running.ended():
                    del self._running[i]
                    self._note(running.result())
                    self._learn()
                    self._save()
            if time.monotonic() - self._saved > SAVED_EVERY:
                self._save()
            time.sleep(0.05)

    def _start(self, lane: int, step: plan.Step, scale: float) -> None:
        missing = [need for need in step.needs if not self._facts.get(need)]
        if missing:
            self._note(entry(step, "left out", 0, f"{', '.join(missing)}: no"))
        elif self._facts.get("device") is False:
            self._note(entry(step, "not run", 0, "there is no CUDA device"))
        elif self._facts.get("unbuilt") and not step.only_if_needed:
            self._note(entry(step, "not run", 0, "the extension cannot be imported"))
        else:
            limit = step.limit if step.only_if_needed else step.limit * scale
            self._running[lane] = Running(step, limit * self._patience, self._work)

    def _note(self, result: dict[str, Any]) -> None:
        self._results.append(result)
        print(
            f"{result['name']:16} {result['status']:10} {result['seconds']:6.1f} of at most "
            f"{result['limit']:3} s  {result['summary'][:100]}",
            flush=True,
        )

    def _learn(self) -> None:
        path = self._work / plan.MACHINE
        if path.exists():
            self._facts |= json.loads(path.read_text())

    def _save(self) -> None:
        seconds = round(time.monotonic() - self._begin, 1)
        under_way = [
            entry(running.step, "running", running.seconds, "")
            for running in self._running.values()
        ]
        head = self._head | {"seconds": seconds, "limit": self._limit}
        report.save(self._out, self._work, head, [*self._results, *under_way])
        self._saved = time.monotonic()
