"""`mistral-ext bench`: what it measures, prints and draws. No figure of speed is asserted."""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch

from mistral_ext.bench import machine, models, peaks, roofline, speed
from mistral_ext.cli import main
from mistral_ext.llm import DEMO_MODEL, Mistral
from mistral_ext.model.config import MistralConfig
from mistral_ext.ops.weight import FORMATS

DEMO = ["bench", "--model", str(DEMO_MODEL), "--prompt", "20", "--tokens", "3"]
CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Two turns, limits that are given, and a random model of few parameters."""
    small = MistralConfig(
        vocab_size=384,
        dim=256,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        hidden_dim=512,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=64,
        max_positions=256,
        bos_id=1,
        eos_ids=(2,),
    )
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    monkeypatch.setattr(models, "mistral_7b", lambda layers: small)
    monkeypatch.setattr(peaks, "rates", lambda *_: {"fp32": 4e9})
    monkeypatch.setattr(peaks, "read_bandwidth", lambda *_: 2e9)


def test_the_machine_is_measured(monkeypatch):
    """The one test that compiles peaks.cpp. It reads little memory."""
    monkeypatch.setattr(peaks, "PASSES", 1)
    monkeypatch.setattr(peaks, "_buffer", lambda: torch.ones(2**24, dtype=torch.uint8))
    found = peaks.rates(passes=1)
    assert found.keys() <= peaks.INSTRUCTIONS.keys()
    assert found["fp32"] > 0
    assert peaks.matrix_rate(passes=1) > 0
    assert peaks.read_bandwidth(passes=1) > 0
    assert 0 < machine.resident_bytes() < machine.memory_bytes()


def test_memory_is_read_whatever_the_default_device_is(monkeypatch):
    monkeypatch.setattr(peaks, "BEYOND_CACHES", 8)
    with torch.device("meta"):
        assert peaks._buffer.__wrapped__().is_cpu


def test_a_machine_without_a_compiler(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(peaks, "_library", peaks._library.__wrapped__)
    assert peaks.rates() == {}
    assert peaks.matrix_rate() == 0
    assert "no C++ compiler" in caplog.text
    llm = Mistral.from_pretrained(DEMO_MODEL, progress=False)
    monkeypatch.setattr(peaks, "read_bandwidth", lambda *_: 2e9)
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    assert speed.measure(llm, 4, 1).prompt.share is None


def test_rates_and_shares_are_those_of_the_turns(monkeypatch):
    """A prompt of 10 takes 2 s, a step 0.5 s; the limits rise from turn to turn."""
    llm = Mistral.from_pretrained(DEMO_MODEL, progress=False)
    limits = iter([speed.Limits(1e6, 1e8), speed.Limits(3e6, 3e8), speed.Limits(5e6, 5e8)])
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    monkeypatch.setattr(speed, "limits_of", lambda device: next(limits))
    monkeypatch.setattr(speed, "_complete", lambda *_: (2.0, 0.5))
    found = speed.measure(llm, 10, 4)
    assert found.turns == 2
    weights = sum(w.nbytes for w in vars(llm.model.layers[0]).values() if hasattr(w, "nbytes"))
    assert 0 < weights < found.step_bytes < llm.model.nbytes
    assert found.decode.tokens_per_second == 2
    assert found.decode.limit == 3e6  # of 2e6 and 4e6
    share = found.step_bytes / 0.5 * (1 / 2e6 + 1 / 4e6) / 2
    assert found.decode.share == pytest.approx(share)
    assert found.prompt.tokens_per_second == 5
    flops = found.prompt.flops_per_byte * found.step_bytes
    assert flops == models.flops(llm.config, 1, 10)
    assert found.prompt.share == pytest.approx(flops / 2 * (1 / 2e8 + 1 / 4e8) / 2)


def test_memory_is_that_of_the_model_alone(monkeypatch):
    """It is read before there are the buffers of the limits."""
    buffer = functools.cache(lambda: torch.ones(2**10, dtype=torch.uint8))
    monkeypatch.setattr(peaks, "_buffer", buffer)
    monkeypatch.setattr(machine, "resident_bytes", lambda: 10**9 + buffer.cache_info().currsize)
    monkeypatch.setattr(speed, "limits_of", lambda device: speed.Limits(len(buffer()), 1.0))
    monkeypatch.setattr(speed, "_complete", lambda *_: (2.0, 0.5))
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    llm = Mistral.from_pretrained(DEMO_MODEL, progress=False)
    assert peaks.buffer_bytes() == 0
    assert speed.measure(llm, 4, 1).memory == 10**9
    assert peaks.buffer_bytes() == 2**10


@pytest.mark.parametrize("form", [None, "int8", "int4", *FORMATS])
def test_random_models_of_all_formats(form, quick):
    llm = models.random_model(2, form, torch.bfloat16, CPU)
    (completion,) = llm.generate([[5, 6, 7]], max_tokens=2, ignore_eos=True)
    assert len(completion.token_ids) == 2
    assert llm.logits([5, 6, 7]).isfinite().all()
    names = models.formats_of(llm.model).split(", ")
    made_as = {"int8": "q8_0", "int4": "iq4_xs"}
    expected = {made_as.get(form, form), "q8_0"} if form else {"bf16"}
    assert set(names) == expected
    unread = llm.model.embeddings.nbytes
    assert models.step_bytes(llm.model) == llm.model.nbytes - unread


def test_the_table_and_the_plot(quick, tmp_path, capsys):
    png = tmp_path / "roofline.png"
    assert main(["bench", "--prompt", "20", "--tokens", "3", "--output", str(png)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "reads 2.0 GB/s; fp32 multiply-add 4 GFLOP/s" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("weights"))
    rows = [line.split() for line in lines[header + 1 : header + 4]]
    assert [row[0] for row in rows] == ["bf16", "int8", "int4"]
    assert all(len(row) == 8 for row in rows)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["roofline.png"]


def test_a_plot_without_points(tmp_path):
    """As of a report that has only peaks."""
    roofs = roofline.Roofs(2e9, "reads", {"fp32": 4e9})
    roofline.draw([], roofs, "empty", tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_json_of_a_model(quick, capsys):
    assert main([*DEMO, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == str(DEMO_MODEL)
    assert report["peaks"] == {"fp32 multiply-add": 4e9}
    (of_demo,) = report["speeds"]
    assert of_demo["name"] == of_demo["weights"] == "bf16"
    assert of_demo["decode"]["tokens_per_second"] > 0
    assert of_demo["memory"] > of_demo["step_bytes"]
    assert main([*DEMO, "--json", "--weights", "int4,fp32"]) == 0
    speeds = json.loads(capsys.readouterr().out)["speeds"]
    assert [s["name"] for s in speeds] == ["int4", "fp32"]
    assert set(speeds[0]["weights"].split(", ")) == {"iq4_xs", "iq4_nl", "q8_0"}
    assert speeds[1]["weights"] == "fp32"


def test_without_matplotlib(quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(DEMO) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "--output FILE.png draws a roofline plot after pip install 'mistral_ext[plot]'."
    assert main([*DEMO, "--output", "x.png"]) == 1
    assert "matplotlib is missing: pip install 'mistral_ext[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--weights", "q9"], "--weights has 'q9', expected some of bf16, fp16"),
        (["--model", "x", "--weights", "q4_k"], "--weights has 'q4_k', expected some of bf16"),
        (["--model", "x", "--layers", "2"], "--layers is given, expected none with --model"),
        (["--layers", "33"], "--layers is 33, expected 1 to 32"),
        (["--prompt", "0"], "--prompt is 0, expected 1 or more"),
        (["--output", "no/such/folder/x.png"], "expected a file in a folder that exists"),
    ],
)
def test_wrong_options(given, message, capsys):
    assert main(["bench", *given]) == 1
    assert message in capsys.readouterr().err
