"""Machine code as nvdisasm prints it: instructions, the registers that they touch, and the ways
that control may take through a kernel."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import kernel_report


@dataclass(frozen=True)
class Instruction:
    address: int
    condition: str  # @!P0, or empty
    opcode: str  # LDG.E.128
    operands: str
    # Registers R0, R1, ... as bits from the lowest on. Of a call they mean nothing: nvdisasm takes
    # it to touch all that a function may by convention.
    reads: int
    writes: int

    @property
    def kind(self) -> str:
        """LDG of LDG.E.128"""
        return self.opcode.partition(".")[0]

    @property
    def touches(self) -> int:
        return 0 if self.kind == "CALL" else self.reads | self.writes

    def __str__(self) -> str:
        return f"{self.address:#x}: {self.condition} {self.opcode} {self.operands}"


@dataclass(frozen=True)
class Code:
    """A kernel with the functions that it calls."""

    instructions: list[Instruction]
    labels: dict[str, int]  # to the index of the instruction that follows


# The last lines of a kernel are alike:
#         /*0070*/         @!P1 BRA `(.L_x_1) ;          // |   9 ::^^v:   | 2  :v  |
_SECTION = re.compile(r"\.text\.(\w+):$")
_LABEL = re.compile(r"([.$\w]+):$")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
# A count of those that are in use, then a character for each: ^ is written, v read, x both.
_REGISTERS = re.compile(r"\| *\d+ ([ :^vx]*)")


def disassemble(cubin: Path, nvdisasm: str, *options: str) -> dict[str, str]:
    """The text of each kernel: {"swiglu_kernel<bf16, 8>": ...}"""
    result = subprocess.run([nvdisasm, "-c", *options, cubin], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{nvdisasm}, {cubin.name}:\n{result.stderr}")
    found: dict[str, list[str]] = {}
    for line in result.stdout.splitlines():
        if section := _SECTION.match(line.partition("//")[0].rstrip()):
            kernel = found[section[1]] = []
        elif found:
            kernel.append(line)
    names = kernel_report.readable(list(found))
    return dict(zip(names, map("\n".join, found.values()), strict=True))


def opcodes(text: str) -> Counter[str]:
    """How often a kernel has each instruction: {"LDG.E.128": 2, ...}"""
    return Counter(match[3] for match in map(_INSTRUCTION.match, text.splitlines()) if match)


def parse(text: str) -> Code:
    """Registers are those of the option `-lrm narrow`; without it there are none."""
    instructions, labels = [], {}
    for line in text.splitlines():
        code, _, registers = line.partition("//")
        if label := _LABEL.match(code.rstrip()):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(code):
            address, condition, opcode, operands = match.groups()
            columns = _REGISTERS.search(registers)
            marks = columns[1] if columns else ""
            instruction = Instruction(
                int(address, 16),
                (condition or "").strip(),
                opcode,
                operands.strip(),
                reads=sum(1 << i for i, mark in enumerate(marks) if mark in "vx"),
                writes=sum(1 << i for i, mark in enumerate(marks) if mark in "^x"),
            )
            instructions.append(instruction)
    return Code(instructions, labels)


# An instruction's index, and those to which the functions around it return.
Place = tuple[int, tuple[int, ...]]
State = TypeVar("State")


def _successors(code: Code, place: Place) -> list[Place]:
    index, returns = place
    instruction = code.instructions[index]
    kind, operands = instruction.kind, instruction.operands
    following = [(index + 1, returns)]
    target = re.search(r"`\((.*)\)", operands)
    conditional = following if instruction.condition else []
    if kind == "BRA" and target:
        # Some conditions are operands: BRA.U UP0, `(.L_x_1)
        if not operands.startswith("`"):
            conditional = following
        return [(code.labels[target[1]], returns), *conditional]
    if kind == "CALL" and target:
        return [(code.labels[target[1]], (index + 1, *returns)), *conditional]
    if kind == "RET" and returns:
        return [(returns[0], returns[1:]), *conditional]
    if kind == "EXIT":
        return conditional
    # BSYNC goes on right after itself: the label that its BSSY names is there.
    if kind in ("BRA", "BRX", "BRXU", "CALL", "JMP", "JMX", "JMXU", "RET", "RPCMOV"):
        raise ValueError(f"{instruction}: where it goes is not known")
    return following


def flow(
    code: Code,
    start: State,
    step: Callable[[State, Instruction], State | None],
    join: Callable[[State, State], State],
) -> list[tuple[Instruction, State]]:
    """Each instruction that can be reached, with what is known before it, whichever way led there.

    `step` says what is known after an instruction, and None where nothing beyond is of interest;
    `join` what is known where two ways meet. An instruction of a function comes up once for each
    call.
    """
    states: dict[Place, State] = {(0, ()): start}
    work: list[Place] = [(0, ())]
    while work:
        place = work.pop()
        before, instruction = states[place], code.instructions[place[0]]
        after = step(before, instruction)
        if instruction.condition:  # it may not be executed
            after = before if after is None else join(before, after)
        elif after is None:
            continue
        for following in _successors(code, place):
            known = states.get(following)
            joined = after if known is None else join(known, after)
            if joined != known:
                states[following] = joined
                work.append(following)
    return [(code.instructions[index], state) for (index, _), state in states.items()]
