"""A draft model changes nothing but the speed, and its cache keeps in step with the sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import write_peft
from checkpoints import write_checkpoint
from drafting import (
    VOCABULARY,
    WINDOW,
    assert_empty,
    content,
    engine_of,
    of_every_kind,
    plainly,
    prompt,
    request,
    run,
)
from replays import Replays

from mistral_ext import Mistral
from mistral_ext.engine import drafts, memory
from mistral_ext.engine import engine as engine_module
from mistral_ext.engine.draft_model import DraftModel
from mistral_ext.engine.drafts import default_drafts
from mistral_ext.engine.graph_runner import GraphRunner
from mistral_ext.engine.model_guesses import ModelGuesses
from mistral_ext.engine.pass_costs import PassCosts
from mistral_ext.engine.proposer import Proposer
from mistral_ext.engine.runner import Runner
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.sequence import Sequence
from mistral_ext.llm import DEMO_MODEL, _expect_drafts
from mistral_ext.model.transformer import Transformer


@pytest.fixture(scope="module")
def rough(tmp_path_factory):
    """window -> what `models` has with another last norm: often right and often wrong about it."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, sliding_window=WINDOW, max_position_embeddings=4096)
    rough = {}
    for window in (None, WINDOW):
        llm = Mistral.from_pretrained(folder, dtype=torch.bfloat16, sliding_window=window)
        llm.model.norm = llm.model.norm * (1 + 0.3 * torch.randn(128)).to(torch.bfloat16)
        rough[window] = llm.model
    return rough


@pytest.fixture
def eager(monkeypatch):
    """Passes cost the same whatever their rows, and guesses next to nothing."""
    monkeypatch.setattr(PassCosts, "seconds", lambda self, rows: 1.0)
    monkeypatch.setattr(ModelGuesses, "_seconds", lambda self, sequences: 0.01)


def pool_of(engine):
    return engine.passes.drafter._model._model.pool


def drop_kept(model):
    """Frees what ended sequences have left in a draft model's cache."""
    while model.prefixes.drop_oldest():
        pass


def assert_all_is_free(engine):
    drop_kept(engine.passes.drafter._model._model)
    assert pool_of(engine).free_slots == pool_of(engine).slots
    assert_empty(engine)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("is_ahead", [False, True], ids=["in time", "ahead"])
def test_nothing_else_changes(models, rough, eager, monkeypatch, window, is_ahead):
    """With every option, in batches, beyond where rings wrap and extents grow."""
    requests = of_every_kind(2)
    plain, _ = plainly(lambda: engine_of(models[window]), requests)
    if is_ahead:
        make = lambda *args: GraphRunner(*args, Replays())  # noqa: E731
        monkeypatch.setattr(engine_module, "make_runner", make)
    other = WINDOW if window is None else None  # its ring need not be like the model's
    engine = engine_of(models[window], draft_model=rough[other])
    drafted = run(engine, requests)
    assert [content(c) for c in drafted] == [content(c) for c in plain]
    accepted = sum(c.timing.accepted_tokens for c in drafted)
    assert 20 < accepted < sum(c.timing.drafted_tokens for c in drafted)
    assert_all_is_free(engine)


def test_a_model_that_is_the_same_is_right(models, eager, only_models_guess):
    """Greedy or drawn: it chooses with the noise of the sequence."""
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "presence_penalty": 1.0}):
        engine = engine_of(models[None], draft_model=models[None])
        (completion,) = run(engine, [request(prompt(40), 60, **options)])
        timing = completion.timing
        assert timing.accepted_tokens == timing.drafted_tokens > 45


