"""Ring arithmetic lives in csrc/ring.h alone: CONTRIBUTING.md."""

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
_ARITHMETIC = re.compile(r"[-+*%]=? *(\w+(\.|->))*\w*window_?\b|\b\w*window_? *[-+*%](?!>)")


def test_no_other_file_computes_with_the_window():
    found = {}
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            code = re.sub(r"//.*", "", path.read_text())
            if lines := [line.strip() for line in code.splitlines() if _ARITHMETIC.search(line)]:
                found[path.relative_to(CSRC).as_posix()] = lines
    assert found.pop("ring.h"), "the pattern finds nothing where the arithmetic is"
    assert not found
