"""What `import mistral_ext` gives, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mistral_ext


def test_import_needs_no_torch():
    script = (
        "import sys, mistral_ext; dir(mistral_ext); mistral_ext.SamplingParams(top_p=0.5);"
        "mistral_ext.__version__; assert not {'torch', 'numpy', 'mistral_common'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_public_names_come_when_first_used():
    script = """
import mistral_ext
for name in mistral_ext.__all__:
    assert name in dir(mistral_ext)
    value = getattr(mistral_ext, name)
    assert vars(mistral_ext)[name] is value
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_unknown_names():
    assert not hasattr(mistral_ext, "no_such_name")
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from mistral_ext import no_such_name")


def test_a_package_that_is_not_built_says_so(tmp_path):
    """As in a source tree that was built for another version of Python."""
    package = tmp_path / "mistral_ext"
    package.mkdir()
    for file in Path(mistral_ext.__file__).parent.iterdir():
        if not file.name.startswith("_C."):
            (package / file.name).symlink_to(file)
    for script in ("import mistral_ext.ops", "from mistral_ext import _C"):
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        error = result.stderr.splitlines()[-1]
        assert error.startswith(f"ImportError: {package} has no _C.")
        assert "run 'pip install .' in the source tree" in error


def test_type_checkers_see_what_python_gives():
    source = Path(mistral_ext.__file__).read_text()
    (shown,) = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    names = {
        alias.name: node.module
        for node in shown.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    modules = dict.fromkeys(mistral_ext._MODULES, "mistral_ext")
    homes = {name: f"mistral_ext.{home}" for name, home in mistral_ext._HOMES.items()}
    assert names == modules | homes
    assert {*names} - {"llm"} == {*mistral_ext.__all__} - {"__version__"}
