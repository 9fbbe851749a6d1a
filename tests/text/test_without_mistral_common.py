"""Without mistral-common, which is for chat templates, all else works and tests are collected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = "import sys; sys.modules['mistral_common'] = None\n"  # as if it were not installed


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + program], capture_output=True, text=True, cwd=ROOT
    )


def test_a_checkout_that_is_not_installed_has_a_version():
    program = """
import importlib.metadata
found = importlib.metadata.version
def version(name):
    if name == "mistral_ext":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
import mistral_ext
print(mistral_ext.__version__)
"""
    result = run(program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().count(".") == 2


def test_generates_text_and_tokens():
    program = """
import mistral_ext
print(repr(mistral_ext.generate("Once upon a time", max_tokens=4)))
llm = mistral_ext.Mistral.from_pretrained(mistral_ext.llm.DEMO_MODEL)
print(len(llm.generate([[1, 20, 30]], max_tokens=3, ignore_eos=True)[0].token_ids))
"""
    result = run(program)
    assert result.returncode == 0, result.stderr
    text, count = result.stdout.splitlines()
    assert len(text) > 4
    assert count == "3"


def test_every_test_file_is_collected():
    """Files of tests that need it as a whole are skipped, and nothing fails."""
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    result = run(f"import pytest; sys.exit(pytest.main({arguments}))")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "tests/engine/test_generation.py: " in result.stdout
    assert "tests/text/test_tokenizer.py: " not in result.stdout
