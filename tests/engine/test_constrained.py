"""Completions that have to match something, beside others and beside every other option."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import pydantic
import pytest
from replays import Replays

from mistral_ext import Mistral, SamplingParams
from mistral_ext.engine import engine
from mistral_ext.engine.graph_runner import GraphRunner
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text import grammar
from mistral_ext.text.constraint import Constraint

PROMPT = "Once upon a time there was"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    age: int = pydantic.Field(ge=0, lt=100)


@pytest.fixture(scope="module")
def llm():
    return Mistral.from_pretrained(DEMO_MODEL)


@pytest.fixture(params=["in time", "one ahead"])
def fresh(request, monkeypatch):
    """Makes engines of their own, on both runners; a GPU's is stood in for."""
    if request.param == "one ahead":
        monkeypatch.setattr(engine, "make_runner", lambda *args: GraphRunner(*args, Replays()))

    def make(**options):
        return Mistral.from_pretrained(DEMO_MODEL, **options)

    return make


MIXED = [
    {"schema": SCHEMA, "temperature": 1.0},
    {"temperature": 1.0, "max_tokens": 70},
    {"regex": "[a-z]{3,30}", "temperature": 0.7, "top_p": 0.9, "logprobs": 3},
    {"max_tokens": 50},
    {"schema": SCHEMA, "presence_penalty": 1.0, "logit_bias": {13: -20.0}, "logprobs": 0},
    {"grammar": 'start: "a" | "b" start', "repetition_penalty": 0.8, "temperature": 1.0},
    {"temperature": 1.0, "frequency_penalty": 0.5, "logprobs": 2, "max_tokens": 40},
]


def requests_of(llm, kinds=MIXED):
    ids = llm.tokenizer.encode(PROMPT)
    params = (SamplingParams(**{"max_tokens": 120, "seed": i} | o) for i, o in enumerate(kinds))
    return [llm.request(ids[: 2 + i], p, index=i % 3) for i, p in enumerate(params)]


def run(llm, requests):
    outputs = llm.engine.outputs(requests)
    ended = {o.request_id: o.completion or o.error for o in outputs if o.is_last}
    return [ended[i] for i in outputs.request_ids]


def content(completion):
    return completion.token_ids, completion.text, completion.finish_reason, completion.logprobs


@pytest.fixture(scope="module")
def expected(llm):
    """What each of them gets from an engine of its own."""
    engines = [Mistral(llm.config, llm.model, llm.tokenizer, llm.folder) for _ in MIXED]
    return [content(run(e, [requests_of(e)[i]])[0]) for i, e in enumerate(engines)]


def test_8_with_and_without_a_constraint_in_a_batch(expected, fresh):
    other = fresh()
    assert [content(c) for c in run(other, requests_of(other))] == expected
    assert [content(c) for c in run(other, requests_of(other)[::-1])] == expected[::-1]
    jsonschema.validate(json.loads(expected[0][1]), SCHEMA)
    assert re.fullmatch("[a-z]{3,30}", expected[2][1])
    assert re.fullmatch("b*a", expected[5][1])


def test_9_one_row_after_another(expected, fresh):
    other = fresh(max_batch=1)
    assert [content(c) for c in run(other, requests_of(other))] == expected


def test_a_constraint_that_comes_and_goes_leaves_a_running_batch_alone(llm, fresh):
    """It has one token, so the batch around it is the same before and after."""
    kinds = [{"temperature": 1.0, "max_tokens": 40}, {"regex": "a"}]
    expected = content(run(llm, requests_of(llm, kinds)[:1])[0])
    other = fresh()
    free, short = requests_of(other, kinds)
    outputs = other.engine.outputs([free])
    for _ in range(5):
        next(outputs)
    outputs.add(short)
    ended = [o.completion for o in outputs if o.is_last]
    assert [c.text for c in ended if c.text == "a"] == ["a"]
    assert expected in [content(c) for c in ended]


