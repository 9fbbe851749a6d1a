"""The example of fine-tuning: its data, and how replies are counted."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from mistral_ext import Mistral

FOLDER = Path(__file__).parents[2] / "examples" / "finetune"


def run(name: str, *arguments: object) -> dict:
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


def test_the_data_are_those_of_the_script(tmp_path):
    run("make_data", tmp_path)
    words = {}
    for name in ("train", "held_out"):
        text = (tmp_path / f"{name}.jsonl").read_text()
        assert (FOLDER / f"{name}.jsonl").read_text() == text
        replies = [json.loads(line)["messages"][-1]["content"] for line in text.splitlines()]
        words[name] = {json.loads(reply)[key] for reply in replies for key in ("who", "what")}
    assert not words["train"] & words["held_out"]


def test_right_replies_are_counted(tiny, tmp_path, capsys, monkeypatch):
    """One is right, one has other values, and one is no JSON."""
    lines = (FOLDER / "held_out.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "data").write_text("".join(lines))
    expected = [json.loads(json.loads(line)["messages"][-1]["content"]) for line in lines]
    replies = [json.dumps({**expected[0], "who": "nobody"}), json.dumps(expected[1]), "Sure!"]
    prompts = []

    def generate(llm, given, **_):
        prompts.extend(llm.tokenizer.decode(ids) for ids in given)
        return [SimpleNamespace(text=text) for text in replies]

    monkeypatch.setattr(Mistral, "generate", generate)
    run("check", tiny[0], tmp_path / "data")
    assert "1 of 3 replies are right" in capsys.readouterr().out
    assert len(prompts) == 3
    for prompt, line in zip(prompts, lines, strict=True):
        assert json.loads(line)["messages"][-2]["content"] in prompt
