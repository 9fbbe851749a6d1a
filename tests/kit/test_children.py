from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from children import child

SAY_WHAT_CTRL_C_DOES = "import signal; print(signal.getsignal(signal.SIGINT).__name__)"
SLEEP = "import time; print('started', flush=True); time.sleep(600)"


def test_ctrl_c_reaches_a_child_where_it_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with child([sys.executable, "-c", SAY_WHAT_CTRL_C_DOES], stdout=subprocess.PIPE) as process:
            assert process.stdout.read() == b"default_int_handler\n"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_child_ends_with_a_test_that_fails():
    started = []

    def fails():
        with child([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE) as process:
            started.append(process)
            assert process.stdout.readline() == b"started\n"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert started[0].poll() == -signal.SIGKILL


def test_a_child_has_a_time_limit():
    with child([sys.executable, "-c", SLEEP], seconds=2, stdout=subprocess.PIPE) as process:
        process.stdout.read()  # for ever, if it were not for the limit
        assert process.wait() == -signal.SIGKILL
