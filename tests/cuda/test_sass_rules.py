"""The rules of sass_rules.py find what breaks them, in short pieces of machine code, and nothing
else."""

from __future__ import annotations

import pytest
import sass
import sass_rules


def assemble(lines):
    """Code of lines such as "@P0 FADD R2, R0, R1 ; |vv^", labels among them: as nvdisasm prints
    it, with a character for each register after the bar."""
    printed = []
    for i, line in enumerate(lines):
        code, _, marks = line.partition(" |")
        printed.append(line if line.endswith(":") else f"/*{16 * i:04x}*/ {code} // | 2 {marks} |")
    return sass.parse("\n".join(printed))


def kinds(found):
    return [instruction.kind for instruction in found]


PARSED = """\
.L_x_4:                                                   // |                  |            |
        /*0070*/              @!P1 BRA P6, `(.L_x_5) ;    // |  12 :v :         | 3  v:    v |
        /*0080*/                   IMAD.WIDE R4, R2, 0x2, R4 ; // | 103 : v xx^      | 2  ::      |
.L_x_5:                                                   // |                  |            |
        /*0090*/                   EXIT ;                 // |                  |            |
"""


def test_parses_what_nvdisasm_prints():
    code = sass.parse(PARSED)
    branch, product, end = code.instructions
    assert (branch.address, branch.condition, branch.opcode) == (0x70, "@!P1", "BRA")
    assert (branch.operands, branch.reads, branch.writes) == ("P6, `(.L_x_5)", 0b10, 0)
    assert (product.reads, product.writes) == (0b110100, 0b1110000)
    assert (end.opcode, end.touches) == ("EXIT", 0)
    assert code.labels == {".L_x_4": 0, ".L_x_5": 2}
    assert sass.opcodes(PARSED) == {"BRA": 1, "IMAD.WIDE": 1, "EXIT": 1}


@pytest.mark.parametrize(
    ("jump", "executed"),
    [
        ("NOP ;", "NOP FADD LDG EXIT"),
        ("BRA `(.L_1) ;", "BRA LDG EXIT"),
        ("@P0 BRA `(.L_1) ;", "BRA FADD LDG EXIT"),
        ("BRA.U UP0, `(.L_1) ;", "BRA FADD LDG EXIT"),
        ("@!P2 EXIT ;", "EXIT FADD LDG EXIT"),
        ("EXIT ;", "EXIT"),
        ("CALL.REL.NOINC `($f) ;", "CALL MUFU RET FADD LDG EXIT"),
    ],
)
def test_follows_control(jump, executed):
    lines = jump, "FADD ;", ".L_1:", "LDG ;", "EXIT ;", "$f:", "MUFU ;", "RET.REL R2 `(kernel) ;"
    reached = sass.flow(assemble(lines), 0, lambda state, _: state, min)
    assert sorted(kinds(i for i, _ in reached)) == sorted(executed.split())


@pytest.mark.parametrize("jump", ["BRX R2 -0x10 ;", "CALL.ABS.NOINC R2 ;", "RET.REL.NODEC R2 ;"])
def test_does_not_guess_where_control_goes(jump):
    with pytest.raises(ValueError, match="where it goes is not known"):
        sass.flow(assemble([jump]), 0, lambda state, _: state, min)


# Products have d in R0 and R1, a in R2. They are told from others by what is under way.
FIRST = "HGMMA.64x8x16.F32 R0, R2, gdesc[UR4], R0, gsb0 ; |xxv"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
END = "EXIT ;"
SKIP, TO_HERE = "@P0 BRA `(.L_1) ;", ".L_1:"
RETURN = "RET.REL.NODEC R8 `(kernel) ;"


@pytest.mark.parametrize(
    "lines",
    [
        (FIRST, WAIT, "FADD R3, R0, R1 ; |vv ^", "MOV R2, RZ ; |  ^", END),
        ("MOV R2, RZ ; |  ^", FIRST, "FADD R3, R3, R3 ; |   x", WAIT, END),
        # one more product that adds to the same, one that has others
        (FIRST, FIRST, WAIT, END),
        (FIRST, "HGMMA.64x8x16.F32 R4, R2, gdesc[UR4], R4, gsb0 ; |  v xx", WAIT, END),
        # the earlier of two groups is complete
        (
            "HGMMA.64x8x16.F32 R4, gdesc[UR4], R4, gsb0 ; |    xx",
            FIRST,
            "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
            "FADD R3, R4, R5 ; |   ^vv",
            WAIT,
            END,
        ),
        # a call is taken to touch all, but its function does not
        (FIRST, "CALL.REL.NOINC `($f) ; |^^^^", WAIT, END, "$f:", RETURN),
        # the way past the wait does not lead to the use
        (FIRST, SKIP, WAIT, "MOV R3, R1 ; | v ^", END, TO_HERE, WAIT, END),
    ],
)
def test_leaves_registers_alone_until_the_wait(lines):
    assert kinds(sass_rules.touched_before_wait(assemble(lines))) == []


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((FIRST, "MOV R3, R1 ; | v ^", WAIT, END), ["MOV"]),
        ((FIRST, "MOV R1, RZ ; | ^", WAIT, END), ["MOV"]),
        ((FIRST, "MOV R2, RZ ; |  ^", WAIT, END), ["MOV"]),
        ((FIRST, "MOV R3, R2 ; |  v^", WAIT, END), ["MOV"]),
        # the wait is for the group before
        ((FIRST, "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", "MOV R3, R1 ; | v ^", END), ["MOV"]),
        # or executed under a condition
        ((FIRST, f"@P0 {WAIT}", "MOV R3, R1 ; | v ^", END), ["MOV"]),
        # products that no group has been made of
        ((FIRST.replace(", gsb0", ""), WAIT, "MOV R3, R1 ; | v ^", END), ["MOV"]),
        # other products: of a part of the registers, of d as a, into a
        ((FIRST, "HGMMA.64x8x16.F32 R0, gdesc[UR4], RZ ; |^", WAIT, END), ["HGMMA"]),
        ((FIRST, "HGMMA.64x8x16.F32 R4, R1, gdesc[UR4], RZ ; | v  ^^", WAIT, END), ["HGMMA"]),
        ((FIRST, "HGMMA.64x8x16.F32 R2, gdesc[UR4], RZ ; |  ^^", WAIT, END), ["HGMMA"]),
        # on one of two ways
        ((SKIP, FIRST, TO_HERE, "MOV R3, R1 ; | v ^", WAIT, END), ["MOV"]),
        # by way of a loop, in which it comes first
        ((".L_1:", "MOV R3, R1 ; | v ^", FIRST, "@P0 BRA `(.L_1) ;", WAIT, END), ["MOV"]),
        # in a function
        (
            (FIRST, "CALL.REL.NOINC `($f) ;", WAIT, END, "$f:", "MOV R3, R1 ; | v ^", RETURN),
            ["MOV"],
        ),
    ],
)
def test_finds_what_touches_registers_before_the_wait(lines, found):
    assert kinds(sass_rules.touched_before_wait(assemble(lines))) == found


