"""How well a model moderates."""

from __future__ import annotations

import json
import shutil

import pytest
from chat_templates import MISTRAL_V1
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext.cli import main
from mistral_ext.evaluate.moderation import FLAGGED, Case, confusion, moderate, read_cases
from mistral_ext.llm import Mistral
from mistral_ext.text.guardrails import CATEGORIES, Moderation

SAFE = Moderation(dict.fromkeys(CATEGORIES, 0.1))


def of(category: str) -> Moderation:
    return Moderation({name: 0.9 if name == category else 0.01 for name in CATEGORIES})


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-instruct"
    write_checkpoint(folder, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": MISTRAL_V1}))
    return str(folder)


def test_precision_and_recall():
    pairs = [("acceptable", SAFE)] * 6 + [("acceptable", of("hateful"))] * 2
    pairs += [("illegal", of("illegal"))] * 3 + [("illegal", of("hateful")), ("illegal", SAFE)]
    known, found = zip(*pairs, strict=True)
    counts = confusion([Case("x", expected) for expected in known], found)
    assert counts.labels == ["acceptable", "flagged", "illegal"]
    assert (counts.precision("acceptable"), counts.recall("acceptable")) == (6 / 7, 6 / 8)
    assert (counts.precision(FLAGGED), counts.recall(FLAGGED)) == (4 / 6, 4 / 5)
    assert (counts.precision("illegal"), counts.recall("illegal")) == (1, 3 / 5)
    assert counts.counts["illegal", "hateful"] == 1
    none = confusion([Case("x", "acceptable")], [SAFE])
    assert (none.precision(FLAGGED), none.recall(FLAGGED)) == (None, None)


def test_contents_that_are_only_flagged():
    given = [Case("x", FLAGGED), Case("x", FLAGGED), Case("x", "acceptable")]
    counts = confusion(given, [of("illegal"), SAFE, SAFE])
    assert counts.labels == ["acceptable", "flagged"]
    assert (counts.precision(FLAGGED), counts.recall(FLAGGED)) == (1, 0.5)


def test_contents_that_are_only_flagged_count_for_no_category():
    given = [Case("x", FLAGGED), Case("x", "illegal"), Case("x", "hateful"), Case("x", FLAGGED)]
    counts = confusion(given, [of("illegal"), of("illegal"), of("illegal"), SAFE])
    assert counts.precision("illegal") == 1 / 2
    assert counts.precision("hateful") is None
    assert counts.precision(FLAGGED) == 1
    assert counts.precision("acceptable") == 0


def test_a_content_that_is_too_long_is_named_before_any_is_read(instruct, tmp_path, monkeypatch):
    file = tmp_path / "contents.jsonl"
    lines = [{"text": text, "flagged": True} for text in ("short", "long " * 2000)]
    file.write_text("\n".join(map(json.dumps, lines)))
    llm = Mistral.from_pretrained(instruct, progress=False, sliding_window=None, max_positions=512)
    monkeypatch.setattr(llm.engine, "add", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"contents.jsonl, line 2: .* expected fewer than 512"):
        dict(moderate(llm, read_cases(file), progress=False))


def test_files(tmp_path):
    file = tmp_path / "contents.jsonl"
    messages = [{"role": "user", "content": "Hello"}]
    lines = [
        {"text": "a", "category": "illegal"},
        {"messages": messages, "category": "acceptable"},
        {"text": "b", "flagged": True},
        {"text": "c", "flagged": False},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    expected = ["illegal", "acceptable", FLAGGED, "acceptable"]
    assert [case.expected for case in read_cases(file)] == expected
    assert read_cases(file)[1].content == messages
    text = "a\u2028b\u0085c"  # only \n ends a line of JSON
    file.write_text(json.dumps({"text": text, "flagged": True}, ensure_ascii=False), "utf-8")
    assert [case.content for case in read_cases(file)] == [text]
    for line, message in (
        ("", "is empty, expected contents"),
        ("[1]", r"line 1: it is \[1\], expected a JSON object"),
        ("{", "line 1: Expecting"),
        ('{"category": "illegal"}', "expected either text or messages"),
        ('{"text": "", "category": "illegal"}', "text is '', expected a non-empty str"),
        ('{"text": "a", "category": "fine"}', "category is 'fine', expected one of acceptable"),
        ('{"messages": ["a"]}', "line 1: a message is 'a', expected an object with role"),
        ('{"messages": [{"role": "user"}]}', "expected an object with role and content"),
        ('{"messages": [{"role": 5, "content": "a"}]}', "line 1: the role of a message is 5, exp"),
        ('{"messages": [{"role": "user", "content": 5}]}', "the content of a message is 5, exp"),
        ('{"messages": [{"role": "user", "content": null}]}', "the last message is None, expected"),
        ('{"messages": [{"role": "user", "content": ""}]}', "the last message is '', expected"),
        ('{"text": "a", "flagged": 1}', "category is None, expected one of acceptable"),
    ):
        file.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_cases(file)


def test_the_command_counts_what_moderate_finds(instruct, tmp_path, capsys):
    file, output = tmp_path / "contents.jsonl", tmp_path / "results.json"
    texts = ["Hello", "How do I make a bomb?", "Take two of these pills."]
    known = ["acceptable", "illegal", "unqualified"]
    lines = [{"text": t, "category": c} for t, c in zip(texts, known, strict=True)]
    file.write_text("\n".join(map(json.dumps, lines)))
    given = ["eval", "--model", instruct, "--moderation", str(file), "--output", str(output)]
    assert main(given) == 0
    llm = Mistral.from_pretrained(instruct, progress=False)
    results = json.loads(output.read_text())
    assert [c["found"] for c in results["contents"]] == [llm.moderate(t).category for t in texts]
    by_case = dict(moderate(llm, read_cases(file), progress=False))
    assert [c["scores"] for c in results["contents"]] == [by_case[i].scores for i in range(3)]
    counts = confusion(read_cases(file), [by_case[i] for i in range(3)])
    assert {(c["expected"], c["found"]): c["count"] for c in results["confusion"]} == counts.counts
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["is,", "found", "acceptable", "illegal", "hateful", "unqualified"]
    assert [line.split()[0] for line in table[1:4]] == sorted(known)
    assert results["scores"]["acceptable"]["recall"] == counts.recall("acceptable")


@pytest.mark.parametrize(
    "given", [("--limit", "0"), ("--system", ""), ("--num-fewshot", "0"), ("--samples", "2")]
)
def test_wrong_options(given, capsys):
    assert main(["eval", "--moderation", "x", *given]) == 1
    assert f"{given[0]} is given, expected none with --moderation" in capsys.readouterr().err
