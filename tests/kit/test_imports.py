"""Who may import whom inside mistral_ext: downward only, no circles, extras where they are used."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mistral_ext

PACKAGE = Path(mistral_ext.__file__).parent

_MODELS = {"model", "weights", "engine", "text", "ops"}

# A room (a folder or file of the package) -> what it may import of the others; a dotted name
# allows that module alone. "" is mistral_ext/__init__.py, the front door.
MAY_IMPORT = {
    "ops": {"_C"},
    "files": set(),
    "control_groups": set(),
    "text": {"files"},
    "model": {"ops"},
    "weights": {"ops", "model.config", "model.rope", "files"},
    "engine": {"model", "text", "ops", "control_groups"},
    "chat": {"engine", "text"},
    "vocabulary": {"model.config", "text"},
    "request_maker": {"vocabulary"} | _MODELS,
    "llm": {"chat", "request_maker", "vocabulary"} | _MODELS,
    "serve": {"llm", "files", ""} | _MODELS - {"model"},
    "finetune": {"llm", "files"} | _MODELS - {"engine"},
    "evaluate": {"llm", "files"} | _MODELS,
    "bench": {"llm", "files", ""} | _MODELS,
    "integrations": {"llm"} | _MODELS,
    "": {"chat", "llm"} | _MODELS,
    "demo": set(),
}
UNBOUND = {"cli"}  # imports everything

# Installed with the package, so they may be imported anywhere. What only an extra brings, as
# starlette or ray, is imported in the function that needs it.
DEPENDENCIES = {"torch", "numpy", "tqdm", "sentencepiece", "tokenizers", "mistral_common"}
DEPENDENCIES |= {"huggingface_hub", "jinja2"}

# Imports that break the rules today: (module, what it imports) -> why.
TO_BE_MENDED: dict[tuple[str, str], str] = {}


class Import(NamedTuple):
    module: str  # that imports, without "mistral_ext."
    target: str  # what it imports: a module, or a name of one
    is_ours: bool
    when_loaded: bool  # not in a function, nor for type checkers only
    line: str  # for messages


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str, tree: ast.AST, file: Path) -> Iterator[Import]:
    """All imports of a module, wherever they stand."""

    def visit(node: ast.AST, when_loaded: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            line = f"{file}:{getattr(child, 'lineno', 0)}"
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{line}: a relative import, expected the full name"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            for name in names:
                ours = name == "mistral_ext" or name.startswith("mistral_ext.")
                target = name.removeprefix("mistral_ext").removeprefix(".") if ours else name
                yield Import(module, target, ours, when_loaded, line)
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from visit(child, when_loaded and not later and not types_only)

    yield from visit(tree, when_loaded=True)


def all_imports() -> list[Import]:
    return [
        found
        for module, file in MODULES.items()
        for found in imports_of(module, ast.parse(file.read_text()), file)
    ]


def known_module(target: str) -> str:
    """Of "a.b.name", the module that it is or that holds it."""
    while target and target not in MODULES and target != "_C":
        target = target.rpartition(".")[0]
    return target


def is_allowed(module: str, target: str) -> bool:
    room, target_room = module.partition(".")[0], target.partition(".")[0]
    if room == target_room or room in UNBOUND:
        return True
    return any(target == name or target.startswith(f"{name}.") for name in MAY_IMPORT[room])


def forbidden() -> dict[tuple[str, str], str]:
    """(module, what it imports against the rules) -> where."""
    return {
        (found.module, known_module(found.target)): found.line
        for found in all_imports()
        if found.is_ours and not is_allowed(found.module, known_module(found.target))
    }


def test_every_room_has_a_rule():
    rooms = {module.partition(".")[0] for module in MODULES}
    assert not rooms - UNBOUND - MAY_IMPORT.keys()


def test_imports_go_downward():
    found = forbidden()
    new = {broken: line for broken, line in found.items() if broken not in TO_BE_MENDED}
    assert not new
    assert not TO_BE_MENDED.keys() - found.keys(), "mended: take these off the list"


def test_the_rules_themselves_have_no_circle():
    """From each room to itself, over what it may import."""
    reach = {room: {name.partition(".")[0] for name in names} for room, names in MAY_IMPORT.items()}
    for _ in reach:
        for room, names in reach.items():
            reach[room] = names.union(*(reach.get(name, set()) for name in names))
    assert not [room for room, names in reach.items() if room in names]


def test_no_circle_of_modules():
    """Not even one that only type checkers or functions close."""
    edges = {module: set() for module in MODULES}
    for found in all_imports():
        target = known_module(found.target)
        if found.is_ours and target in MODULES and (found.module, target) not in TO_BE_MENDED:
            edges[found.module].add(target)
    while leaves := [module for module, targets in edges.items() if not targets & edges.keys()]:
        for module in leaves:
            del edges[module]
    assert not edges, "these import each other, in a circle or above one"


def test_extras_are_imported_where_they_are_used():
    allowed = DEPENDENCIES | sys.stdlib_module_names
    eager = [
        found
        for found in all_imports()
        if found.when_loaded and not found.is_ours and found.target.partition(".")[0] not in allowed
    ]
    assert not eager


@pytest.mark.parametrize(
    ("module", "code", "target", "when_loaded"),
    [
        ("ops.linear", "from mistral_ext.model import config", "model.config", True),
        ("text.tokenizer", "import mistral_ext.engine.cache", "engine.cache", True),
        ("model.config", "def f():\n    from mistral_ext import llm", "llm", False),
        ("weights.x", "if TYPE_CHECKING:\n    from mistral_ext.engine import cache", "", False),
        ("serve.app", "class A:\n    from mistral_ext.model import config", "model.config", True),
        ("finetune.x", "try:\n    from mistral_ext import engine\nexcept: pass", "engine", True),
        ("llm", "async def f():\n    from mistral_ext.serve import app", "serve.app", False),
    ],
)
def test_every_kind_of_import_is_seen(module, code, target, when_loaded):
    (found,) = imports_of(module, ast.parse(code), Path("x.py"))
    assert found.is_ours
    assert found.when_loaded == when_loaded
    assert found.target == (target or "engine.cache")
    assert not is_allowed(module, found.target)


def test_what_the_rules_allow():
    downward = itertools.pairwise(["cli", "llm", "engine", "model", "ops", "_C"])
    assert all(is_allowed(above, below) for above, below in downward)
    assert is_allowed("weights.folder", "model.config")
    assert not is_allowed("weights.folder", "model.transformer")
    assert not is_allowed("weights.folder", "model.config_of_another")
    assert not is_allowed("engine.cache", "_C")
