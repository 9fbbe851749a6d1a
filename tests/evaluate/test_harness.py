"""lm-evaluation-harness on our models, against its own model of transformers."""

from __future__ import annotations

import dataclasses
import gc
import json

import pytest
import torch
from checkpoints import TOKENIZERS, write_checkpoint
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskIndex
from sqlitedict import SqliteDict

from mistral_ext.cli import eval as eval_command
from mistral_ext.cli import main
from mistral_ext.evaluate.harness import evaluate, harness_model
from mistral_ext.evaluate.likelihood import likelihoods
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.llm import Mistral

STORY = "Once upon a time there was a king who had three sons, and the youngest was called Hans."


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def assert_same(ours, theirs) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    expected = torch.tensor([logprob for logprob, _ in theirs])
    torch.testing.assert_close(
        torch.tensor([logprob for logprob, _ in ours]), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("shots", [0, 3])
def test_a_task_has_the_answers_of_transformers(llm, oracle, cloze, shots):
    ours = evaluate(llm, [cloze], num_fewshot=shots, progress=False)
    theirs = simple_evaluate(
        model=oracle,
        tasks=[cloze],
        num_fewshot=shots,
        task_manager=TaskManager(include_defaults=False),
    )
    assert len(ours["samples"]["cloze"]) == 8
    for mine, other in zip(ours["samples"]["cloze"], theirs["samples"]["cloze"], strict=True):
        assert mine["arguments"] == other["arguments"]
        assert_same(mine["filtered_resps"], other["filtered_resps"])
    assert ours["results"]["cloze"]["acc,none"] == theirs["results"]["cloze"]["acc,none"]
    assert ours["results"]["cloze"]["acc_norm,none"] == theirs["results"]["cloze"]["acc_norm,none"]


def test_likelihoods_of_all_kinds_of_contexts(llm, oracle):
    arguments = [
        ("", STORY),  # none: <s>
        ("<s>Once", " upon"),  # spelled out: not a second one
        (STORY + " ", "Then"),  # the space belongs to the continuation
        (STORY, " He"),
        (STORY, " He was tall."),
        (" ".join([STORY] * 20), " The end."),  # past the window, and past a pass
    ]
    given = instances("loglikelihood", *arguments)
    ours = harness_model(llm, progress=False).loglikelihood(given, disable_tqdm=True)
    assert_same(ours, oracle.loglikelihood(given, disable_tqdm=True))


def test_whole_texts(llm):
    """The harness' own model would put a second <s> before them."""
    texts = [STORY, " ".join([STORY] * 10), "a"]
    given = instances("loglikelihood_rolling", *[(text,) for text in texts], ("",))
    ours = harness_model(llm, progress=False).loglikelihood_rolling(given)
    measured = [perplexity(llm, text, progress=False) for text in texts]
    expected = [-each.nll * each.tokens for each in measured]
    assert ours == pytest.approx([*expected, 0.0], rel=1e-5, abs=1e-4)


def test_an_embedding_model_is_refused(llm, monkeypatch):
    monkeypatch.setattr(llm, "config", dataclasses.replace(llm.config, writes_text=False))
    with pytest.raises(ValueError, match="is an embedding model"):
        harness_model(llm)


@pytest.mark.parametrize(
    "options",
    [
        {"until": ["."], "max_gen_toks": 40},
        {"until": "\n", "max_new_tokens": 7, "do_sample": False, "temperature": 0.7},
        {"max_gen_toks": 12},
    ],
)
def test_completions(llm, oracle, options):
    given = instances("generate_until", (STORY, options), ("The wolf said", options))
    ours = harness_model(llm, progress=False).generate_until(given, disable_tqdm=True)
    theirs = oracle.generate_until(given, disable_tqdm=True)
    # transformers drops the space before the first word of a completion.
    assert [text.lstrip(" ") for text in ours] == [text.lstrip(" ") for text in theirs]
    assert all(ours)


@pytest.mark.parametrize("more", [{"temperature": 1.0, "top_p": 0.95}, {}])
def test_sampled_completions_differ(llm, more):
    options = {"do_sample": True, "max_gen_toks": 20, **more}
    given = instances("generate_until", *[(STORY, options)] * 3)
    assert len({*harness_model(llm, progress=False).generate_until(given)}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0, expected a number above 0"),
        ({"limit": float("nan")}, "limit is nan, expected a number above 0"),
        ({"num_fewshot": -1}, "num_fewshot is -1, expected 0 or more"),
    ],
)
def test_numbers_out_of_range(llm, cloze, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(llm, [cloze], progress=False, **options)


def test_options_beyond_the_harness_own(llm, oracle):
    options = {"max_gen_toks": 30, "repetition_penalty": 1.7, "num_beams": 1, "top_k": 1}
    given = instances("generate_until", (STORY, options))
    (ours,) = harness_model(llm, progress=False).generate_until(given)
    assert [ours.lstrip(" ")] == oracle.generate_until(given, disable_tqdm=True)
    plain = instances("generate_until", (STORY, {"max_gen_toks": 30}))
    assert [ours] != harness_model(llm, progress=False).generate_until(plain)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("num_beams", 10, "expected 1"), ("length_penalty", 2.0, "expected none")],
)
def test_unknown_options_are_refused(llm, name, value, expected):
    given = instances("generate_until", (STORY, {"max_gen_toks": 3, name: value}))
    with pytest.raises(ValueError, match=f"generation_kwargs has {name}={value}, {expected}"):
        harness_model(llm, progress=False).generate_until(given)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model of 48 positions, and transformers' of the same weights."""
    folder = tmp_path_factory.mktemp("models") / "short"
    model = write_checkpoint(
        folder, vocab_size=32000, sliding_window=None, max_position_embeddings=48
    )
    (folder / "tokenizer.model").write_bytes(TOKENIZERS["v1"].read_bytes())
    return Mistral.from_pretrained(folder, dtype=torch.float32, progress=False), model


