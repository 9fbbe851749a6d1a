"""The emulator itself: its primitives against the PTX ISA, the bugs that it has to find, and the
memory traffic that it counts. The kernels are tested with the ops, in test_<op>.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from backends import registered, use

from mistral_ext import _C, ops
from mistral_ext.model import rope

DELIVERIES = ("late", "early")
NAN = float("nan")


def run(emulator, name, inputs, out, n=0):
    """Runs a kernel of primitives.cu or planted/, which may access `inputs` and `out` alone."""
    constant = ["inputs"] if name == "written_constant" else []
    with registered(emulator, constant, inputs=inputs, out=out):
        status = emulator.run_test_kernel(name, inputs.data_ptr(), out.data_ptr(), n)
    assert status == 0
    return out


# Positions that the PTX ISA gives to a lane's registers ("Matrix Fragments for mma.m16n8k16"):
# with g = lane // 4 and t = lane % 4, register r of A is the pair at row g (r even) or g + 8 and
# column 2t (r < 2) or 2t + 8; of B, the pair of rows from 2t (r = 0) or 2t + 8 in column g; of C
# and D, element c is at row g (c < 2) or g + 8, column 2t + c % 2.
LANES = [(lane // 4, lane % 4) for lane in range(32)]


def words(pairs: torch.Tensor) -> torch.Tensor:
    return pairs.contiguous().view(torch.int32).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(emulator, dtype, generator):
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    registers = torch.empty(32, 10, dtype=torch.int32)
    for lane, (g, t) in enumerate(LANES):
        for r in range(4):
            row, column = g + r % 2 * 8, 2 * t + r // 2 * 8
            registers[lane, r] = words(a[row, column : column + 2])
        for r in range(2):
            row = 2 * t + 8 * r
            registers[lane, 4 + r] = words(b[row : row + 2, g])
        for i in range(4):
            registers[lane, 6 + i] = c[g + i // 2 * 8, 2 * t + i % 2].view(torch.int32)
    name = {torch.bfloat16: "mma_bf16", torch.float16: "mma_f16"}[dtype]
    out = run(emulator, name, registers, torch.full((32, 4), NAN))
    d = torch.full((16, 8), NAN)
    for lane, (g, t) in enumerate(LANES):
        for i in range(4):
            d[g + i // 2 * 8, 2 * t + i % 2] = out[lane, i]
    torch.testing.assert_close(d.double(), c.double() + a.double() @ b.double(), rtol=0, atol=1e-5)
    assert emulator.take_launches()[-1]["mma"] == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(emulator, transposed):
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out = torch.full((32, 4), -1, dtype=torch.int32)
    run(emulator, "ldmatrix_transposed" if transposed else "ldmatrix", matrices, out)
    source = matrices.mT if transposed else matrices
    for lane, (g, t) in enumerate(LANES):
        for j in range(4):
            assert out[lane, j] == words(source[j, g, 2 * t : 2 * t + 2])


def test_shuffles(emulator, generator):
    x = torch.randint(-(2**31), 2**31, (32,), generator=generator).int()
    out = run(emulator, "shuffles", x, torch.zeros(6, 32, dtype=torch.int32))
    lane = torch.arange(32)
    sources = [
        torch.full((32,), 5),
        lane // 8 * 8 + (lane + 1) % 8,
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane % 16 < 14, lane + 2, lane),
        lane ^ 9,
        torch.where(lane < 16, lane ^ 1, lane ^ 2),
    ]
    assert torch.equal(out, x[torch.stack(sources)])


@pytest.mark.parametrize("votes", [0, 1, 0x80000001, 0x12345678, 0xFFFFFFFF])
def test_votes(emulator, votes):
    x = torch.tensor([votes >> lane & 1 for lane in range(32)]).int()
    ballot, some, every = run(emulator, "votes", x, torch.zeros(3, 32).int()).tolist()
    assert {v & 0xFFFFFFFF for v in ballot} == {votes}
    assert {bool(v) for v in some} == {votes != 0}
    assert {bool(v) for v in every} == {votes == 0xFFFFFFFF}


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize("valid", [0, 1, 31, 32])
def test_cp_async_fills_with_zeros(emulator, valid, copies, generator):
    emulator.configure(copies=copies)
    x = torch.randint(1, 255, (32, 16), generator=generator).byte()
    out = run(emulator, "cp_async", x[: max(valid, 1)], torch.full_like(x, 255), valid)
    assert torch.equal(out[:valid], x[:valid])
    assert not out[valid:].any()


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize("length", [0, 2, 4, 70, 126, 128])
def test_cp_async_of_words_and_parts_of_them(emulator, length, copies, generator):
    emulator.configure(copies=copies)
    x = torch.randint(1, 255, (max(length, 1),), generator=generator).byte()
    emulator.take_launches()
    out = run(emulator, "cp_async_words", x, torch.full((128,), 255, dtype=torch.uint8), length)
    assert torch.equal(out[:length], x[:length])
    assert not out[length:].any()
    assert emulator.take_launches()[0]["loaded_bytes"] == length


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lane", [0, 17, 31])
def test_a_lane_that_does_more_is_counted_with_the_others(emulator, lane, seed):
    """Three requests, whichever lane comes first: its own one, and two of all."""
    emulator.configure(seed=seed)
    emulator.take_launches()
    x = torch.arange(32).float()
    out = run(emulator, "one_lane_more", x, torch.zeros(32), lane)
    assert torch.equal(out, (2 + (torch.arange(32) == lane)) * x)
    (launch,) = emulator.take_launches()
    assert (launch["load_requests"], launch["load_sectors"]) == (3, 1 + 2 * 4)


def test_bit_operations(emulator, generator):
    x = torch.randint(-(2**31), 2**31, (32,), generator=generator).int()
    turned, flipped = run(emulator, "bits", x, torch.zeros(2, 32, dtype=torch.int32))
    swapped = x.view(torch.uint8).view(-1, 4).flip(1)
    assert torch.equal(turned.view(torch.uint8).view(-1, 4), swapped)
    assert torch.equal(flipped, (x & 0x00FF00FF) ^ 0x12345678)


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize("tiles", [1, 2, 3, 7])
def test_cp_async_groups(emulator, tiles, copies, generator):
    emulator.configure(copies=copies)
    x = torch.randint(1, 255, (tiles, 64, 16), generator=generator).byte()
    assert torch.equal(run(emulator, "pipeline", x, torch.zeros_like(x), tiles), x)


@pytest.mark.parametrize("workers", [1, 2])
def test_atomics(emulator, workers):
    emulator.configure(workers=workers)
    out = run(emulator, "atomics", torch.zeros(1), torch.zeros(3, dtype=torch.int32), 50)
    assert out[:2].tolist() == [50, 49]
    assert out[2].view(torch.float32) == 50 * 70 * 0.5


def test_indices(emulator):
    out = run(emulator, "indices", torch.zeros(1), torch.full((12, 40, 6), -1, dtype=torch.int32))
    expected = [
        [bx, by, bz, x, y, z]
        for bz in range(2)
        for by in range(2)
        for bx in range(3)
        for z in range(2)
        for y in range(4)
        for x in range(5)
    ]
    assert out.view(-1, 6).tolist() == expected


def test_shared_memory_is_nan_at_first(emulator):
    for _ in range(2):  # also after another block has used it
        assert run(emulator, "uninitialised", torch.zeros(1), torch.zeros(32)).isnan().all()
        run(emulator, "missing_barrier", torch.zeros(256), torch.zeros(256), 1)


@pytest.mark.parametrize(
    ("size", "status"),
    [(0, 0), (1, 0), (792, 0), (793, 1), (1025, 9)],  # cudaErrorInvalidValue, -Configuration
)
def test_impossible_launches_are_refused(emulator, size, status):
    """`size` blocks of `size` threads with `size` / 8 KiB of shared memory."""
    assert emulator.run_test_kernel("shape", 0, 0, size) == status


RACE = "of shared memory, which thread .*, and no barrier is between"
UNFENCED = "load of what another block has stored at .*, and no __threadfence before an atomic"
PLANTED = {
    "began_too_early": "load of inputs before wait_for_earlier_kernels",
    "copied_too_early": "cp.async from global memory of inputs before wait_for_earlier_kernels",
    "divergent_barrier": "divergent __syncthreads: others wait at divergent_barrier.cu:",
    "divergent_shuffle": "divergent",
    "exited_lane": "left the kernel",
    "exited_thread": "left the kernel",
    "looked_up_too_early": "plain load of inputs before wait_for_earlier_kernels",
    "misaligned": "load of 16 bytes is misaligned: its address is 8 bytes past a multiple of 16",
    "misaligned_part": "cp.async from global memory of 4 bytes is misaligned: its address is 2 ",
    "missing_barrier": RACE,
    "missing_copy_barrier": RACE,
    "missing_fence": UNFENCED,
    "missing_fence_after": UNFENCED,
    "missing_refill_barrier": RACE,
    "missing_syncwarp": RACE,
    "missing_wait": "load of .* which thread .* is still filling since a copy at missing_wait.cu:",
    "never_waits": "the end of the kernel before wait_for_earlier_kernels",
    "out_of_bounds_read": "load of 4 bytes out of bounds: it ends",
    "out_of_bounds_shared": "access to shared memory of 16 bytes out of bounds: it is at byte 1024",
    "out_of_bounds_write": "store of 4 bytes out of bounds: it ends 4 bytes after out .1028 bytes.",
    "past_shared": "something was written outside the block's shared memory",
    "reused_too_early": RACE,
    "row_outside": "ldmatrix of a row of 16 bytes out of bounds: it is at byte 512",
    "unshared_store": "load of what thread .* has stored at .*, and no barrier is between",
    "written_constant": "store to constant inputs",
    "wrong_mask": "by lane ",
    "wrong_row": None,
    "wrong_wait": "load of .* which thread .* is still filling since a copy at wrong_wait.cu:",
}
# Seen in plain accesses alone, which the sanitizer watches for other things: there, some of these
# give a wrong result.
PLAIN = ("looked_up_too_early", "missing_barrier", "missing_refill_barrier", "missing_syncwarp")
PLAIN += ("missing_wait", "past_shared", "reused_too_early", "wrong_wait")


def test_every_planted_bug_is_tested():
    files = (Path(__file__).parents[1] / "emulator" / "planted").glob("*.cu")
    assert sorted(PLANTED) == sorted(file.stem for file in files)


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_found(emulator, name, copies, generator):
    """By an error that says what and where or, with None, by a wrong result. Correct twins pass."""
    if name in PLAIN and emulator.sanitized:
        pytest.skip("see test_the_sanitizer_watches_plain_accesses")
    # So far apart that what is read or written past one of them is nearer to it than to the other.
    memory = torch.full((4096,), NAN)
    x, out = memory[:256].normal_(generator=generator), memory[2048 : 2048 + 257]
    problem = PLANTED[name]

    def run_planted(n):
        out[:256], out[256] = NAN, 0
        return run(emulator, name, x, out, n)[:256]

    for seed in range(3):
        emulator.configure(seed=seed, copies=copies)
        assert torch.equal(run_planted(1), 2 * x)
        if problem is not None:
            with pytest.raises(RuntimeError) as caught:
                run_planted(0)
            message = str(caught.value)
            assert re.search(problem, message)
            assert message.startswith(f"mistral::cuda::{name}<false>: block (")
            assert f"{name}.cu:" in message or name in PLAIN
        else:
            assert not torch.equal(run_planted(0), 2 * x)


def test_the_registers_of_the_x87_are_left_alone(emulator):
    """They are those of MMX. Once one of these is written, long doubles are NaN, until there is an
    emms, in all that the process computes."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump found")
    for module in (emulator, _C):
        command = [objdump, "-d", "--no-show-raw-insn", module.__file__]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert re.search(r"%mm\d", text) is None, module.__file__


