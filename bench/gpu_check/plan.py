"""The two commands: their steps, in stages whose lanes run side by side, and the limits of all.

First what is quick and tells most: whether each op and a small model are right at all, the tests,
and the figures that matter most. Then, in a second command, what has failed, again, and all other
figures. What has not run on hardware before (kernels that overlap, the attention of sm_90a) is
apart from the rest, in processes of its own; and nothing else runs while something is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LIMITS = {"first": 270, "second": 330}  # seconds of a command
RESERVE = 10  # of them: to start, to stop and to write

# Where steps find the machine's facts, and the tests that failed in the command before.
MACHINE, AGAIN = "machine.json", "again-{}.txt"

_PYTHON = sys.executable
_OVERLAP = {"MISTRAL_EXT_OVERLAP": "1"}
_SM90 = {"MISTRAL_EXT_ATTENTION": "sm90"}


@dataclass(frozen=True)
class Step:
    """One process, its log in NAME.log and its figures, if it has any, in NAME.json.

    Attributes:
        limit: the seconds after which the step is stopped.
        command: the command. {work} in it stands for the folder of logs and figures.
        environment: environment variables that are set for this step alone.
        needs: facts of machine.py. The step is left out unless all of them are true.
        impossible: a text in the log that shows that this machine cannot run the tool. That is no
            failure.
        only_if_needed: whether the step has no share of the plan's time. If it runs, all later
            limits shrink by the same factor.
    """

    name: str
    limit: int
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()
    impossible: str | None = None
    only_if_needed: bool = False

    @property
    def tests(self) -> bool:
        """Whether the step runs pytest and leaves NAME.tests."""
        return "gpu_check.run_tests" in self.command


Stage = Sequence[Sequence[Step]]  # lanes, one after the other in each


def seconds_of(stage: Stage) -> int:
    return max(sum(step.limit for step in lane if not step.only_if_needed) for lane in stage)


def total(stages: Sequence[Stage]) -> int:
    """The longest time that the stages may take, with the reserve."""
    return RESERVE + sum(map(seconds_of, stages))


def check(command: str, stages: Sequence[Stage]) -> None:
    """Raises ValueError if the limits add up to more than a command may take."""
    if total(stages) > LIMITS[command]:
        raise ValueError(
            f"the steps of {command!r} may take {total(stages)} s, "
            f"expected {LIMITS[command]} or less"
        )


def stages(command: str, build: Path | None = None) -> list[Stage]:
    """The stages of the command "first" or "second". `build` is a folder with the built extension,
    if there is one."""
    planned = [*_ready(build), *(_first() if command == "first" else _second())]
    check(command, planned)
    return planned


def _ready(build: Path | None) -> list[Stage]:
    facts = (_PYTHON, "-m", "gpu_check.machine", f"{{work}}/{MACHINE}")
    found = ("--build", str(build)) if build else ()
    return [
        [[Step("machine", 25, (*facts, *found))]],
        [[Step("build", 140, (*facts, "--compile"), needs=("unbuilt",), only_if_needed=True)]],
    ]


def _pytest(
    name: str,
    limit: int,
    processes: int,
    *arguments: str,
    only: str | None = None,
    environment: Mapping[str, str] = {},
    needs: Sequence[str] = (),
) -> Step:
    command = [_PYTHON, "-m", "gpu_check.run_tests", f"{{work}}/{name}.tests"]
    command += ["--processes", str(processes), "--limit", "40"]
    command += ["--only", f"{{work}}/{only}"] if only else []
    return Step(name, limit, (*command, "--", "-m", "cuda", *arguments), environment, needs)


def _bench(
    name: str,
    limit: int,
    script: str,
    *arguments: str,
    environment: Mapping[str, str] = {},
    needs: Sequence[str] = (),
) -> Step:
    command = (_PYTHON, f"bench/{script}", *arguments, "--json", f"{{work}}/{name}.json")
    return Step(name, limit, command, environment, needs)


def _sanitizer(tool: str, limit: int) -> Step:
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=mistral"]
    command += ["--report-api-errors", "no", "--error-exitcode", "1"]
    return Step(
        tool,
        limit,
        (*command, _PYTHON, "bench/sanitizer_subset.py"),
        # Without torch's cache every tensor is an allocation of its own, whose bounds are checked.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        needs=("sanitizer",),
        impossible="Device not supported",
    )


_WHOLE = ("tests/cuda/test_cuda.py", "tests/engine/test_whole_model.py")
# Where the tests marked cuda are. To collect the others takes longer than to run many of these.
MARKED = (*_WHOLE, "tests/integrations/test_transformers_cuda.py", "tests/ops")
_ATTENTION = ("tests/ops/test_attention_cuda.py", "tests/ops/test_attention_sm90.py")


def _first() -> list[Stage]:
    canary, own = "canary_cuda.py", ("--models", "bf16")
    return [
        [[_bench("canary", 35, canary)]],
        [
            [_pytest("tests", 115, 8, *MARKED, "-k", "not sm90 and not overlapping")],
            [_sanitizer("memcheck", 55), _sanitizer("racecheck", 60)],
            [
                _pytest("overlap_tests", 70, 2, *_WHOLE, "-k", "not sm90", environment=_OVERLAP),
                _bench("overlap_canary", 45, canary, *own, environment=_OVERLAP),
            ],
            [
                _pytest("sm90_tests", 70, 2, *_ATTENTION, "-k", "sm90", needs=("sm90",)),
                _bench("sm90_canary", 45, canary, *own, environment=_SM90, needs=("sm90",)),
            ],
        ],
        [[_bench("decode", 25, "decode_cuda.py", "--weights", "bf16", "--peers", "none")]],
        [[_bench("prompt", 20, "prefill_cuda.py", "--attention", "sm80")]],
        [[_bench("prompt_sm90", 20, "prefill_cuda.py", needs=("sm90",))]],
        [[_overlapping_decode(20, "--weights", "bf16")]],
    ]


def _overlapping_decode(limit: int, *arguments: str) -> Step:
    given = (*arguments, "--peers", "none")
    return _bench("overlap_decode", limit, "decode_cuda.py", *given, environment=_OVERLAP)


def _second() -> list[Stage]:
    def again(name: str, environment: Mapping[str, str] = {}) -> Step:
        only = AGAIN.format(name)
        needs = (f"{name}_failed",)
        return _pytest(
            f"{name}_again", 40, 4, *MARKED, only=only, environment=environment, needs=needs
        )

    attention = ("--device", "cuda", "--only", "attention sm90", "--no-compile")
    return [
        [[again("tests")], [again("overlap_tests", _OVERLAP)], [again("sm90_tests")]],
        [[_bench("decode", 60, "decode_cuda.py", "--peers", "torch")]],
        [[_bench("ops", 70, "ops.py", "--device", "cuda", "--no-compile")]],
        [[_bench("attention", 30, "ops.py", *attention, needs=("sm90",))]],
        [[_overlapping_decode(40)]],
        [
            [
                _bench(
                    "compiled",
                    55,
                    "decode_cuda.py",
                    *("--weights", "none", "--peers", "transformers"),
                    needs=("transformers",),
                )
            ]
        ],
    ]
