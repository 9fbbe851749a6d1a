"""What a run of the tests has left out on this machine, by what it would take."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable
from typing import NoReturn

import pytest

from mistral_ext import ops

# The instruction sets of csrc/cpu/isa.h, and what a processor needs to run each.
X86_SETS = {
    "scalar": "nothing",
    "avx2": "AVX2, FMA and F16C",
    "avxvnni": "AVX-VNNI",
    "avx512": "AVX-512 F, BW, DQ and VL",
    "avx512_bf16": "AVX-512 with bf16 and VNNI",
    "amx": "AMX with bf16, or leave to use it",
}
AARCH64_SETS = {
    "scalar": "nothing",
    "neon": "nothing",
    "neon_dotprod": "dot products",
    "neon_bf16": "dot products and bf16",
    "neon_i8mm": "dot products, bf16 and i8mm",
}
INSTRUCTION_SETS = AARCH64_SETS if platform.machine() in ("aarch64", "arm64") else X86_SETS


def isa_parameters() -> list:
    """All instruction sets, as parameters of a fixture; those that this processor lacks are skipped
    and so counted."""
    supported = ops.supported_isas()
    return [
        pytest.param(
            isa,
            marks=pytest.mark.skipif(
                isa not in supported,
                reason=f"CPU kernels for {isa}, which a build holds: this processor lacks {needs}",
            ),
        )
        for isa, needs in INSTRUCTION_SETS.items()
    ]


def skip_or_fail(problem: str, variable: str) -> NoReturn:
    """Skips the test. If the environment variable is 1, as in CI, nothing may be missing: the test
    fails."""
    if os.environ.get(variable) == "1":
        pytest.fail(problem)
    pytest.skip(problem)


def by_reason(reports: Iterable[pytest.TestReport]) -> list[str]:
    """A line for each reason why tests were skipped, with their number; of a reason of several
    lines the first."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ").partition("\n")[0] for report in reports
    )
    return [f"{count:5} tests  {reason}" for reason, count in reasons.most_common()]
