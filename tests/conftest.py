from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from zlib import crc32

if "MISTRAL_EXT_C" in os.environ:  # another build of the compiled module: tests/sanitize.sh
    spec = spec_from_file_location("mistral_ext._C", os.environ["MISTRAL_EXT_C"])
    sys.modules["mistral_ext._C"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["mistral_ext._C"])

import backends
import hypothesis
import pytest
import skipped
import torch
from device_faults import pytest_runtest_call, pytest_runtest_protocol  # noqa: F401

from mistral_ext import ops

# The same examples on every run, and no folder left behind; timings of a busy machine are no
# failure.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


def pytest_terminal_summary(terminalreporter):
    """An end in green says little where a compiler or a processor is missing."""
    if lines := skipped.by_reason(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section("not run on this machine (-rs shows which tests)")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(params=skipped.isa_parameters())
def isa(request):
    """Runs the test once with each instruction set of this machine."""
    with _selected(request.param):
        yield request.param


@contextmanager
def _selected(isa):
    before = ops.active_isa()
    ops.select_isa(isa)
    try:
        yield
    finally:
        ops.select_isa(before)


@pytest.fixture
def exact_products():
    """Has products keep the precision of their activations."""
    before = ops.exact_products()
    ops.set_exact_products(True)
    yield
    ops.set_exact_products(before)


@pytest.fixture(scope="session")
def emulator_module():
    return backends.build_emulator("emulator")


@pytest.fixture
def emulator(emulator_module):
    """The emulator of CUDA kernels, tests/emulator."""
    emulator_module.configure()
    emulator_module.take_launches()  # what tests before this one have launched
    return emulator_module


@pytest.fixture(
    params=[*skipped.isa_parameters(), "emulator, late", "emulator, early", backends.GPU]
)
def backend(request):
    """Runs the test once with each implementation of the ops that works on this machine.

    They are the instruction sets of the CPU, and the CUDA kernels in the emulator with late and
    with early delivery of asynchronous copies; each test has them run in an order of its own. And
    they are the same kernels on a GPU, where there is one.
    """
    if request.param.startswith("cuda"):
        with backends.use_gpu(), backends.attention_of(request.param, backends._C):
            yield request.param
        return
    if not request.param.startswith("emulator"):
        with _selected(request.param):
            yield request.param
        return
    emulator = request.getfixturevalue("emulator")
    backends.configure(emulator, request.param, seed=crc32(request.node.nodeid.encode()))
    with backends.use(emulator), backends.attention_of(request.param, emulator):
        yield request.param


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests are small, and torch's threads wait for each other badly on busy cores.

    A test of threads calls torch.set_num_threads itself.
    """
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
