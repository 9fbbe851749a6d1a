"""The thread that steps the engine: when it begins to step."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from mistral_ext.serve import engine_thread
from mistral_ext.serve.engine_thread import EngineThread


class Engine:
    """Counts the requests that it has at each step, which ends them."""

    def __init__(self):
        self.waiting = 0
        self.steps = []
        self.is_idle = threading.Event()  # whether the thread has found no work
        self.stepped = threading.Event()

    @property
    def has_work(self):
        if self.waiting == 0:
            self.is_idle.set()
        return self.waiting > 0

    def add(self, request, listener):
        self.waiting += 1

    def abort(self, request_id):
        pass

    def step(self):
        self.steps.append(self.waiting)
        self.waiting = 0
        self.stepped.set()
        return []


@pytest.fixture
def thread():
    thread = EngineThread(Engine(), torch.device("cpu"), lambda: None)
    thread.start()
    assert thread.engine.is_idle.wait(10)
    yield thread
    thread.stop()


def steps_while(thread, call):
    """Whether the engine makes a step although `call` is called again and again."""
    end = time.monotonic() + 10
    while not thread.engine.stepped.is_set() and time.monotonic() < end:
        call()
        time.sleep(0.005)
    return thread.engine.stepped.is_set()


def test_requests_that_come_together_share_the_first_step(thread, monkeypatch):
    monkeypatch.setattr(engine_thread, "_LULL", 1.0)
    monkeypatch.setattr(engine_thread, "_LONGEST_WAIT", 30.0)
    for _ in range(4):
        thread.add(SimpleNamespace(), print)
        time.sleep(0.01)
    assert thread.engine.stepped.wait(10)
    assert thread.engine.steps == [4]


def test_requests_that_keep_coming_do_not_hold_the_first_step_back(thread, monkeypatch):
    monkeypatch.setattr(engine_thread, "_LULL", 1000.0)
    monkeypatch.setattr(engine_thread, "_LONGEST_WAIT", 0.1)
    assert steps_while(thread, lambda: thread.add(SimpleNamespace(), print))


def test_aborts_do_not_prolong_the_wait(thread, monkeypatch):
    monkeypatch.setattr(engine_thread, "_LULL", 0.1)
    monkeypatch.setattr(engine_thread, "_LONGEST_WAIT", 1000.0)
    thread.add(SimpleNamespace(), print)
    assert steps_while(thread, lambda: thread.abort([0]))


def test_a_stop_does_not_wait_for_a_lull(thread, monkeypatch):
    monkeypatch.setattr(engine_thread, "_LULL", 1000.0)
    monkeypatch.setattr(engine_thread, "_LONGEST_WAIT", 1000.0)
    thread.add(SimpleNamespace(), print)
    began = time.monotonic()
    thread.stop()
    assert time.monotonic() - began < 10
    assert not thread.engine.steps