def test_the_sanitizer_watches_plain_accesses(emulator):
    if not emulator.sanitized:
        pytest.skip("tests/sanitize.sh runs this")
    child = os.fork()
    if child == 0:  # which ends in AddressSanitizer's report
        emulator.configure(workers=1)
        run(emulator, "past_shared", torch.ones(256), torch.zeros(257))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def test_an_error_ends_the_launch_and_nothing_else(emulator):
    x, out = torch.ones(256), torch.zeros(256)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run(emulator, "exited_thread", x, out)
        assert torch.equal(run(emulator, "exited_thread", x, out, n=1), 2 * x)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (100, 32)])
def test_sectors(emulator, stride, sectors):
    x = torch.zeros(31 * stride + 1)
    emulator.take_launches()
    run(emulator, "strided_copy", x, torch.zeros_like(x), stride)
    (launch,) = emulator.take_launches()
    for kind, volume in (("load", "loaded"), ("store", "stored")):
        assert launch[f"{kind}_requests"] == 1
        assert launch[f"{volume}_bytes"] == 128
        assert launch[f"{kind}_sectors"] == sectors


@pytest.mark.parametrize(
    ("stride", "conflicts"),
    [(0, 0), (16, 0), (32, 4), (48, 0), (64, 12), (128, 28), (144, 0), (256, 28)],
)
def test_bank_conflicts(emulator, stride, conflicts):
    """Lane i reads 16 bytes at i * stride: 8 lanes at a time, one pass if they differ in banks."""
    emulator.take_launches()
    run(emulator, "shared_stride", torch.zeros(1), torch.zeros(32), stride)
    (launch,) = emulator.take_launches()
    assert (launch["shared_requests"], launch["shared_conflicts"]) == (1, conflicts)