def test_what_is_put_back_goes_on_where_it_was(fresh):
    """There is room for both prompts, and for one completion."""
    llm = fresh(cache_tokens=530, sliding_window=None)
    params = SamplingParams(max_tokens=40, regex="([a-z]{1,9}[ ,])*", temperature=1.0, seed=1)
    requests = [llm.request([i + 5, *range(5, 245)], params, index=i) for i in range(2)]
    expected = [content(run(llm, [request])[0]) for request in requests]
    assert {finish for _, _, finish, _ in expected} == {"length"}
    assert llm.engine.load.preemptions == 0
    requests = [llm.request(r.prompt_ids, params, index=r.index) for r in requests]
    assert [content(c) for c in run(llm, requests)] == expected
    assert llm.engine.load.preemptions == 1


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_it_ends_only_when_the_text_is_whole(llm, ignore_eos):
    """Though the model wants nothing but its end."""
    bias = {llm.tokenizer.eos_id: 100.0}
    options = {"logit_bias": bias, "ignore_eos": ignore_eos}
    for kind in ({"schema": SCHEMA}, {"regex": "[a-z]{5,9}"}, {"grammar": 'start: "x"~3..6'}):
        (completion,) = llm.generate(PROMPT, max_tokens=150, **kind, **options)
        assert completion.finish_reason == "stop"
        if "schema" in kind:
            jsonschema.validate(json.loads(completion.text), SCHEMA)
        elif ignore_eos:  # it goes on as long as it can
            assert len(completion.text) == (9 if "regex" in kind else 6)
        else:
            least = 5 if "regex" in kind else 3
            *before, _, last = completion.token_ids
            assert len(llm.tokenizer.decode(before)) < least <= len(completion.text)
            assert last == llm.tokenizer.eos_id


def test_end_tokens_of_the_caller_wait_too(llm):
    ids = llm.tokenizer.encode(PROMPT)
    *_, q = (i for i in range(llm.tokenizer.vocab_size) if llm.tokenizer.token_bytes(i) == b"q")
    params = SamplingParams(max_tokens=50, regex="[pqr]{7,20}", logit_bias={q: 50.0})
    (completion,) = run(llm, [llm.request(ids, params, stop_token_ids=[q])])
    assert re.fullmatch("[pr]{7,20}", completion.text)
    assert completion.token_ids[-1] == q


def test_max_tokens_cuts(llm):
    (completion,) = llm.generate(PROMPT, regex="[a-z]{100}", max_tokens=6)
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 6
    # What ends with the last token that it may have is whole.
    length = len(llm.generate(PROMPT, regex="[a-z]{20}", max_tokens=99)[0].token_ids)
    assert llm.generate(PROMPT, regex="[a-z]{20}", max_tokens=length)[0].finish_reason == "stop"


def test_stop_strings_cut_as_ever(llm):
    options = {"regex": "([ab]{4}!){9}", "temperature": 1.0, "seed": 1, "max_tokens": 99}
    (completion,) = llm.generate(PROMPT, stop="!", **options)
    assert re.fullmatch("[ab]{4}", completion.text)
    assert completion.finish_reason == "stop"


def test_n_completions_differ_and_all_match(llm):
    completions = llm.generate(PROMPT, schema=Person, n=5, temperature=1.0, seed=1, max_tokens=150)
    assert len({completion.text for completion in completions}) == 5
    for completion in completions:
        Person.model_validate_json(completion.text)


def test_schemas_of_every_form_are_the_same(llm):
    schema = Person.model_json_schema() | {"additionalProperties": False}
    forms = Person, schema, json.dumps(schema)
    texts = {llm.generate(PROMPT, schema=form, max_tokens=99)[0].text for form in forms}
    assert len(texts) == 1
    Person.model_validate_json(texts.pop())


def test_stream_and_chat(llm):
    stream = llm.stream(PROMPT, regex="(ab){3}", max_tokens=20)
    assert "".join(stream) == "ababab"
    assert stream.completion.finish_reason == "stop"
    messages = [{"role": "user", "content": PROMPT}]
    reply = llm.chat(messages, template="v1", regex=" ?yes!", max_tokens=20)
    assert reply.text in ("yes!", " yes!")
    reply = llm.chat(messages, template="v1", schema=SCHEMA, temperature=1.0, max_tokens=150)
    jsonschema.validate(json.loads(reply.text), SCHEMA)
    turns = llm.start_chat(template="v1")
    assert "".join(turns.send("Hello", regex="[0-9]{4}")).isdecimal()
    assert "".join(turns.send("Hello", regex="[a-f]{4}")).isalpha()


