"""The command line: see bench/gpu_check.sh."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_check import plan, report
from gpu_check.runner import Check


def show(command: str, stages: list[plan.Stage]) -> None:
    """Prints the plan. What runs side by side stands on one line."""
    print(f"\n{command}: at most {plan.LIMITS[command]} s")
    begin = 0
    for stage in stages:
        lanes = [" then ".join(f"{step.name} {step.limit} s" for step in lane) for lane in stage]
        note = ""
        if any(step.only_if_needed for lane in stage for step in lane):
            note = " (only if the extension cannot be imported; later limits shrink alike)"
        print(f"  from {begin:3} s: {' | '.join(lanes)}{note}")
        begin += plan.seconds_of(stage)
    print(f"  from {begin:3} s: {plan.RESERVE} s in reserve, {plan.total(stages)} s in all")


def failed_before(path: Path, work: Path) -> dict[str, Any]:
    """Writes a list of the tests that have failed according to a report. Returns the facts that the
    list gives to the check."""
    facts = {}
    for name, tests in json.loads(path.read_text())["tests"].items():
        if tests["failures"]:
            only = work / plan.AGAIN.format(name)
            only.write_text("\n".join(tests["failures"]) + "\n")
            facts[f"{name}_failed"] = True
    return facts


def run(
    command: str, stages: list[plan.Stage], out: Path, after: Path | None, patience: int = 1
) -> int:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        work = Path(folder)
        facts = failed_before(after, work) if after else {}
        show(command, stages)
        status = Check(command, stages, out, work, facts, patience).run()
    print(f"{out / report.REPORT} has all that was found, {out / report.LOGS} the logs")
    return status


def stand_in(step: plan.Step) -> plan.Step:
    """The same step without a GPU: tests are skipped, and scripts run at small shapes on the
    CPU."""
    command = list(step.command)
    if step.name == "machine":
        command.append("--stand-in")
    elif step.tests:
        command[command.index("--processes") + 1] = "1"
    elif not step.only_if_needed:
        script = next(i for i, part in enumerate(command) if part.startswith("bench/"))
        command = [sys.executable, "-m", "gpu_check.stand_in", *command[script:]]
    # Side by side on a few cores, threads would wait for each other.
    environment = {**step.environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return dataclasses.replace(step, command=command, environment=environment)


def dry_run(out: Path) -> int:
    status, after = 0, None
    for command in plan.LIMITS:
        stages = [
            [[stand_in(step) for step in lane] for lane in stage] for stage in plan.stages(command)
        ]
        status |= run(command, stages, out / command, after, patience=20)
        after = out / command / report.REPORT
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh")
    parser.add_argument("--dry-run", type=Path, metavar="OUT", help="both, without a GPU")
    commands = parser.add_subparsers(dest="command")
    for command, limit in plan.LIMITS.items():
        given = commands.add_parser(command, help=f"at most {limit} s")
        given.add_argument("out", type=Path, metavar="OUT", help="a folder for what is found")
        given.add_argument("--build", type=Path, metavar="FOLDER", help="the built extension")
        if command == "second":
            given.add_argument(
                "--after",
                type=Path,
                metavar="REPORT",
                help="report.json of the first: tests that"
                " failed run again (default: that in OUT, if there is one)",
            )
    given = commands.add_parser("merge", help="reports into a file such as bench/results/h200.json")
    given.add_argument("file", type=Path, metavar="FILE")
    given.add_argument("reports", type=Path, metavar="REPORT", nargs="+")
    options = parser.parse_args()

    if (options.dry_run is None) == (options.command is None):
        parser.error("expected first, second, merge or --dry-run OUT")
    # As an interrupt does, a request to end stops the steps and writes down what is known.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if options.dry_run is not None:
        return dry_run(options.dry_run.resolve())
    if options.command == "merge":
        reports = [json.loads(path.read_text()) for path in options.reports]
        try:
            report.write_json(options.file, report.merged(reports))
        except ValueError as error:
            parser.error(str(error))
        return 0
    after = getattr(options, "after", None)
    if after is None and options.command == "second" and (options.out / report.REPORT).exists():
        after = options.out / report.REPORT
    stages = plan.stages(options.command, options.build and options.build.resolve())
    return run(options.command, stages, options.out.resolve(), after)


if __name__ == "__main__":
    sys.exit(main())
