"""What a command has found: report.json and logs.tar.gz, written anew while it runs; and the
results of several commands as one file."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import each_test

REPORT, LOGS = "report.json", "logs.tar.gz"
_KEPT = 2**20  # bytes of the beginning and of the end of a log


def write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def summary(log: Path) -> str:
    """The line of a log that says most: the counts of tests or of the sanitizer, else the last
    line."""
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line] or [""]
    telling = [line for line in lines if re.search(r"ERROR SUMMARY|\d (passed|failed)\b", line)]
    return (telling or lines)[-1][:200]


def tests_of(results: Path) -> dict[str, Any]:
    """The counts of results, and the tests that failed, with their messages. Tests that began and
    did not end count as failed."""
    found = each_test.read(results)
    failed = {
        test: result["message"] if result["outcome"] == "failed" else "it has not ended"
        for test, result in found.items()
        if result["outcome"] in ("failed", "begun")
    }
    return {**Counter(result["outcome"] for result in found.values()), "failures": failed}


def archive(work: Path) -> bytes:
    """An archive of all files of a folder. Long files are stored without their middle."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=4) as tar:
        for path in sorted(work.iterdir()):
            content = path.read_bytes()
            if len(content) > 2 * _KEPT:
                content = content[:_KEPT] + b"\n[...]\n" + content[-_KEPT:]
            entry = tarfile.TarInfo(path.name)
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def save(out: Path, work: Path, head: dict[str, Any], steps: Sequence[dict[str, Any]]) -> None:
    """Writes report.json and logs.tar.gz with what is known so far."""
    report = {**head, "machine": {}, "steps": list(steps), "tests": {}, "measured": {}}
    for path in sorted(work.iterdir()):
        if path.suffix == ".tests":
            report["tests"][path.stem] = tests_of(path)
        elif path.suffix == ".json":
            name = "machine" if path.stem == "machine" else "measured"
            content = json.loads(path.read_text())
            if name == "machine":
                report[name] = content
            else:
                report[name][path.stem] = content
    write_json(out / REPORT, report)
    write(out / LOGS, archive(work))


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of one GPU, as bench/results keeps them: the last result of each step, with the
    command and the commit that it comes from.

    Raises:
        ValueError: the reports are of different GPUs.
    """
    gpus = sorted({report["machine"].get("gpu", "none") for report in reports})
    if len(gpus) != 1:
        raise ValueError(f"the reports are of {', '.join(gpus)}, expected one GPU")
    result: dict[str, Any] = {"gpu": gpus[0], "runs": [], "tests": {}, "measured": {}}
    for run, report in enumerate(sorted(reports, key=lambda report: report["date"])):
        machine = report["machine"]
        result["runs"].append(
            {key: report[key] for key in ("command", "date", "seconds")}
            | {key: machine.get(key) for key in ("commit", "changed", "torch", "nvcc", "driver")}
            | {"steps": {step["name"]: step["status"] for step in report["steps"]}}
        )
        for kind in ("tests", "measured"):
            for name, value in report[kind].items():
                result[kind][name] = {"run": run, **value}
    return result
