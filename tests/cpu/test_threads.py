"""Threads: the count changes no bit, callers do not disturb each other, a forked child works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ragged import RaggedBatch

from mistral_ext import ops


def run_all_ops() -> list[torch.Tensor]:
    """Every op on something that makes many tasks, results and pools included."""
    generator = torch.Generator().manual_seed(1)
    gate, up, residual = torch.randn(3, 37, 9000, generator=generator)
    weight = torch.randn(9000, generator=generator)
    results = [ops.swiglu(gate, up), ops.rms_norm(gate, weight, residual=residual), residual]
    batch = RaggedBatch([16, 16, 40], 16, positions=[50, 3, 1])
    q, k, v = batch.inputs(40 + 1 + 20)
    pools, table = (batch.k_pool, batch.v_pool), batch.table((40, 1, 20))
    ops.rope(q, k, v, *pools, table, batch.frequencies, 16)
    results += [q, k, ops.attention(q, k, v, *pools, table, 16)]
    return results + [pool.nan_to_num() for pool in pools]


def run_on(threads: int) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    return run_all_ops()


def test_any_number_of_threads_gives_the_same_bits(isa):
    expected = run_on(1)
    for threads in (2, 3, 7, 2):
        for actual, wanted in zip(run_on(threads), expected, strict=True):
            assert torch.equal(actual, wanted)


_TOO_MANY = """
import resource, sys
from pathlib import Path
import torch
from mistral_ext import ops

x, weight = torch.ones(2000, 4096), torch.ones(3000, 4096)
expected = ops.swiglu(x, x), ops.linear(x[:1], weight)
torch.get_num_threads = lambda: 100_000  # to set them ends in a fault of torch's own threads
if sys.argv[1] == "refused":  # by the system, for want of memory for their stacks
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**26
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
actual = ops.swiglu(x, x), ops.linear(x[:1], weight)
assert all(map(torch.equal, actual, expected))
print(len(list(Path("/proc/self/task").iterdir())))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc on this system")
@pytest.mark.parametrize("ends", ["clamped", "refused"])
def test_too_many_threads_are_harmless(ends):
    if ends == "refused" and "MISTRAL_EXT_SANITIZE" in os.environ:
        pytest.skip("a sanitizer needs more memory than the limit leaves")
    process = subprocess.run(
        [sys.executable, "-c", _TOO_MANY, ends], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    processors = os.cpu_count() or 1
    most = max(16, 4 * processors)
    # torch has some of its own, a few for each processor.
    assert int(process.stdout) <= (8 if ends == "refused" else most) + 4 * processors


def test_python_threads_call_ops_at_once():
    expected = run_all_ops()
    wrong = []

    def work():
        torch.set_num_threads(2)
        for _ in range(15):
            for actual, wanted in zip(run_all_ops(), expected, strict=True):
                if not torch.equal(actual, wanted):
                    wrong.append(actual)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "an op hangs"
    assert not wrong


def test_short_loops_one_after_another(generator):
    """A worker that wakes late must not run a loop that has ended, or the next by mistake."""
    x, weight = torch.randn(9, 64, generator=generator), torch.ones(64)
    expected = ops.rms_norm(x, weight), ops.swiglu(x, x)
    torch.set_num_threads(4)
    for _ in range(2000):
        assert torch.equal(ops.rms_norm(x, weight), expected[0])
        assert torch.equal(ops.swiglu(x, x), expected[1])


def test_a_worker_that_falls_behind_joins_no_loop_that_has_ended(tmp_path):
    """It would claim tasks of the next, by the counter, the function and the number of tasks of
    either loop: ThreadSanitizer sees that, and the program that a task runs twice or never."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or pytest.skip("no C++ compiler found")
    here, program = Path(__file__).parent, tmp_path / "stress"
    sources = [here / "parallel_stress.cpp", here.parents[1] / "csrc" / "cpu" / "parallel.cpp"]
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread"]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    built = run([compiler, *flags, *sources, "-o", program, "-pthread", "-ldl"])
    assert built.returncode == 0, built.stderr
    result = run([program])
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this ThreadSanitizer cannot run on this kernel")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_makes_threads_of_its_own(generator):
    """It has none of its parent's: waiting for them would hang."""
    x, weight = torch.randn(64, 512, generator=generator), torch.ones(512)
    torch.set_num_threads(3)
    expected = ops.rms_norm(x, weight)
    child = os.fork()
    if child == 0:
        same = [torch.equal(ops.rms_norm(x, weight), expected) for _ in range(3)]
        tasks = Path("/proc/self/task")  # Linux: one entry per thread
        multithreaded = not tasks.exists() or len(list(tasks.iterdir())) == 3
        os._exit(0 if all(same) and multithreaded else 1)
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status[1]) == 0
    assert torch.equal(ops.rms_norm(x, weight), expected)