def test_forgets_no_group_in_a_loop_that_waits_for_none():
    other = "HGMMA.64x8x16.F32 R4, gdesc[UR4], R4, gsb0 ; |    xx"
    loop = (other, ".L_1:", *[FIRST] * 20, "@P0 BRA `(.L_1) ;", "MOV R3, R5 ; |   ^ v", END)
    assert kinds(sass_rules.touched_before_wait(assemble(loop))) == ["MOV"]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (("MOV R2, RZ ; |  ^", "WARPGROUP.ARRIVE ;", FIRST, FIRST, WAIT, END), []),
        (("WARPGROUP.ARRIVE ;", "MOV R3, RZ ; |   ^", FIRST, WAIT, END), []),
        (("WARPGROUP.ARRIVE ;", "MOV R2, RZ ; |  ^", FIRST, WAIT, END), ["HGMMA"]),
        (("WARPGROUP.ARRIVE ;", "MOV R3, R1 ; | v ^", FIRST, WAIT, END), ["HGMMA"]),
        ((FIRST, WAIT, END), ["HGMMA"]),
        (("@P0 WARPGROUP.ARRIVE ;", FIRST, WAIT, END), ["HGMMA"]),
    ],
)
def test_products_need_a_fence_after_other_uses_of_their_registers(lines, found):
    assert kinds(sass_rules.products_without_fence(assemble(lines))) == found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (("USETMAXREG.DEALLOC.CTAPOOL 0x2 ;", "MOV R1, R0 ; |v^", END), []),
        (("MOV R2, R0 ; |v ^", "USETMAXREG.DEALLOC.CTAPOOL 0x2 ;", END), []),
        (("USETMAXREG.DEALLOC.CTAPOOL 0x2 ;", "MOV R2, R0 ; |v ^", END), ["MOV"]),
        (("USETMAXREG.DEALLOC.CTAPOOL 0x2 ;", "MOV R1, R2 ; | ^v", END), ["MOV"]),
        (("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x8 ;", "MOV R7, R0 ; |v      ^", END), []),
        (("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x6 ;", "MOV R7, R0 ; |v      ^", END), ["MOV"]),
        (("MOV R7, R0 ; |v      ^", END), ["MOV"]),  # before it has been given any
        # one of two ways there gave registers up
        (
            (SKIP, "USETMAXREG.DEALLOC.CTAPOOL 0x2 ;", TO_HERE, "MOV R2, R0 ; |v ^", END),
            ["MOV"],
        ),
    ],
)
def test_finds_what_touches_registers_that_were_given_up(lines, found):
    assert kinds(sass_rules.beyond_its_registers(assemble(lines), 4)) == found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (("LDS R0, [R1] ;", "LDC R0, c[0x0][0x28] ;", "ACQBULK ;", "LDG.E R0, [R2.64] ;", END), []),
        (("LDG.E R0, [R2.64] ;", "ACQBULK ;", END), ["LDG"]),
        (("LDGSTS.E.BYPASS.128 [R5], [R2.64] ;", "ACQBULK ;", END), ["LDGSTS"]),
        (("RED.E.ADD.STRONG.GPU [R2.64], R5 ;", "ACQBULK ;", END), ["RED"]),
        (("UTMALDG.2D [UR8], [UR4], desc[URZ] ;", "ACQBULK ;", END), ["UTMALDG"]),
        (
            (SKIP, "ACQBULK ;", TO_HERE, "ST.E [R2.64], R5 ;", "ACQBULK ;", END),
            ["ST"],
        ),
        (("@P0 ACQBULK ;", "LDG.E R0, [R2.64] ;", "ACQBULK ;", END), ["LDG"]),
        (("@P0 EXIT ;", "ACQBULK ;", END), ["EXIT"]),
    ],
)
def test_finds_what_does_not_wait_for_earlier_kernels(lines, found):
    assert kinds(sass_rules.reached_before_wait(assemble(lines))) == found


def test_finds_loads_of_what_must_not_change():
    opcodes = ["LDG.E.128", "LDG.E.128.CONSTANT", "LDGSTS.E.BYPASS.128", "LDG.E.CONSTANT"]
    assert sass_rules.constant_loads(opcodes) == ["LDG.E.128.CONSTANT", "LDG.E.CONSTANT"]
