"""MANIFEST.in: what a source distribution holds."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_holds_what_the_build_includes():
    held = (ROOT / "MANIFEST.in").read_text().split()
    included = set()
    for file in (ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir()):
        found = re.findall(r"^\s*include\((\S+/\S+)\)", file.read_text(), re.MULTILINE)
        included |= {path.split("/")[0] for path in found}
    assert included >= {"cmake", "csrc"}
    assert included <= set(held)