@pytest.mark.parametrize("window", [None, WINDOW])
def test_wrong_guesses_are_rewound(models, rough, window):
    """After texts of other tokens than were guessed, guesses are those of an empty cache."""
    sampler = Sampler(2, VOCABULARY)
    sequences = []
    for row, length in enumerate((30, WINDOW + 20)):
        given = request(prompt(length, row), 300, seed=row, temperature=float(row))
        sequence = Sequence(row, given, VOCABULARY)
        sequence.row = row
        sampler.start(row, given.params, sequence.ids)
        sequences.append(sequence)

    def make():
        return DraftModel(models[window], sampler, 2, 2048, 16, Runner)

    def tokens(model):
        while len(model.prepare(sequences)) < 2:
            pass
        passes = model.guess(sequences)
        return [[token_id for token_id, _ in next(passes)] for _ in range(7)]

    kept = make()
    for added in ((5,), (6, 7, 8), (), (9,) * 4, tuple(range(3, 43)), (11, 12)):
        guessed = tokens(kept)
        assert guessed == tokens(make())
        for i, sequence in enumerate(sequences):
            right = [guess[i] for guess in guessed[: len(added)]]
            sequence.ids += [*right[:-1], *added]
    assert kept.pool.free_slots < kept.pool.slots
    kept.keep_only(sequences[:1])
    kept.keep_only([])
    drop_kept(kept)
    assert kept.pool.free_slots == kept.pool.slots


@pytest.mark.parametrize("window", [None, WINDOW])
def test_what_is_put_back_is_the_same(models, rough, eager, window):
    """Too little memory for all, in the draft model's cache too."""
    requests = [request(prompt(n, n), 150, seed=n) for n in (120, 130)]
    plain, _ = plainly(lambda: engine_of(models[window]), requests)
    memory = {"cache_tokens": 520 if window is None else 300}
    engine = engine_of(models[window], draft_model=rough[window], **memory)
    assert [content(c) for c in run(engine, requests)] == [content(c) for c in plain]
    assert (engine.scheduler.preemptions > 0) == (window is None)
    assert_all_is_free(engine)


def test_sequences_without_room_have_no_guesses(models, rough, eager):
    requests = [request(prompt(40), 30), request(prompt(41), 30)]
    plain, _ = plainly(lambda: engine_of(models[None]), requests)
    engine = engine_of(models[None], draft_model=rough[None])
    pool = pool_of(engine)
    taken = pool.allocate(pool.slots, pool.slots)
    drafted = run(engine, requests)
    assert [content(c) for c in drafted] == [content(c) for c in plain]
    assert [c.timing.drafted_tokens for c in drafted] == [0, 0]
    pool.release(taken)
    assert all(c.timing.drafted_tokens > 0 for c in run(engine, requests))
    assert_all_is_free(engine)


def test_memory_is_freed_with_the_request(models, rough, eager):
    """When it ends, when it is aborted, and when it fails."""
    requests = [request(prompt(40 + i), 12 + 100 * i) for i in range(3)]
    engine = engine_of(models[None], draft_model=rough[None])
    first, second, _ = (engine.add(r) for r in requests)
    pool, free = pool_of(engine), []
    while engine.has_work:
        ended = {output.request_id for output in engine.step() if output.is_last}
        drop_kept(engine.passes.drafter._model._model)
        free.append(pool.free_slots)
        if first in ended:
            engine.abort(second)
        if len(free) == 20:
            engine.runner.launch = engine.runner.verify = None
    # The first has 59 slots, all that it may need with 7 guesses; the second 160, the third 256.
    used = dict.fromkeys(pool.slots - slots for slots in free)
    assert [*used] == [59 + 160 + 256, 160 + 256, 256, 0]
    assert_all_is_free(engine)


def test_a_draft_model_that_fails_leaves_sequences_without_drafts(models, eager, caplog):
    requests = [request(prompt(40), 30)]
    plain, _ = plainly(lambda: engine_of(models[None]), requests)
    engine = engine_of(models[None], draft_model=models[None])
    guesser = engine.passes.drafter._model._model
    guesser._runner.launch = None
    assert [content(c) for c in run(engine, requests)] == [content(c) for c in plain]
    assert [r.message for r in caplog.records] == [
        "a completion goes on without drafts: 'NoneType' object is not callable"
    ]
    assert_all_is_free(engine)


