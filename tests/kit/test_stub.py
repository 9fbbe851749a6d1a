"""mistral_ext/_C.pyi says what the compiled module has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mistral_ext
from mistral_ext import _C

PACKAGE = Path(mistral_ext.__file__).parent
STUB = (PACKAGE / "_C.pyi").read_text()
# A build without CUDA lacks what stands below this line.
OF_CUDA = STUB.index("# In a build with CUDA only.")


def stubbed() -> dict[str, ast.stmt]:
    """What the stub says of this build; private names are its own."""
    source = STUB if _C.cuda_architectures else STUB[:OF_CUDA]
    names: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            names[node.target.id] = node
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
    return {name: node for name, node in names.items() if not name.startswith("_")}


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


def parameters_of_docstring(function: object) -> list[str]:
    """pybind11 writes them there: "f(x: object, y: int) -> None"."""
    signature = re.match(r"\w+\((.*)\) -> ", function.__doc__.strip())[1]
    return re.findall(r"(?:^|, )(\w+)(?=: |,|$)", re.sub(r"\[[^\]]*\]", "", signature))


def test_names():
    assert stubbed().keys() == {name for name in vars(_C) if not name.startswith("_")}


def test_parameters():
    checked = 0
    for name, node in stubbed().items():
        if isinstance(node, ast.FunctionDef):
            assert parameters(node) == parameters_of_docstring(getattr(_C, name)), name
            checked += 1
    assert checked > 10


def test_members_of_classes():
    classes = [node for node in stubbed().values() if isinstance(node, ast.ClassDef)]
    assert classes
    for node in classes:
        members = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
        actual = vars(getattr(_C, node.name))
        assert members == {name for name in actual if not name.startswith("_")}
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and not member.decorator_list:
                assert parameters(member) == parameters_of_docstring(actual[member.name])


def test_all_names_of_cuda():
    """They are compared with the sources, which a build without CUDA leaves out."""
    stub = {node.name for node in ast.parse(STUB).body if isinstance(node, ast.FunctionDef)}
    bound: set[str] = set()
    for file in (Path(__file__).parents[2] / "python").glob("*.cpp"):
        bound |= set(re.findall(r'm\.def\(\s*"(\w+)"', file.read_text()))
    assert stub == bound