def test_texts_longer_than_the_model_knows_positions(short):
    """The context loses its beginning, a whole text is read in windows."""
    llm, model = short
    lm = harness_model(llm, progress=False)
    long = " ".join([STORY] * 6)
    with torch.no_grad():
        ids = lm.tok_encode(long + " The end.")
        assert len(ids) > 49
        logprobs = model.float()(torch.tensor([ids[-49:-1]])).logits[0].log_softmax(1)
    count = len(ids) - len(lm.tok_encode(long))
    expected = sum(logprobs[48 - count + i, ids[len(ids) - count + i]] for i in range(count))
    (got,) = lm.loglikelihood(instances("loglikelihood", (long, " The end.")), disable_tqdm=True)
    assert got[0] == pytest.approx(float(expected), abs=1e-3)

    assert len(ids) > 2 * 48
    expected, source, ids = 0.0, ids, ids[1:]
    for begin in range(0, len(ids), 48):
        end = min(begin + 48, len(ids))
        first = end - min(48, end)  # the last window begins before its first prediction
        with torch.no_grad():
            logprobs = model(torch.tensor([source[first:end]])).logits[0].log_softmax(1)
        expected += sum(float(logprobs[i - first, ids[i]]) for i in range(begin, end))
    (got,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (long + " The end.",)))
    assert got == pytest.approx(expected, abs=1e-2)


def test_no_room_for_a_completion(short):
    lm = harness_model(short[0], progress=False)
    with pytest.raises(ValueError, match="max_gen_toks is 48, expected fewer than 48"):
        lm.generate_until(instances("generate_until", ("a", {"max_gen_toks": 48})))
    (text,) = lm.generate_until(instances("generate_until", (STORY * 9, {"max_gen_toks": 4})))
    assert text