def test_guesses_that_are_not_worth_their_time_are_not_made(models, rough, monkeypatch):
    monkeypatch.setattr(PassCosts, "seconds", lambda self, rows: 1.0)
    engine = engine_of(models[None], draft_model=rough[None])  # whose passes cost as much
    asked = []
    monkeypatch.setattr(DraftModel, "prepare", lambda self, sequences: asked.append(1) or [])
    (completion,) = run(engine, [request(prompt(40), 30)])
    assert completion.timing.drafted_tokens == 0
    assert not asked
    monkeypatch.setattr(ModelGuesses, "_seconds", lambda self, rows: 0.01)
    run(engine, [request(prompt(40), 30)])
    assert asked


def reads_of(engine):
    """The numbers of tokens of each pass of `DraftModel.prepare`, from now on."""
    runner, counts = engine.passes.drafter._model._model._runner, []
    read = runner.read

    def counted(pieces):
        counts.append([len(piece.token_ids) for piece in pieces])
        return read(pieces)

    runner.read = counted
    return counts


@pytest.mark.parametrize(("max_tokens", "is_read"), [(5, False), (10, False), (40, True)])
def test_a_text_is_read_if_much_is_left_to_write(models, rough, eager, max_tokens, is_read):
    engine = engine_of(models[None], draft_model=rough[None])
    counts = reads_of(engine)
    (completion,) = run(engine, [request(prompt(200), max_tokens)])  # 7 steps of 32 tokens
    assert (sum(map(sum, counts)) >= 190) == bool(counts) == is_read
    assert (completion.timing.drafted_tokens > 0) == is_read


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_next_turn_of_a_chat_is_not_read_whole(models, rough, eager, window):
    """It begins with the tokens of the turn before; nothing else changes."""
    engine, ids = engine_of(models[window], draft_model=rough[window]), []
    counts = reads_of(engine)
    for new in (60 if window else 300, 10, 40):
        turn = request([*ids, *prompt(new, new)], 60)
        (plain,), _ = plainly(lambda: engine_of(models[window]), [turn])
        counts.clear()
        (drafted,) = run(engine, [turn])
        assert content(drafted) == content(plain)
        assert drafted.timing.accepted_tokens > 0
        # The last guesses of a turn came from its text, so the draft model has not read all of it.
        assert new - 10 < sum(map(sum, counts)) < new + 60
        ids = [*turn.prompt_ids, *plain.token_ids]
    assert_all_is_free(engine)


def test_sequences_of_another_salt_read_for_themselves(models, rough, eager):
    engine = engine_of(models[None], draft_model=rough[None])
    counts, read = reads_of(engine), []
    for salt in ("a", "a", "b"):
        counts.clear()
        run(engine, [replace(request(prompt(200), 60), salt=salt)])
        read.append(sum(map(sum, counts)))
    assert read[1] < 50 < 150 < read[0]
    assert read[2] == read[0]


def test_what_is_kept_makes_room_for_what_runs(models, rough, eager):
    """With room for one sequence alone."""
    engine = engine_of(models[None], draft_model=rough[None], cache_tokens=512)
    for seed in range(4):
        (completion,) = run(engine, [request(prompt(250, seed), 150)])
        assert completion.timing.accepted_tokens > 0
        assert pool_of(engine).free_slots < 512
    assert_all_is_free(engine)


def test_sequences_share_the_tokens_that_a_step_reads(models, rough, eager):
    """So that a step takes no longer with more of them."""
    engine = engine_of(models[None], draft_model=rough[None])
    counts = reads_of(engine)
    completions = run(engine, [request(prompt(100 + n, n), 60) for n in range(3)])
    assert max(map(sum, counts)) == 32
    assert any(len(counted) > 1 for counted in counts)
    assert all(c.timing.drafted_tokens > 0 for c in completions)