def test_a_bias_against_all_that_matches_is_an_error(llm):
    ids = {i: -float("inf") for i in range(llm.tokenizer.vocab_size) if i != 500}
    free, banned = {"max_tokens": 5}, {"regex": "[0-9]+", "logit_bias": ids}
    completion, error = run(llm, requests_of(llm, [free, banned]))
    assert completion.finish_reason == "length"
    assert "no token is left" in str(error)


def test_too_much_work_on_the_way_is_an_error_and_passes(llm, monkeypatch):
    """The automaton of this one grows with each token, and is shared by all who ask for it."""
    monkeypatch.setitem(grammar._LIMITS, "max_lexer_states", 120)
    tokenizer = llm.tokenizer
    ends = [i for i in range(tokenizer.vocab_size) if b"z" in tokenizer.token_bytes(i)]
    hard = {"regex": "(a|b)*a(a|b){12}z", "temperature": 3.0}
    free, hard["logit_bias"] = {"max_tokens": 5}, dict.fromkeys(ends, -50.0)
    completion, error = run(llm, requests_of(llm, [free, {**hard, "max_tokens": 300}]))
    assert completion.finish_reason == "length"
    assert "too many states" in str(error)
    (again,) = run(llm, requests_of(llm, [{**hard, "max_tokens": 3}]))
    assert again.finish_reason == "length"


def test_guesses_do_not_spend_the_limits_of_a_completion(llm, monkeypatch):
    """Looking ahead makes the automaton larger, which all completions of a grammar share."""
    monkeypatch.setitem(grammar._LIMITS, "max_lexer_states", 2000)
    compiler = grammar.GrammarCompiler(llm.tokenizer)
    compiled = compiler.compile(Constraint("regex", r"(.*a.{14}b|.*c.{10}d)+"))
    matcher, other = compiled.matcher(), compiled.matcher()
    chosen, guessed = random.Random(1), random.Random(2)
    for _ in range(20):
        allowed = np.flatnonzero(matcher.allowed).tolist()
        ahead = matcher.ahead()
        for _ in range(7):
            guess = guessed.choice(allowed)
            if not ahead.may_take(guess) or ahead.take(guess) is None:
                break
        matcher.consume(chosen.choice(allowed))
    assert compiled.is_spent  # else the test shows nothing
    other.consume(chosen.choice(np.flatnonzero(other.allowed).tolist()))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"schema": {}, "regex": "a"}, ValueError, "schema and regex are given"),
        ({"schema": 5}, TypeError, "schema is 5"),
        ({"schema": object()}, ValueError, "schema is not JSON"),
        ({"schema": {"enum": [float("nan")]}}, ValueError, "not JSON"),
        ({"schema": {"const": "\ud800"}}, ValueError, "Unicode"),
        ({"schema": {"not": {}}}, ValueError, 'schema cannot be used: .*"not"'),
        ({"regex": 5}, TypeError, "regex is 5"),
        ({"regex": "["}, ValueError, "regex cannot be used: .*unclosed"),
        ({"grammar": "start: x"}, ValueError, "grammar cannot be used: .*x"),
    ],
)
def test_what_is_wrong_is_named(llm, options, error, words):
    with pytest.raises(error, match=words):
        llm.generate(PROMPT, **options)


def test_without_a_tokenizer_or_the_library(llm, monkeypatch):
    bare = Mistral(llm.config, llm.model, None, llm.folder)
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.generate([[1, 2]], regex="a")
    monkeypatch.setattr(grammar, "find_spec", lambda name: None)
    fresh = Mistral(llm.config, llm.model, llm.tokenizer, llm.folder)
    with pytest.raises(ImportError, match=r"pip install 'mistral_ext\[structure\]'"):
        fresh.generate(PROMPT, regex="a")
