"""What the emulator has of Hopper: barriers, TMA and wgmma against the PTX ISA, and the bugs that
it has to find in kernels that use them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from backends import registered

DELIVERIES = ("late", "early")
NAN = float("nan")


@pytest.fixture
def hopper(emulator):
    emulator.configure(capability=90)
    return emulator


def run(emulator, name, inputs, out, n=0):
    with registered(emulator, inputs=inputs, out=out):
        status = emulator.run_test_kernel(name, inputs.data_ptr(), out.data_ptr(), n)
    assert status == 0
    return out


def swizzled(rows: torch.Tensor) -> torch.Tensor:
    """[R, 64] of 16 bits with the 128-byte swizzle: the 16 bytes i of row r are at i ^ r % 8."""
    chunks = rows.unflatten(1, (8, 8))
    place = torch.arange(8) ^ (torch.arange(len(rows)) % 8)[:, None]
    return chunks.gather(1, place[..., None].expand_as(chunks)).flatten(1)


# TMA. PTX ISA, "Tensors": tiled mode, swizzling modes, out-of-boundary access.


def box_of(tensor, begin, size):
    """With zeros for what is outside."""
    box = torch.zeros(size, dtype=tensor.dtype)
    for index in torch.cartesian_prod(*map(torch.arange, size)).tolist():
        at = [b + i for b, i in zip(begin, index, strict=True)]
        if all(0 <= a < n for a, n in zip(at, tensor.shape, strict=True)):
            box[tuple(index)] = tensor[tuple(at)]
    return box


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize(
    ("x", "y"), [(0, 0), (36, 4), (8, 3), (64, 0), (-8, -5), (99, 19), (100, 0), (0, 20), (-64, 0)]
)
def test_tma_2d(hopper, x, y, copies, generator):
    hopper.configure(capability=90, copies=copies)
    memory = torch.randint(1, 2**15, (20, 104), generator=generator).short()
    out = torch.full((16, 64), -1, dtype=torch.int16)
    run(hopper, "tma_2d", memory[:, :100], out, (y + 200) * 1000 + x + 200)
    box = box_of(memory[:, :100], (y, x), (16, 64))
    assert torch.equal(out, swizzled(box))
    launch = hopper.take_launches()[-1]
    assert (launch["tma_bytes"], launch["loaded_bytes"]) == (16 * 128, 2 * box.count_nonzero())


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize("at", [(0, 0, 0), (5, 1, 8), (-1, -1, -8), (3, 4, 16), (6, 4, 71)])
def test_tma_3d(hopper, at, copies, generator):
    hopper.configure(capability=90, copies=copies)
    memory = torch.randint(1, 2**15, (7, 5, 72), generator=generator).short()
    z, y, x = (i + 200 for i in at)
    out = torch.full((4 * 2, 64), -1, dtype=torch.int16)
    run(hopper, "tma_3d", memory, out, (z * 1000 + y) * 1000 + x)
    assert torch.equal(out, swizzled(box_of(memory, at, (4, 2, 64)).flatten(0, 1)))


def test_tma_reads_nothing_outside_of_its_tensor(hopper):
    memory = torch.zeros(20, 104, dtype=torch.int16)
    out = torch.zeros(16, 64, dtype=torch.int16)
    with pytest.raises(RuntimeError, match=r"TMA of .* out of bounds: it ends .* after inputs"):
        run(hopper, "tma_2d", memory[:10], out, 205 * 1000 + 200)


MAP = {
    "rank": 2,
    "sizes": (100, 20, 1, 1, 1),
    "strides": (0, 208, 0, 0, 0),
    "box": (64, 16, 1, 1, 1),
}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({"rank": 3, "strides": (0, 208, 4160, 0, 0)}, 0),
        ({"strides": (0, 0, 0, 0, 0)}, 0),
        ({"box": (64, 256, 1, 1, 1)}, 0),
        ({"rank": 1}, 1),
        ({"rank": 6}, 1),
        ({"sizes": (100, 0, 1, 1, 1)}, 1),
        ({"sizes": (100, 2**32 + 1, 1, 1, 1)}, 1),
        ({"strides": (0, 200, 0, 0, 0)}, 1),
        ({"strides": (0, 2**40, 0, 0, 0)}, 1),
        ({"box": (64, 257, 1, 1, 1)}, 1),
        ({"box": (64, 0, 1, 1, 1)}, 1),
        ({"box": (72, 1, 1, 1, 1)}, 1),
        ({"offset": 8}, 1),
    ],
)
def test_impossible_tensor_maps_are_refused(hopper, change, status):
    """As cuTensorMapEncodeTiled does, and where rows are not as long as the swizzle."""
    m = {**MAP, **change}
    numbers = torch.tensor([m["rank"], *m["sizes"], *m["strides"], *m["box"]])
    offset = -numbers.data_ptr() % 16 + m.get("offset", 0)
    assert hopper.run_test_kernel("tensor_map", numbers.data_ptr(), 0, offset) == status


# wgmma. PTX ISA, "Asynchronous Warpgroup Level Matrix": register fragments of m64nNk16, matrix
# descriptors, and the strides of K-major and MN-major operands with the 128-byte swizzle.

IMAGE = 64 * 1024


def descriptor(start: int, leading: int, stride: int) -> int:
    return 1 << 62 | stride // 16 << 32 | leading // 16 << 16 | start // 16


def put(image: torch.Tensor, matrix: torch.Tensor, offsets: torch.Tensor) -> None:
    """At offsets in bytes before the swizzle, which changes bits 4 to 6 by bits 7 to 9."""
    image[(offsets ^ (offsets >> 7 & 7) << 4) // 2] = matrix


def k_major(shape, start: int, stride: int) -> torch.Tensor:
    """Offsets of [R, 16]: 8 rows of 128 bytes, the next 8 `stride` on."""
    r, k = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    return start + r // 8 * stride + r % 8 * 128 + 2 * k


def mn_major(shape, start: int, leading: int, stride: int) -> torch.Tensor:
    """Offsets of [N, 16]: 64 n a row; the next 64 n `leading` on, the next 8 k `stride` on."""
    n, k = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    return start + n // 64 * leading + k // 8 * stride + k % 8 * 128 + n % 64 * 2


def matrix_of(registers: torch.Tensor, columns: int) -> torch.Tensor:
    """d [64, N] from the N / 2 registers of each thread."""
    warp, lane, i = torch.meshgrid(*map(torch.arange, (4, 32, columns // 2)), indexing="ij")
    rows = 16 * warp + lane // 4 + i // 2 % 2 * 8
    d = torch.full((64, columns), NAN)
    d[rows, i // 4 * 8 + lane % 4 * 2 + i % 2] = registers.view(4, 32, -1)
    return d


# Of a: start and stride. Of b: whether it is MN-major, start, leading (without meaning in K-major),
# stride.
LAYOUTS = {
    "K-major": ((0, 1024), (False, 8192, 0, 1024)),
    "K-major, the third k step": ((64, 1024), (False, 8192 + 64, 16, 1024)),
    "K-major, groups of rows apart": ((32, 3072), (False, 24576 + 96, 4096, 2048)),
    "MN-major": ((0, 1024), (True, 8192, 2048, 1024)),
    "MN-major, the second k step of 64": ((32, 1024), (True, 8192 + 2048, 8192, 1024)),
    "MN-major, groups of k apart": ((96, 1024), (True, 8192, 1024, 4096)),
}


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wgmma(hopper, dtype, columns, in_registers, layout, copies, generator):
    """The sum of two equal products, of which only the first replaces d."""
    (a_start, a_stride), (transposed, *b_layout) = LAYOUTS[layout]
    hopper.configure(capability=90, copies=copies)
    a = torch.randn(64, 16, generator=generator).to(dtype)
    b = torch.randn(columns, 16, generator=generator).to(dtype)
    image = torch.full((IMAGE // 2,), NAN, dtype=dtype)
    if transposed:
        put(image, b, mn_major(b.shape, *b_layout))
    else:
        start, _, stride = b_layout
        put(image, b, k_major(b.shape, start, stride))
    if not in_registers:
        put(image, a, k_major(a.shape, a_start, a_stride))
    descriptors = torch.tensor([descriptor(a_start, 0, a_stride), descriptor(*b_layout)])
    inputs = torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in (descriptors, image, a)])
    n = (dtype == torch.float16) + 2 * (columns == 128) + 4 * transposed + 8 * in_registers
    out = run(hopper, "wgmma", inputs, torch.full((128, columns // 2), NAN), n)
    expected = 2 * a.double() @ b.double().T
    torch.testing.assert_close(matrix_of(out, columns).double(), expected, rtol=0, atol=1e-4)
    assert hopper.take_launches()[-1]["wgmma_flops"] == 2 * 2 * 64 * columns * 16


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (1 << 62, "another swizzle"),
        (1 << 49, "base offset"),
        (128 // 16, "row 0"),
        (1 << 14, "no meaning"),
        (8192 // 16 << 32, "out of bounds"),
    ],
)
def test_bad_descriptors_are_refused(hopper, change, problem):
    descriptors = torch.tensor([1 << 62 | 64 << 32, (1 << 62 | 64 << 32) ^ change])
    inputs = torch.cat([descriptors.view(torch.uint8), torch.zeros(IMAGE + 2048).byte()])
    with pytest.raises(RuntimeError, match=problem):
        run(hopper, "wgmma", inputs, torch.zeros(128, 64), 2)


@pytest.mark.parametrize("copies", DELIVERIES)
def test_wgmma_groups_complete_in_order(hopper, copies):
    hopper.configure(capability=90, copies=copies)
    out = run(hopper, "wgmma_groups", torch.zeros(1), torch.full((2, 128), NAN))
    assert torch.equal(out, torch.tensor([[16.0], [32.0]]).expand(2, 128))


# Barriers and registers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 7])
def test_mbarriers_hand_values_over(hopper, count, seed, generator):
    hopper.configure(capability=90, seed=seed)
    x = torch.randn(count, 32, generator=generator)
    assert torch.equal(run(hopper, "mbarrier", x, torch.full_like(x, NAN), count), 2 * x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("copies", DELIVERIES)
def test_cp_async_arrives_at_a_barrier(hopper, copies, seed, generator):
    hopper.configure(capability=90, copies=copies, seed=seed)
    x = torch.randint(1, 255, (32, 16), generator=generator).byte()
    assert torch.equal(run(hopper, "cp_async_barrier", x, torch.zeros_like(x)), x)


@pytest.mark.parametrize("seed", range(8))
def test_named_barriers(hopper, seed, generator):
    hopper.configure(capability=90, seed=seed)
    x = torch.randn(32, generator=generator)
    swapped = x.view(16, 2).flip(1).flatten()
    assert torch.equal(run(hopper, "named_barriers", x, torch.full_like(x, NAN)), x + swapped)


@pytest.mark.parametrize("seed", range(4))
def test_registers_move_between_warpgroups(hopper, seed):
    hopper.configure(capability=90, seed=seed)
    assert run(hopper, "registers", torch.zeros(1), torch.zeros(384)).eq(1).all()


MISUSES = {
    0: "mbarrier is not initialised",
    1: "mbarrier of 0 arrivals",
    2: "initialised a second time",
    3: "mbarrier is not initialised",
    4: "mbarrier has been overwritten",
    5: "mbarrier of 8 bytes is misaligned",
    6: "mbarrier of 1 arrivals: one more before the bytes",
    7: "mbarrier expects 1048576 bytes, too many",
    8: "parity 2, expected 0 or 1",
    9: "has ended, but an mbarrier is left with 16 bytes to come",
    10: "not a multiple of 1024",
    11: "TMA with 3 coordinates from a tensor of 2 axes",
    12: "TMA of 2048 bytes out of bounds: it is at byte 7168 of the block's 8208 bytes",
    13: "TMA writes to shared memory at byte 1024, which another is filling",
    14: "TMA writes to shared memory at byte 0, where thread .* has stored without",
    15: "store to byte 0 of shared memory, which TMA is still filling since a copy at",
    16: "this is no tensor map",
    17: "an offset of 1000 bytes, expected a multiple of 16",
    18: None,
    20: "named barrier 0, expected 1 to 15",
    21: "named barrier 16, expected 1 to 15",
    22: "named barrier 1 for 150 threads, expected a multiple of 32",
    23: "named barrier 1 for 192 threads, expected .* no more than the block has",
    24: "differ between the lanes of a warp",
    26: "registers_decrease by a warp that is in no whole warpgroup",
    27: "registers_increase to 24 from 256",
    28: "registers_decrease to 128 from 64",
    29: "wgmma_fence by a warp that is in no whole warpgroup",
    30: "left the kernel while lanes .* wait for it at wgmma_fence|names lanes that have left",
    31: "the warps of a warpgroup diverge",
    32: "wgmma with operands that differ between the warps",
    33: "wgmma with operands that differ between the lanes",
    34: "lane .* leaves the kernel without a wgmma_wait for this",
    35: "lane .* leaves the kernel without a wgmma_settle for the results of this",
    36: "not all lanes have called wgmma_settle",
    37: "wgmma_settle without a wgmma_wait for the product at primitives_sm90.cu:",
}


@pytest.mark.parametrize("way", MISUSES)
def test_misuse_is_refused(hopper, way):
    """Of primitives_sm90.cu, where they are counted; way 18 is none."""
    x, out = torch.zeros(16, 64, dtype=torch.int16), torch.full((160,), NAN)
    if MISUSES[way] is None:
        assert run(hopper, "misuse", x, out, way).eq(0).all()
    else:
        with pytest.raises(RuntimeError, match=MISUSES[way]):
            run(hopper, "misuse", x, out, way)


@pytest.mark.parametrize("name", ["mbarrier", "wgmma_groups", "registers", "named_barriers"])
def test_other_devices_have_none_of_it(emulator, name):
    with pytest.raises(RuntimeError, match=r"an instruction of compute capability 9\.0 on"):
        run(emulator, name, torch.zeros(1000), torch.zeros(1000), 1)


@pytest.mark.parametrize(("capability", "status"), [(89, 1), (90, 0)])
def test_shared_memory_is_that_of_the_device(emulator, capability, status):
    """Of 900 * 128 bytes, more than compute capability 8.9 has."""
    emulator.configure(capability=capability)
    assert emulator.run_test_kernel("shape", 0, 0, 900) == status


# Bugs: what the error says, which need not come with each seed.

WRONG = "a wrong result"
RACE = "of shared memory, which .*, and no barrier is between"
PLANTED = {
    "changed_operand": "registers of a have changed before the wait for this wgmma",
    "early_proxy_fence": "has stored without a fence_proxy_async since",
    "loaded_too_early": "TMA of inputs before wait_for_earlier_kernels",
    "lone_arrival": f"load of byte .* {RACE}",
    "lone_release": f"store to byte .* {RACE}",
    "missing_expect": "which TMA (is filling|has stored)|16384 bytes more have come than its ",
    "missing_init_fence": "TMA is to report to an mbarrier without an mbarrier_init_fence",
    "missing_operand_settle": "registers of a have been set without a wgmma_settle before",
    "missing_proxy_fence": "has stored without a fence_proxy_async since",
    "missing_reader_fence": "has stored without a fence_proxy_async since",
    "missing_settle": "touched without a wgmma_settle since the wait for planted.h:",
    "missing_settle_before": "accumulators have been set without a wgmma_settle before the wgmma_f",
    "missing_warp": "some warps of a warpgroup have done more wgmma or setmaxnreg than others",
    "missing_warpgroup_barrier": f"load of byte .* {RACE}",
    "missing_wgmma_fence": "wgmma without a wgmma_fence since the start or the last wgmma_wait",
    "missing_wgmma_wait": WRONG,
    "released_too_early": "which a wgmma may still read|store to byte .* which a wgmma has loaded",
    "too_many_registers": "is stuck: .* wait at registers_increase",
    "touched_accumulators": "accumulators have been touched before the wait for this wgmma",
    "wrong_bytes": "is stuck: 128 threads, .* wait at mbarrier_wait",
    "wrong_count": "named barrier 2 for (128 threads, but at .* for 160|160 .* for 128)",
    "wrong_parity": f"is stuck: .* wait at mbarrier_wait|TMA is filling|may not have seen|{RACE}",
    "wrong_stride": WRONG,
}
# These do no harm while all that is asynchronous is quick.
HARMLESS_IF_EARLY = ("missing_settle", "missing_wgmma_wait")


def test_every_planted_bug_is_tested():
    files = (Path(__file__).parents[1] / "emulator" / "planted" / "hopper").glob("*.cu")
    assert sorted(PLANTED) == sorted(file.stem for file in files)


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_found(hopper, name, copies, generator):
    a, b = x = torch.randn(2, 64, 256, generator=generator).bfloat16()
    expected = a.double() @ b.double().T

    def problem(n):
        try:
            out = run(hopper, name, x, torch.full((64, 64), NAN), n)
        except RuntimeError as error:
            return str(error)
        return None if torch.allclose(out.double(), expected, rtol=0, atol=1e-3) else WRONG

    kernel, problems = f"mistral::cuda::{name}<false>: block (0, 0, 0)", set()
    for seed in range(4):
        hopper.configure(capability=90, seed=seed, copies=copies)
        assert problem(1) is None  # of the correct twin
        problems.add(problem(0))
    if copies == "early" and name in HARMLESS_IF_EARLY:
        assert problems == {None}
    else:
        assert problems != {None}
        assert all(re.search(PLANTED[name], p) for p in problems - {None})
        assert all(kernel in p for p in problems - {None, WRONG})
