from __future__ import annotations

import hypothesis
import pytest
import torch

from mistral_ext import ops

# The same examples on every run, and no folder left behind; timings of a busy machine are no
# failure.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(params=ops.supported_isas())
def isa(request):
    """Runs the test once with each instruction set of this machine."""
    before = ops.active_isa()
    ops.select_isa(request.param)
    yield request.param
    ops.select_isa(before)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests are small, and torch's threads wait for each other badly on busy cores.

    A test of threads calls torch.set_num_threads itself.
    """
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
