"""Runs pytest so that a test that crashes or hangs costs itself alone.

    python -m gpu_check.run_tests RESULTS [--processes N] [--limit SECONDS] [--only FILE]
                                  -- ARGUMENTS

With pytest-xdist in N processes, each replaced when it ends. Without it in one, and again for the
tests that are left until all have ended. RESULTS gets what gpu_check.each_test writes; the exit
status is 1 if a test has failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from gpu_check.each_test import ENDED, lines, read

FINISHED = (0, 1, 5)  # pytest's exit status: all passed, some failed, there were none


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "gpu_check.each_test"]
    command += ["-p", "no:cacheprovider", "--tb=short", "-rfE", "--durations=5"]
    command += ["--each-result", str(options.results), "--each-limit", str(options.limit)]
    if options.only:
        command += ["--each-only", str(options.only)]
    if find_spec("xdist"):
        # Processes are replaced as often as it takes.
        command += ["-n", str(options.processes), "--max-worker-restart=100000"]
    command += arguments
    ended = -1
    while True:
        status = subprocess.run(command).returncode
        before, ended = ended, _count_ended(options.results)
        exits = [line["exit"] for line in lines(options.results) if "exit" in line]
        if exits and exits[-1] == status and status in FINISHED:
            return status
        if not _note_crash(options.results) and ended == before:
            return status or 1  # it does not get any further


def _count_ended(results: Path) -> int:
    return sum(result["outcome"] in ENDED for result in read(results).values())


def _note_crash(results: Path) -> bool:
    """If a test began and did not end, writes that it has failed. Returns whether there was such a
    test."""
    begun = [test for test, result in read(results).items() if result["outcome"] == "begun"]
    with open(results, "a", encoding="utf-8") as file:
        for test in begun:
            message = "its process has ended"
            line = {"test": test, "outcome": "failed", "seconds": None, "message": message}
            file.write(json.dumps(line) + "\n")
    return bool(begun)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--limit", type=float, default=0, metavar="SECONDS", help="of a test")
    parser.add_argument("--only", type=Path, metavar="FILE", help="ids of tests, one a line")
    end = sys.argv.index("--")
    options = parser.parse_args(sys.argv[1:end])
    status = run(options, sys.argv[end + 1 :])
    results = read(options.results)
    counts = Counter(result["outcome"] for result in results.values())
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if counts["failed"] else 0 if status in FINISHED else status


if __name__ == "__main__":
    sys.exit(main())
