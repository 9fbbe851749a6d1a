"""What developers work with: the same tools in every place, and no prints in the library."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import mistral_ext

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(mistral_ext.__file__).parent
DOCS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md"))


def test_hooks_have_the_versions_of_ci():
    def pins(file: str) -> dict[str, str]:
        return dict(re.findall(r"\b(ruff|clang-format)==([\d.]+\d)", (ROOT / file).read_text()))

    assert pins(".pre-commit-config.yaml") == pins(".ci/run")
    assert len(pins(".ci/run")) == 2


def test_contributors_install_what_the_build_requires():
    """With bounds: a new environment of Python 3.11 has an older setuptools, which pip keeps."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (line,) = re.findall(r"^pip install (.*pybind11.*)$", text, re.MULTILINE)
    assert shlex.split(line) == needs


def test_only_the_command_line_prints():
    """The rest logs, under the name mistral_ext, so that a program can direct it."""
    for file in PACKAGE.rglob("*.py"):
        if "cli" in file.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS])
def test_documents_name_what_exists(file):
    text = (ROOT / file).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / file).parent / link).exists(), link
    # Files in backticks are named from the root, or by the end of their path.
    folders = [ROOT / folder for folder in ("mistral_ext", "csrc", "python", "bench", "tests")]
    for name in re.findall(r"`([\w./]+\.(?:py|pyi|h|cuh|cpp|cu|sh))`", text):
        found = (ROOT / name).exists() or any(any(folder.rglob(name)) for folder in folders)
        assert found, name
