from __future__ import annotations

from types import SimpleNamespace

import pytest
import skipped

from mistral_ext import ops


def test_reasons_are_counted():
    reasons = [
        "Skipped: no Boost: install it\nIts words",
        "no GPU",
        "Skipped: no Boost: install it",
    ]
    reports = [SimpleNamespace(longrepr=("a.py", 3, reason)) for reason in reasons]
    assert skipped.by_reason(reports) == [
        "    2 tests  no Boost: install it",
        "    1 tests  no GPU",
    ]
    assert skipped.by_reason([]) == []


def test_what_is_not_supported_is_skipped(isa):
    assert isa in ops.supported_isas()


def test_all_instruction_sets_are_parameters():
    marked = {
        parameter.values[0]: parameter.marks[0].args[0] for parameter in skipped.isa_parameters()
    }
    assert set(marked) == set(skipped.INSTRUCTION_SETS)
    assert [isa for isa, skip in marked.items() if not skip] == ops.supported_isas()


def test_what_is_missing_skips_a_test_or_fails_it(monkeypatch):
    variable = "MISTRAL_EXT_REQUIRE_NOTHING"
    with pytest.raises(pytest.skip.Exception, match="no compiler"):
        skipped.skip_or_fail("no compiler", variable)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(pytest.fail.Exception, match="no compiler"):
        skipped.skip_or_fail("no compiler", variable)
