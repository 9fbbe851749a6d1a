"""The end of gpu_check.sh: one JSON and one table of what its steps have found.

    python bench/gpu_report.py OUT NAME:STATUS:SECONDS ...

Writes OUT/report.json, prints the table, and exits with 1 if a step has failed. Works without
mistral_ext, whose build may be what has failed.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def versions() -> dict[str, Any]:
    """Of what the figures depend on; None where it cannot be found out."""
    torch = "import torch; print(torch.__version__, torch.version.cuda)"
    nvcc = re.search(r", (V[\d.]+)", output_of("nvcc", "--version") or "")
    return {
        "commit": output_of("git", "rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "changed": bool(output_of("git", "status", "--porcelain")),
        "python": platform.python_version(),
        "torch": output_of(sys.executable, "-c", torch),
        "nvcc": nvcc[1] if nvcc else None,
        "gpu": output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
    }


def summary(log: Path) -> str:
    """The line of a log that says most: pytest's counts or the sanitizer's, else the last one."""
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line] or [""]
    telling = [line for line in lines if re.search(r"ERROR SUMMARY|\d (passed|failed)", line)]
    return (telling or lines)[-1]


def main(out: Path, steps: list[str]) -> int:
    now = datetime.datetime.now(datetime.timezone.utc)
    report = {"date": now.isoformat(timespec="seconds")} | versions() | {"steps": {}}
    for step in steps:
        name, status, seconds = step.split(":")
        report["steps"][name] = {
            "status": int(status),
            "seconds": int(seconds),
            "summary": summary(out / f"{name}.log"),
        }
    measured = [name for name in report["steps"] if (out / f"{name}.json").exists()]
    report |= {name: json.loads((out / f"{name}.json").read_text()) for name in measured}
    unfinished = out / "report.json.part"
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(out / "report.json")

    print(f"\n=== {report['gpu']}, commit {report['commit']}, {report['date']}\n")
    for name in measured:
        print((out / f"{name}.log").read_text(errors="replace"))
    for name, step in report["steps"].items():
        status = {0: "ok", 124: "too long", 137: "too long"}.get(step["status"], "FAILED")
        print(f"{name:20}  {status:8}  {step['seconds']:4} s  {step['summary'][:90]}")
    return 1 if any(step["status"] for step in report["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
