"""mistral_ext.finetune.interruption: signals as requests."""

from __future__ import annotations

import signal

import pytest

from mistral_ext.finetune.interruption import Interruption

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@pytest.fixture
def caught():
    """The signals that this process, and not the context, has handled."""
    found = []
    before = {n: signal.signal(n, lambda number, _: found.append(number)) for n in SIGNALS}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_has_its_usual_effect(caught, number):
    with Interruption() as interruption:
        assert not interruption.requested
        signal.raise_signal(number)
        assert interruption.requested
        assert caught == []
        signal.raise_signal(number)
        assert caught == [number]


@pytest.mark.parametrize("number", SIGNALS)
def test_afterwards_signals_do_what_they_did(caught, number):
    with Interruption():
        pass
    signal.raise_signal(number)
    assert caught == [number]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_so(caught, number):
    signal.signal(number, signal.SIG_IGN)
    with Interruption() as interruption:
        signal.raise_signal(number)
        assert not interruption.requested
        assert signal.getsignal(number) is signal.SIG_IGN
