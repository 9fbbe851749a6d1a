"""bench/cpu.py: turns, ratios and files of models. No speed is measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import cpu
import peers
import plot
import pytest
import torch
import turns
from models import random_weights

from mistral_ext.bench.models import mistral_7b

SMALL = replace(mistral_7b(1), dim=64, hidden_dim=96, n_heads=2, n_kv_heads=1, head_dim=32)
SMALL = replace(SMALL, vocab_size=320, max_positions=512)


class Engine:
    def __init__(self, name: str):
        self.name, self.nbytes = name, 100


def test_ratios_are_of_one_turn():
    now, slower = 0.0, 1.0

    def takes(seconds):
        def function():
            nonlocal now
            now += seconds * slower / 10

        return function

    def limit():  # between all calls; the machine becomes slower with each turn
        nonlocal slower
        slower *= 1.1
        return 50.0

    ours, theirs = Engine(turns.OURS), Engine("other")
    steps = {(ours.name, 1): 1.0, (ours.name, 4): 2.0, (theirs.name, 1): 3.0, (theirs.name, 4): 9.0}
    functions = {key: takes(seconds) for key, seconds in steps.items()}
    taken = turns.take_turns(functions, limit, 3, lambda: now, in_a_row=2)
    assert len(taken) == 3
    report = turns.summarize("decode", taken, [ours, theirs], lambda n: n, lambda engine, n: 100)
    first, fourth = report["other"]["decode 1"], report["other"]["decode 4"]
    assert first["ours_over_it"] == pytest.approx(3 * 1.1**2)  # two calls later
    assert fourth["ours_over_it"] == pytest.approx(4.5 * 1.1**2)
    assert fourth["cost"] == pytest.approx(3 * 1.1)
    assert first["share"] == pytest.approx(100 / first["seconds"] / 50)


def options(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["cpu.py", *given])
    return cpu.parse_options()


def test_options(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "available", lambda: ["llama.cpp"])
    given = options(monkeypatch, "--weights", "q4_k_m,int4", "--prompts", "64,256")
    assert (given.weights, given.prompts) == (["q4_k_m", "int4"], [64, 256])
    assert given.peers == ["llama.cpp"]
    assert options(monkeypatch).weights == ["bf16", "int8", "int4"]
    for wrong in ("q4_k", "Q4_K_M"):
        with pytest.raises(SystemExit):
            options(monkeypatch, "--weights", wrong)
        assert f"'{wrong}', expected bf16,int8,int4,q8_0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options(monkeypatch, "--prompts", "64,0")
    assert "'64,0', expected numbers of 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options(monkeypatch, "--processor-time")
    assert "expected --only decode,prefill with it" in capsys.readouterr().err
    assert options(monkeypatch, "--processor-time", "--only", "decode").processor_time
    monkeypatch.setattr(cpu, "available", list)
    with pytest.raises(SystemExit):
        options(monkeypatch, "--weights", "q4_k_m")
    assert "q4_k_m needs the packages llama_cpp, gguf" in capsys.readouterr().err


def test_both_engines_get_the_same_file(tmp_path, monkeypatch):
    made = []

    def quantize(source: Path, target: Path, file_type: str) -> None:
        made.append(file_type)
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(peers, "quantize_file", quantize)
    torch.manual_seed(0)
    weights = random_weights(SMALL)
    files = peers.LlamaCppFiles(SMALL, weights, tmp_path / "kept")
    path = files.path("Q4_K_M")
    assert files.path("Q4_K_M") == path
    assert made == ["Q4_K_M"]
    files.release("Q4_K_M")
    again = peers.LlamaCppFiles(SMALL, weights, tmp_path / "kept")
    assert again.path("Q4_K_M") == path
    assert made == ["Q4_K_M"]
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".gguf", ".gguf"]

    of_file, of_weights = cpu.Ours.of_file(path), cpu.Ours.of_weights(SMALL, weights)
    assert of_file.nbytes == of_weights.nbytes
    of_file.prompt([1, 2, 3])
    of_file.decoder(4, [1, 2, 3])()


def test_temporary_files_go(monkeypatch):
    monkeypatch.setattr(peers, "quantize_file", lambda source, target, kind: target.touch())
    files = peers.LlamaCppFiles(SMALL, random_weights(SMALL))
    path = files.path("Q8_0")
    files.release("Q8_0")
    assert not path.exists()
    assert files.path("BF16").exists()
    files.close()
    assert not path.parent.exists()


def test_the_title_of_the_plot():
    row = {"nbytes": 100, "first_token": 1.0}
    measured = {"limit": 2.0, "flops": 50}
    row |= dict.fromkeys(("decode 1", "decode 8", "prefill 64", "prefill 512"), measured)
    report = {"layers": 8, "machine": {"cpu": "EPYC", "threads": 2}}
    report["model"] = {"bf16": {"mistral_ext": row}, "int8": {"mistral_ext": row}}
    title = plot.title(report, plot.points(report))
    assert title.endswith("EPYC, 2 threads: decode of 1, 8 at once; prefill of 64, 512 tokens")
    report["model"] = {"bf16": {"mistral_ext": {"nbytes": 100, "decode 1": measured}}}
    assert plot.title(report, plot.points(report)).endswith("threads: decode of 1 at once")
