"""A fault of a kernel costs the test that launched it, and no other.

What a kernel does wrong shows when the device is waited for, which a test may leave to a later one;
and after an illegal access every call of the process fails. So the device is waited for after each
test marked cuda, and a process that has lost its device ends: pytest-xdist starts another one, and
bench/gpu_check goes on with the tests that are left.
"""

from __future__ import annotations

import os

import pytest
import torch

LOST = 70  # exit status of a process that has lost its device


def _uses_device(item: pytest.Item) -> bool:
    return item.get_closest_marker("cuda") is not None and torch.cuda.is_initialized()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if _uses_device(item):
        torch.cuda.synchronize()
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    result = yield
    if _uses_device(item):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = f"{item.nodeid} has lost the device: {error}"
            if hasattr(item.config, "workerinput"):
                # What the test came to has been sent. The end of a worker before the end of a test
                # is put down to that test; a moment later it would be to the next one.
                print(reason, flush=True)
                os._exit(LOST)
            pytest.exit(reason, returncode=LOST)
    return result
