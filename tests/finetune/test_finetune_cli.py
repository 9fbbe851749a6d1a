"""`mistral-ext finetune`."""

from __future__ import annotations

import json

import pytest

from mistral_ext.cli import main
from mistral_ext.finetune import trainer as trainer_module


@pytest.fixture
def command(tiny, write_lines, tmp_path):
    lines = [{"text": f"{i} and {i + 1}."} for i in range(6)]
    data = write_lines("train.jsonl", *lines)
    return [
        *("finetune", "--model", str(tiny[0]), "--data", str(data), "--eval-data", str(data)),
        *("--output", str(tmp_path / "out"), "--rank", "2", "--epochs", "2", "--batch-size", "3"),
        *("--targets", "wq,w2", "--sample-tokens", "3", "--learning-rate", "0.01"),
    ]


def test_an_adapter_that_generate_uses(command, tiny, tmp_path, capsys):
    assert main(command) == 0
    shown = capsys.readouterr().err
    assert "step 0: held-out loss 10." in shown
    assert f"{tmp_path / 'out'}: adapter after 4 steps, held-out loss " in shown
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["r"] == 2
    assert settings["lora_alpha"] == 4
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    texts = set()
    for options in ([], ["--adapter", f"task={tmp_path / 'out'}"]):
        given = ["generate", "--model", str(tiny[0]), "--max-tokens", "4", *options, "1 and"]
        assert main(given) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 2


def test_ctrl_c_says_how_to_go_on(command, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise trainer_module._Stop

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "loss", interrupted)
        assert main(command) == 130
    checkpoint = tmp_path / "out" / "checkpoint-000000"
    assert f"interrupted; the state of the run is in {checkpoint}; --resume goes on" in (
        capsys.readouterr().err
    )
    assert main([*command, "--resume"]) == 0
    assert "adapter after 4 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "--rank is 0, expected an integer, 1 or more"),
        (["--targets", "wx"], "--targets is ('wx',), expected some of"),
        (["--data", "none.jsonl"], "none.jsonl: No such file"),
        (["--resume"], "no checkpoint in"),
    ],
)
def test_errors(command, tmp_path, capsys, options, message):
    assert main([*command, *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