@pytest.mark.parametrize(
    ("stride", "conflicts"), [(0, 0), (8, 0), (16, 2), (24, 0), (32, 6), (64, 14), (128, 30)]
)
def test_bank_conflicts_of_8_bytes(emulator, stride, conflicts):
    """The same of 8 bytes, 16 lanes at a time."""
    emulator.take_launches()
    run(emulator, "shared_stride_8", torch.zeros(1), torch.zeros(32), stride)
    (launch,) = emulator.take_launches()
    assert (launch["shared_requests"], launch["shared_conflicts"]) == (1, conflicts)


# What the kernels move.


def launch_of(emulator, function):
    emulator.take_launches()
    with use(emulator):
        function()
    (launch,) = emulator.take_launches()
    return launch


def check_traffic(launch, read, written, width=16, doubles=0):
    """Each byte once, in requests of 32 lanes with `width` bytes and sectors that are full; and so
    many bytes of doubles, in requests of 32 of them."""
    assert (launch["loaded_bytes"], launch["stored_bytes"]) == (read + doubles, written)
    assert (launch["load_requests"], launch["store_requests"]) == (
        read // 32 // width + doubles // 32 // 8,
        written // 32 // width,
    )
    sectors = ((read + doubles) // 32, written // 32)
    assert (launch["load_sectors"], launch["store_sectors"]) == sectors


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dim", [1024, 4096, 16384])
def test_rms_norm_reads_and_writes_each_element_once(emulator, dim, fused):
    rows = 3
    x, weight = torch.zeros(rows, dim).bfloat16(), torch.ones(dim).bfloat16()
    residual = torch.zeros_like(x) if fused else None
    launch = launch_of(emulator, lambda: ops.rms_norm(x, weight, 1e-5, residual))
    tensor, copies = 2 * rows * dim, 2 if fused else 1
    # The weight is read by each row, from L2.
    check_traffic(launch, copies * tensor + 2 * rows * dim, copies * tensor)
    assert launch["shared_conflicts"] == 0


def test_swiglu_reads_and_writes_each_element_once(emulator):
    gate, up = torch.zeros(3, 14336).half(), torch.zeros(3, 14336).half()
    launch = launch_of(emulator, lambda: ops.swiglu(gate, up))
    check_traffic(launch, 2 * 2 * gate.numel(), 2 * gate.numel())


def test_rope_reads_each_element_once_and_writes_it_where_it_must_be(emulator):
    tokens, heads, kv_heads, dim = 3, 32, 8, 128
    q = torch.zeros(tokens, heads, dim).bfloat16()
    k, v = (torch.zeros(tokens, kv_heads, dim).bfloat16() for _ in range(2))
    pools = [torch.zeros(kv_heads * 16, dim).bfloat16() for _ in range(2)]
    table = torch.tensor([[0, tokens, 5, 0, 16]])
    given = q, k, v, *pools, table, rope.frequencies(1e4, dim), 16
    launch = launch_of(emulator, lambda: ops.rope(*given))
    k_bytes = 2 * k.numel()
    read, written = 2 * q.numel() + 2 * k_bytes, 2 * q.numel() + 3 * k_bytes
    # q and k in place, k and v in the ring; the frequencies for each token
    check_traffic(launch, read, written, doubles=tokens * dim // 2 * 8)


def test_rows_that_are_not_aligned_are_read_element_by_element(emulator):
    x = torch.zeros(1 + 4096).half()[1:].view(1, 4096)
    launch = launch_of(emulator, lambda: ops.swiglu(x, x))
    assert (launch["loaded_bytes"], launch["stored_bytes"]) == (2 * 2 * 4096, 2 * 4096)
    assert (launch["load_requests"], launch["store_requests"]) == (2 * 4096 // 32, 4096 // 32)
    assert launch["load_sectors"] == 3 * launch["load_requests"]  # 64 bytes, not aligned


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("copies", DELIVERIES)
def test_the_ops_do_not_depend_on_the_order_of_threads(emulator, seed, copies, generator):
    """Attention and rope: test_attention_cuda.py."""
    x, residual, weight = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 1000), (3, 1000), 1000)
    )
    logits = torch.randn(3, 1000, generator=generator)
    rows = torch.tensor([2, 0, 1])
    options = torch.tensor([[0.9, 40, 0.8, 0.01, 1.1, 0.2, 0.1]], dtype=torch.float64).repeat(3, 1)

    def run_ops():
        h, noise = residual.clone(), torch.tensor([[7, 0, 0], [7, 1, 0], [8, 0, 3]])
        history = torch.zeros(3, 1000, dtype=torch.int32)
        tokens = [ops.sample(logits, rows, options, noise, history) for _ in range(3)]
        return ops.rms_norm(x, weight, 1e-5, h), h, ops.swiglu(x, residual), *tokens, history

    emulator.configure(seed=0)
    with use(emulator):
        expected = run_ops()
    emulator.configure(seed=1 + seed, copies=copies)
    with use(emulator):
        for result, first in zip(run_ops(), expected, strict=True):
            assert torch.equal(result, first)
