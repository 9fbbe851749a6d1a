"""How many files name a format of weights: few, so that a format is easily added."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TABLE = (ROOT / "csrc" / "formats.h").read_text()
NAMES = re.findall(r'^    \{"(\w+)", "', _TABLE, re.MULTILINE)  # all but plain
# CONTRIBUTING.md lists most of them under "Adding a format of weights".
MOST = 14
# Files that only instantiate kernels, so that formats compile in parallel.
INSTANCES = "csrc/cuda/linear/gemv_*.cu"
NOT_MEANT = "mistral_ext/bench/peaks.py"  # "int8" is an arithmetic there


def names_in_cpp(text: str) -> bool:
    """Whether code, not a comment, names a format."""
    code = re.sub(r"//.*", "", text)
    return re.search(rf"WeightFormat::({'|'.join(NAMES)})\b", code) is not None


def names_in_python(text: str) -> bool:
    """Whether a string that is no docstring is the name of a format."""
    tree = ast.parse(text)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return any(
        isinstance(node, ast.Constant) and node.value in NAMES and id(node) not in docs
        for node in ast.walk(tree)
    )


def test_few_files_name_a_format():
    assert len(NAMES) > 10
    naming = []
    for folder in ("csrc", "python", "mistral_ext"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in {".h", ".cpp", ".cuh", ".cu", ".py"}:
                continue
            if path.match(INSTANCES) or path.match(NOT_MEANT):
                continue
            names = names_in_python if path.suffix == ".py" else names_in_cpp
            if names(path.read_text()):
                naming.append(str(path.relative_to(ROOT)))
    assert "csrc/cuda/linear/formats.cuh" in naming
    assert "mistral_ext/ops/dequantize.py" in naming
    assert len(naming) <= MOST, naming
