"""Rules that the machine code of a kernel must keep. Each gives the instructions that do not."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sass import Code, Instruction, flow

# ---- wgmma: HGMMA with a last operand `gsb0` is the end of a group, wgmma.commit_group;
# WARPGROUP.ARRIVE is wgmma.fence, WARPGROUP.DEPBAR.LE gsb0, n is wgmma.wait_group n.

# The registers of d and of a, of products that belong to a group; the groups under way, the latest
# first, in which products are that no group has been made of.
Products = frozenset[tuple[int, int]]
Groups = tuple[Products, ...]

_MOST_GROUPS = 8  # that are told apart


def _products(groups: Groups, instruction: Instruction) -> Groups:
    if instruction.kind == "HGMMA":
        product = instruction.writes, instruction.reads & ~instruction.writes
        latest = groups[0] | {product}
        groups = latest, *groups[1:]
        if instruction.operands.endswith("gsb0"):
            groups = frozenset(), *groups
        return *groups[:_MOST_GROUPS], frozenset().union(*groups[_MOST_GROUPS:])
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        pending = int(instruction.operands.rpartition(",")[2], 16)
        return groups[: pending + 1]
    return groups


def _join_groups(one: Groups, other: Groups) -> Groups:
    longest = max(len(one), len(other))
    one, other = (groups + (frozenset(),) * (longest - len(groups)) for groups in (one, other))
    return tuple(a | b for a, b in zip(one, other, strict=True))


def touched_before_wait(code: Code) -> list[Instruction]:
    """Those that touch accumulators or A registers of a product between it and its wait. Further
    products may add to all of its accumulators, and use the same A."""

    def disturbs(instruction: Instruction, d: int, a: int) -> bool:
        if instruction.kind != "HGMMA":
            return bool(instruction.touches & (d | a))
        own_d, own_a = instruction.writes, instruction.reads & ~instruction.writes
        return bool(own_d & a or own_a & d or (own_d & d and own_d != d))

    reached = flow(code, (frozenset(),), _products, _join_groups)
    return [
        instruction
        for instruction, groups in reached
        if any(disturbs(instruction, d, a) for d, a in frozenset().union(*groups))
    ]


def products_without_fence(code: Code) -> list[Instruction]:
    """Products with registers that another instruction has touched since the last fence."""
    everything = (1 << 256) - 1

    def step(touched: int, instruction: Instruction) -> int:
        if instruction.opcode == "WARPGROUP.ARRIVE":
            return 0
        return touched if instruction.kind == "HGMMA" else touched | instruction.touches

    return [
        instruction
        for instruction, touched in flow(code, everything, step, int.__or__)
        if instruction.kind == "HGMMA" and instruction.touches & touched
    ]


# ---- setmaxnreg


def beyond_its_registers(code: Code, launched_with: int) -> list[Instruction]:
    """Those that touch a register that the warpgroup has given up or not been given."""

    def step(limit: int, instruction: Instruction) -> int:
        if instruction.kind != "USETMAXREG":
            return limit
        return int(instruction.operands.rpartition(" ")[2], 16)

    return [
        instruction
        for instruction, limit in flow(code, launched_with, step, min)
        if instruction.touches >> limit
    ]


# ---- Kernels that overlap: ACQBULK is griddepcontrol.wait.

# LDGSTS is cp.async, UTMALDG and the others are copies by the copy engine.
_GLOBAL = {"LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "LDGMC", "LDGSTS"}
_GLOBAL |= {"UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED"}


def reached_before_wait(code: Code) -> list[Instruction]:
    """Accesses to global memory, and ends of threads, to which a way leads without the wait."""

    def step(_: bool, instruction: Instruction) -> bool | None:
        return None if instruction.kind == "ACQBULK" else True

    reached = flow(code, True, step, bool.__and__)
    return [i for i, _ in reached if i.kind in _GLOBAL or i.kind == "EXIT"]


def constant_loads(opcodes: Iterable[str]) -> list[str]:
    """ld.global.nc: loads through a cache that does not see what is written meanwhile."""
    return [opcode for opcode in opcodes if re.match(r"LDG\b.*\.CONSTANT", opcode)]