def test_a_pass_of_guesses_has_few_rows_and_is_noted_by_them(models, rough, eager, monkeypatch):
    """With several sequences that have several unread tokens each."""
    engine = engine_of(models[None], draft_model=rough[None])
    runner, rows, noted = engine.passes.drafter._model._model._runner, [], []
    launch, verify = runner.launch, runner.verify
    runner.launch = lambda *given: rows.append(len(given[1])) or launch(*given)
    runner.verify = lambda *given: rows.append(sum(map(len, given[2]))) or verify(*given)
    costs = engine.passes.drafter._model.costs
    monkeypatch.setattr(costs, "note", lambda rows, seconds: noted.append(rows))
    guess, turns = ModelGuesses.guess, iter(range(1000))

    def seldom(self, plain, asking):
        return guess(self, plain, asking) if next(turns) % 3 == 0 else {}

    prepare = DraftModel.prepare
    monkeypatch.setattr(ModelGuesses, "guess", seldom)
    ready = []

    def prepared(self, sequences):
        ready.append(len(sequences) == len(prepare(self, sequences)))
        return list(sequences) if ready[-1] else []

    monkeypatch.setattr(DraftModel, "prepare", prepared)
    requests = [request(prompt(40, n), 60) for n in range(4)]
    assert sum(c.timing.accepted_tokens for c in run(engine, requests)) > 5
    assert noted == [n for i, n in enumerate(rows) if n in rows[:i]]  # the first is recorded
    assert max(rows) == 8
    assert sum(ready) > 20


def test_wrong_guesses_end(models, eager, monkeypatch):
    """Another model is never right: the sequence loses a few tokens, and no more."""
    engine = engine_of(models[None], draft_model=models[WINDOW])
    follow = Sampler.follow

    def otherwise(self, other, rows):
        follow(self, other, rows)
        self._noise += 1

    monkeypatch.setattr(Sampler, "follow", otherwise)
    (completion,) = run(engine, [request(prompt(40), 200, temperature=2.0, seed=0)])
    assert completion.timing.accepted_tokens == 0
    assert completion.timing.drafted_tokens < 60


TEXTS = [
    {"stop": ["the ", "and"], "max_tokens": 40},
    {"stop": "a", "temperature": 1.0, "logprobs": 0},
    {"regex": "[a-z]{3,30} the [a-z]{3,30}", "temperature": 0.7, "top_p": 0.9},
    {"grammar": 'start: word{9}\nword: " a" | " the" | " in"', "temperature": 1.0},
]


@pytest.fixture
def only_models_guess(monkeypatch):
    monkeypatch.setattr(Proposer, "_repeated", lambda self, most: [])
    monkeypatch.setattr(Proposer, "_matching", lambda self, most, matcher: [])


@pytest.mark.parametrize("options", TEXTS)
def test_texts_and_what_they_have_to_match(eager, only_models_guess, options):
    """And again, when the prompt is in the caches of both models."""
    draft = Mistral.from_pretrained(DEMO_MODEL, quantize="int4")
    llm = Mistral.from_pretrained(DEMO_MODEL, draft_model=draft)
    options = {"max_tokens": 30, "seed": 3, "n": 2} | options
    words = "Once upon a time there was a small fox who lived in a wood near a village. " * 3
    plain = llm.generate(words, drafts=0, **options)
    for is_again in (False, True):
        drafted = llm.generate(words, **options)
        assert [content(c) for c in drafted] == [content(c) for c in plain]
        assert sum(c.timing.accepted_tokens for c in drafted) > 0
        assert drafted[0].timing.cached_tokens > 0 or not is_again


@pytest.mark.parametrize(
    "options",
    [{"regex": "[a-z]+( [a-z]{2,5}){99}"}, {"grammar": 'start: word{99}\nword: " a" | " the"'}],
)
def test_a_model_that_is_the_same_is_right_about_what_has_to_match(
    eager, only_models_guess, options
):
    """No guess is drawn where other tokens are allowed."""
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 3} | options
    llm = Mistral.from_pretrained(DEMO_MODEL, draft_model=Mistral.from_pretrained(DEMO_MODEL))
    (completion,) = llm.generate(["Once upon a time"], **options)
    assert completion.timing.accepted_tokens == completion.timing.drafted_tokens > 10


