"""A pytest plugin: a line on disk for each test as it begins and ends, a time limit for each, and a
choice of tests by a list.

    pytest -p gpu_check.each_test --each-result FILE [--each-limit SECONDS] [--each-only FILE]

A line is {"test": id, "outcome": "begun", "passed", "failed" or "skipped", "seconds", "message"};
the last is {"exit": status}. Tests that have ended according to FILE are left out: pytest called
again goes on. A test that reaches the limit ends its process, because a kernel that hangs cannot be
interrupted: with pytest-xdist another process takes over, else the caller has to call again.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ENDED = ("passed", "failed", "skipped")


def pytest_addoption(parser):
    parser.addoption("--each-result", type=Path, metavar="FILE", required=True)
    parser.addoption("--each-limit", type=float, default=0, metavar="SECONDS")
    parser.addoption("--each-only", type=Path, metavar="FILE", help="ids of tests, one a line")


def pytest_configure(config):
    config.pluginmanager.register(_Limit(config.getoption("--each-limit")))
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Results(config.getoption("--each-result")))


def pytest_collection_modifyitems(config, items):
    ended = set()
    if not hasattr(config, "workerinput"):  # all processes of pytest-xdist have to find the same
        results = read(config.getoption("--each-result"))
        ended = {test for test, result in results.items() if result["outcome"] in ENDED}
    only = config.getoption("--each-only")
    wanted = None if only is None else set(only.read_text(encoding="utf-8").splitlines())
    items[:] = [
        item
        for item in items
        if item.nodeid not in ended and (wanted is None or item.nodeid in wanted)
    ]


class _Limit:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if self._seconds:
            # The real stderr: pytest has put a file of its own in its place.
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


class _Results:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, **line: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_runtest_logstart(self, nodeid):
        self._write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            message = ""
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                message = (crash.message if crash else str(report.longrepr))[:500]
            self._write(
                test=report.nodeid,
                outcome=report.outcome,
                seconds=round(getattr(report, "duration", 0), 2),
                message=message,
            )

    def pytest_sessionfinish(self, exitstatus):
        self._write(exit=int(exitstatus))


def lines(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of a file of results. There are none if there is no file. An incomplete line is
    left out."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The result of each test in a file. It is the test's last result, unless an earlier one was a
    failure."""
    results: dict[str, dict[str, Any]] = {}
    for line in lines(path):
        if "test" in line:
            before = results.get(line["test"], line)
            results[line["test"]] = before if before["outcome"] == "failed" else line
    return results
