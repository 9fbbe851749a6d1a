"""Choosing the instruction set and the precision of products, in calls and in the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from skipped import AARCH64_SETS, X86_SETS

from mistral_ext import _C, ops


def run(code: str, isa: str = "", exact: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MISTRAL_EXT_ISA": isa, "MISTRAL_EXT_EXACT": exact}
    # The compiled module alone, so that a child takes milliseconds: it needs no torch to load.
    code = f"import sys; sys.path.insert(0, {str(Path(_C.__file__).parent)!r}); import _C\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", ops.supported_isas())
def test_environment_variable(name):
    child = run("print(_C.active_isa())", name)
    assert (child.returncode, child.stdout) == (0, f"{name}\n"), child.stderr


def test_empty_environment_variable_means_the_fastest():
    child = run("print(_C.active_isa())", "")
    assert child.stdout == f"{ops.supported_isas()[-1]}\n", child.stderr


# Two rows by two threads: a task must not throw.
GREEDY_SAMPLE = """
import torch
options = torch.tensor([[0, 0, 1, 0, 1, 0, 0]] * 2, dtype=torch.float64)
noise, history = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int32)
rows, memory = torch.arange(2), torch.zeros(1024, dtype=torch.uint8)
call = _C.sample(torch.ones(2, 9), rows, options, noise, history, None, rows.clone())
call.run(memory.data_ptr(), 0, 2)
"""


@pytest.mark.parametrize(
    "use",
    [
        "_C.active_isa()",
        "import torch; x = torch.ones(1, 1); _C.swiglu(x, x, x, 1)",
        GREEDY_SAMPLE,
    ],
)
def test_unknown_environment_variable(use):
    child = run(use, "sse9")
    assert child.returncode == 1
    assert child.stderr.strip().endswith(
        "ValueError: environment variable MISTRAL_EXT_ISA: instruction set is 'sse9', expected "
        f"one that this processor runs: {', '.join(ops.supported_isas())}"
    )


def test_select_isa(isa):
    assert ops.active_isa() == isa
    with pytest.raises(ValueError, match=r"instruction set is 'AVX2', expected one that"):
        ops.select_isa("AVX2")
    assert ops.active_isa() == isa
    assert ops.supported_isas()[0] == "scalar"


@pytest.mark.parametrize(("setting", "exact"), [("1", "True"), ("0", "False"), ("", "False")])
def test_the_environment_asks_for_exact_products(setting, exact):
    child = run("print(_C.exact_products())", exact=setting)
    assert child.stdout == f"{exact}\n", child.stderr


def test_no_instruction_set_is_left_out_silently():
    """Tests of those that this processor lacks are skipped, and counted."""
    header = Path(__file__).parents[2] / "csrc" / "cpu" / "isa.h"
    names = re.findall(r"\bF\((\w+)\)", header.read_text())
    assert list(X86_SETS | AARCH64_SETS) == names