def test_sequences_have_their_adapters(tmp_path, eager):
    base = write_checkpoint(tmp_path / "base", intermediate_size=256)
    write_peft(base, tmp_path / "a")
    adapters = {"a": tmp_path / "a"}
    draft = Mistral.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, quantize="int4")
    llm = Mistral.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16, adapters=adapters, draft_model=draft
    )
    prompts, names = [prompt(9), prompt(40, 1), prompt(5, 2)], ["a", None, "a"]
    options = {"max_tokens": 30, "ignore_eos": True, "seed": 1, "temperature": 0.5, "logprobs": 0}
    plain = llm.generate(prompts, adapter=names, drafts=0, **options)
    drafted = llm.generate(prompts, adapter=names, **options)
    assert [content(c) for c in drafted] == [content(c) for c in plain]
    assert sum(c.timing.accepted_tokens for c in drafted) > 5


def test_a_gpu_has_drafts_by_default_with_a_draft_model_only(models, eager, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [default_drafts(device, False) for device in (gpu, cpu)] == [0, 7]
    assert [default_drafts(device, True) for device in (gpu, cpu)] == [7, 7]
    monkeypatch.setitem(drafts._DRAFTS, "cpu", 0)
    again = request([20, 21, 22, 20, 21], 30, temperature=0.0, logit_bias=dict.fromkeys((20,), 99))
    for given in (None, models[None]):
        (completion,) = run(engine_of(models[None], draft_model=given), [again])
        assert (completion.timing.drafted_tokens > 0) == (given is not None)


def test_two_models_and_their_caches_share_the_memory(models, rough, monkeypatch):
    """Half of the memory beside the weights is for both caches."""
    model, other = models[None], rough[None]
    token_bytes = model.config.cache_bytes(model.dtype)
    weights = model.nbytes + other.nbytes
    monkeypatch.setattr(memory, "available_memory", lambda: weights + 2 * 10_000 * token_bytes)
    for given, slots in ((None, 10_000 + other.nbytes // (2 * token_bytes)), (other, 5_000)):
        engine = engine_of(model, cache_tokens=None, draft_model=given)
        assert engine.pool.slots == slots
    assert pool_of(engine).nbytes + engine.pool.nbytes == 10_000 * token_bytes


def test_another_vocabulary_is_refused(tmp_path):
    small = tmp_path / "small"
    write_checkpoint(small, vocab_size=100)
    with pytest.raises(ValueError, match="small, whose vocabulary has 100 tokens, expected"):
        Mistral.from_pretrained(DEMO_MODEL, draft_model=small)
    other = Mistral.from_pretrained(DEMO_MODEL)
    token_bytes = list(other.tokenizer._token_bytes)
    token_bytes[300] += b"s"
    other.tokenizer._token_bytes = token_bytes
    with pytest.raises(ValueError, match=r"whose token 300 is b'.+s', expected b'.+' as in "):
        Mistral.from_pretrained(DEMO_MODEL, draft_model=other)
    del token_bytes[300:]
    token_bytes += [None] * (other.tokenizer.vocab_size - 300)
    with pytest.raises(ValueError, match=r"whose token 300 is missing, expected b'.+' as in "):
        Mistral.from_pretrained(DEMO_MODEL, draft_model=other)


@pytest.mark.parametrize(
    ("draft", "model", "is_same"),
    [
        ("cuda:1", "cuda", True),
        ("cuda", "cuda:1", True),
        ("cuda:0", "cuda", False),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cpu:0", True),
        ("cpu", "cuda", False),
    ],
)
def test_the_current_device_has_two_names(monkeypatch, draft, model, is_same):
    """Weights that were moved to "cuda" are on "cuda:0"."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    other = Mistral.from_pretrained(DEMO_MODEL)
    monkeypatch.setattr(Transformer, "device", torch.device(draft))
    given = other.vocabulary, torch.device(model), None, other
    if is_same:
        _expect_drafts(*given)
        return
    with pytest.raises(ValueError, match=f"draft_model is on {draft}, expected {model} like the"):
        _expect_drafts(*given)