def test_a_context_is_read_once(llm, monkeypatch):
    context = llm.tokenizer.encode(" ".join([STORY] * 20))
    ends = [llm.tokenizer.encode(text, bos=False) for text in ("one.", "two.", "three.", "four.")]
    begin, counts = llm.engine.runner.begin, []

    def counted(pieces):
        counts.extend(len(piece.token_ids) for piece in pieces)
        return begin(pieces)

    monkeypatch.setattr(llm.engine.runner, "begin", counted)
    given = [(context, end) for end in ends]
    together = dict(likelihoods(llm, given, progress=False))
    assert sum(counts) <= len(context) + 8 + 3 * 40
    for i, pair in enumerate(given):
        ((_, alone),) = likelihoods(llm, [pair], progress=False)
        assert together[i].logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_conversations_have_the_tokens_of_chat(short, monkeypatch):
    llm, _ = short
    monkeypatch.setattr(llm, "chat_template", lambda template=None: "v1")
    lm = harness_model(llm, progress=False)
    history = [
        {"role": "user", "content": "Say [INST] </s>."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ]
    text = lm.apply_chat_template(history)
    assert text.startswith("<s>")
    assert lm.tok_encode(text) == llm.encode_chat(history)
    context, continuation = lm._encode_pair(text, "Because")
    assert context == llm.encode_chat(history)
    assert llm.tokenizer.decode(continuation) == "Because"
    begun = lm.apply_chat_template(
        [*history, {"role": "assistant", "content": "Because of"}], add_generation_prompt=False
    )
    assert lm.tok_encode(begun)[: len(context)] == context
    assert llm.tokenizer.decode(lm.tok_encode(begun)[len(context) :]) == "Because of"
    assert lm.chat_template(True) == "v1"
    assert lm.chat_template(False) == ""


def test_an_interrupted_run_goes_on(llm, cloze, tmp_path, monkeypatch):
    """Each answer is kept as soon as it is there."""
    begin, reads = llm.engine.runner.begin, []

    def fail_later(pieces):
        reads.append(len(pieces))
        if len(reads) == 3:
            raise RuntimeError("the power went off")
        return begin(pieces)

    monkeypatch.setattr(llm.engine.runner, "begin", fail_later)
    given = {"num_fewshot": 3, "cache": tmp_path / "answers", "progress": False}
    with pytest.raises(RuntimeError, match="the power"):
        evaluate(llm, [cloze], **given)
    gc.collect()  # closes the file
    with SqliteDict(tmp_path / "answers_rank0.db") as answers:
        assert 0 < len(answers) < 32
    results = evaluate(llm, [cloze], **given)["results"]
    monkeypatch.setattr(llm.engine.runner, "begin", lambda pieces: pytest.fail("read again"))
    assert evaluate(llm, [cloze], **given)["results"] == results


def test_wrong_tasks_are_refused(llm, monkeypatch):
    # The index of the harness' own tasks takes seconds.
    monkeypatch.setattr(TaskIndex, "build", lambda self, paths: {})
    with pytest.raises(ValueError, match="task is 'nonsense', expected a name"):
        evaluate(llm, ["nonsense"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        evaluate(llm, ["nowhere.yaml"])


def test_wrong_pairs_are_refused(llm, short):
    with pytest.raises(ValueError, match=r"pairs\[1\], the continuation, is empty"):
        list(likelihoods(llm, [([1], [2]), ([1], [])]))
    with pytest.raises(ValueError, match=r"pairs\[0\] has 49 tokens to read, expected 48 or fewer"):
        list(likelihoods(short[0], [([1] * 49, [2])]))


def test_the_command(cloze, tmp_path, capsys):
    task = tmp_path / "cloze.yaml"
    task.write_text(json.dumps(cloze))  # JSON is YAML
    output = tmp_path / "results.json"
    given = ["--tasks", str(task), "--num-fewshot", "2", "--limit", "4", "--output", str(output)]
    assert main(["eval", *given]) == 0
    table = capsys.readouterr().out
    assert "|cloze|" in table.replace(" ", "")
    results = json.loads(output.read_text())
    assert results["n-shot"] == {"cloze": 2}
    assert f"{results['results']['cloze']['acc,none']:.2f}" in table
    assert main(["eval", "--tasks", "x", "--output", str(tmp_path / "none" / "x")]) == 1
    assert "expected a file in a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--include", "x"], "--include is given, expected none with --paper"),
        (["--tasks", "humaneval"], "task is 'humaneval', which runs programs"),
        (["--tasks", "arc_easi"], "task is 'arc_easi', expected one of mmlu"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(given, message, monkeypatch, capsys):
    monkeypatch.setattr(eval_command, "load_adapted_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(["eval", "--paper", *given]) == 1
    assert message in capsys.readouterr().err
