"""Grammars over every kind of vocabulary."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import test_gguf_tokenizer as gguf
from checkpoints import TOKENIZERS
from sentencepiece import SentencePieceProcessor

from mistral_ext.text.constraint import Constraint, schema_text
from mistral_ext.text.grammar import GrammarCompiler
from mistral_ext.text.text_stream import TextStream
from mistral_ext.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "pattern": "^[A-Zé☃ ]{1,8}$"},
        "kind": {"enum": ["good", "bad ☺", 7, None]},
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["title", "kind", "items"],
    "additionalProperties": False,
}
_TREE = {"properties": {"leaf": {"type": "boolean"}, "next": {"$ref": "#/$defs/tree"}}}
_TREE |= {"type": "object", "required": ["leaf"], "additionalProperties": False}
TREE = {"$defs": {"tree": _TREE}, "$ref": "#/$defs/tree"}
SCHEMAS = {"schema": SCHEMA, "tree": TREE}
CONSTRAINTS = {
    **{kind: Constraint("schema", json.dumps(schema)) for kind, schema in SCHEMAS.items()},
    "regex": Constraint("regex", " ?(yes|no)( [☃-☺é]{2})?\n"),
    "grammar": Constraint("grammar", 'start: item ("," " "? item)*\nitem: "«" /[a-c]{1,3}/ "»"'),
}
PATTERNS = {
    "regex": " ?(yes|no)( [☃-☺é]{2})?\n",
    "grammar": "«[a-c]{1,3}»(, ?«[a-c]{1,3}»)*",
}


def _of_gguf(version: str) -> Tokenizer:
    processor = SentencePieceProcessor(model_file=str(TOKENIZERS[version]))
    return Tokenizer.from_gguf(Path("a.gguf"), gguf.sentencepiece_metadata(processor))


def _byte_level(pre: str) -> Tokenizer:
    return Tokenizer.from_gguf(Path("a.gguf"), gguf.byte_level_metadata(gguf.train(pre), pre))


def _of_file(version: str, folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(TOKENIZERS[version].read_bytes())
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module", params=["v1", "v3", "GGUF", "gpt-2", "smollm", "llama-bpe"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param in TOKENIZERS:
        return _of_file(request.param, tmp_path_factory.mktemp("model"))
    return _of_gguf("v3") if request.param == "GGUF" else _byte_level(request.param)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def write(grammar, tokenizer, rng: random.Random, starts_text: bool) -> str:
    """A text of tokens that are drawn evenly from those that may come."""
    matcher = grammar.matcher([tokenizer.eos_id])
    text = TextStream(tokenizer, strip_first_space=starts_text)
    for _ in range(3000):
        if matcher.is_finished:
            break
        choices = np.flatnonzero(matcher.allowed).tolist()
        assert (tokenizer.eos_id in choices) == matcher.is_accepting
        token = rng.choice(choices)
        if token == tokenizer.eos_id:
            break
        text.push(token)
        matcher.consume(token)
    else:
        pytest.fail("it does not end")
    text.finish()
    return text.text


@pytest.mark.parametrize("starts_text", [False, True])
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_random_tokens_make_what_matches(kind, starts_text, tokenizer, compiler):
    grammar = compiler.compile(CONSTRAINTS[kind], starts_text)
    for seed in range(12):
        text = write(grammar, tokenizer, random.Random(seed), starts_text)
        if kind in SCHEMAS:
            jsonschema.validate(json.loads(text), SCHEMAS[kind])
        else:
            assert re.fullmatch(PATTERNS[kind], text)


TEXTS = {
    "schema": '{"title": "A☃ é", "kind": "bad ☺", "items": [1.5, -2e3]}',
    "tree": '{"leaf": true, "next": {"leaf": false}}',
    "regex": "yes ☃é\n",
    "grammar": "«a»,«bc», «abc»",
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_a_text_may_be_written_with_the_tokens_that_a_model_knows(kind, tokenizer, compiler):
    """Those of a reply begin with a space where encoding puts one."""
    matcher = compiler.compile(CONSTRAINTS[kind], True).matcher([tokenizer.eos_id])
    for token in tokenizer.encode(TEXTS[kind], bos=False):
        matcher.consume(token)
    assert matcher.is_accepting
    assert matcher.is_finished == (kind != "grammar")


def test_what_may_not_come_is_an_error(tokenizer, compiler):
    matcher = compiler.compile(CONSTRAINTS["grammar"]).matcher()
    wrong = tokenizer.encode("x", bos=False)[-1]
    with pytest.raises(ValueError, match=f"token {wrong} does not match"):
        matcher.consume(wrong)


@pytest.fixture(scope="module")
def v3(tmp_path_factory) -> Tokenizer:
    return _of_file("v3", tmp_path_factory.mktemp("model"))


def test_a_grammar_is_compiled_once(v3):
    compiler = GrammarCompiler(v3)
    schemas = [Constraint("schema", json.dumps({"maxLength": i})) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        grammars = list(pool.map(compiler.compile, [*schemas[:3]] * 8))
    assert len({id(grammar) for grammar in grammars}) == 3
    for schema in schemas:
        compiler.compile(schema)
    assert len(compiler._kept) < 40
    assert compiler.compile(schemas[0]) not in grammars


def test_matchers_of_a_grammar_are_independent(v3):
    grammar = GrammarCompiler(v3).compile(Constraint("regex", "ab|cd"))
    first, second = grammar.matcher(), grammar.matcher()
    before = second.allowed.copy()
    first.consume(int(np.flatnonzero(first.allowed)[0]))
    assert (second.allowed == before).all()
    assert (grammar.matcher().allowed == before).all()


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_guesses_change_nothing(kind, v3, monkeypatch):
    """What was found out for right guesses is used, and is what is found out without them."""
    grammar = GrammarCompiler(v3).compile(CONSTRAINTS[kind])
    plain, guessed = grammar.matcher([v3.eos_id]), grammar.matcher([v3.eos_id])
    rng, tokens, masks = random.Random(3), [], [plain.allowed]
    while not plain.is_finished and len(tokens) < 40:
        tokens.append(rng.choice([*set(np.flatnonzero(plain.allowed)) - {v3.eos_id}]))
        plain.consume(tokens[-1])
        masks.append(plain.allowed)
    calls, allowed = [], grammar.allowed
    monkeypatch.setattr(grammar, "allowed", lambda state: calls.append(0) or allowed(state))
    for i, token in enumerate(tokens):
        if i % 4 == 0:
            ahead, states = guessed.ahead(), []
            for right in tokens[i : i + 3]:
                other = rng.choice(np.flatnonzero(masks[i + len(states)]).tolist())
                guess = right if rng.random() < 0.8 or other == v3.eos_id else other
                assert ahead.may_take(guess)
                states.append(ahead.take(guess))
                if guess != right:
                    break
        guessed.consume(token)
        assert (guessed.allowed == masks[i + 1]).all()
    assert guessed.states == plain.states
    assert guessed.is_finished == plain.is_finished
    calls.clear()
    again = grammar.matcher()
    ahead = again.ahead()
    assert [ahead.take(token) for token in tokens] == plain.states[1:]
    assert len(calls) == len(tokens)
    for token in tokens:
        again.consume(token)
    assert len(calls) == len(tokens)


def test_control_tokens_by_id(v3):
    """In Lark alone, and only where it names them."""
    control = v3.control_ids["[TOOL_CALLS]"]
    matcher = GrammarCompiler(v3).compile(Constraint("grammar", f'start: <[{control}]> "a"'))
    matcher = matcher.matcher([v3.eos_id])
    assert np.flatnonzero(matcher.allowed).tolist() == [control]
    free = GrammarCompiler(v3).compile(Constraint("regex", "(?s:.*)")).matcher([v3.eos_id])
    assert not free.allowed[[i for i in v3.control_ids.values() if i != v3.eos_id]].any()


@pytest.mark.parametrize("count", [64, 65])
def test_levels(count):
    texts = ("(" * count + "a" + ")" * count, "[" * count + "]" * count)
    for kind, text in zip(("regex", "schema"), texts, strict=True):
        if count == 64:
            Constraint(kind, text)
        else:
            with pytest.raises(ValueError, match="65 levels, expected at most 64"):
                Constraint(kind, text)


def test_a_schema_that_contains_itself():
    schema: dict = {}
    schema["not"] = schema
    with pytest.raises(ValueError, match="not JSON"):
        schema_text(schema)


def test_what_pydantic_writes_for_dicts_and_formats(v3):
    """Keywords that llguidance itself refuses."""
    names = {"title": "Color", "enum": ["red", "blue"], "type": "string"}
    schema = {
        "$defs": {"Color": names},
        "propertyNames": {"$ref": "#/$defs/Color"},
        "additionalProperties": {"type": "string", "format": "uuid4"},
    }
    grammar = GrammarCompiler(v3).compile(Constraint("schema", json.dumps(schema)))
    assert may_be(grammar, v3, '{"red": "12345678-1234-4321-9234-123456789abc"}')
    assert not may_be(grammar, v3, '{"red": "12345678-1234-1321-9234-123456789abc"}')
    assert not may_be(grammar, v3, '{"green": "12345678-1234-4321-9234-123456789abc"}')


def test_order_of_properties_is_that_of_the_schema():
    assert schema_text({"b": 1, "a": {"d": 1, "c": "é"}}) == '{"b": 1, "a": {"d": 1, "c": "é"}}'


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("whole", [0, 1, 99, 1000])
@pytest.mark.parametrize("type_", ["number", ["number", "null"]])
def test_bounds_that_are_excluded(type_, whole, sign, v3):
    """llguidance would permit the excluded bound if it is whole and the other bound is near."""
    low, high = ("Minimum", "Maximum") if sign == 1 else ("Maximum", "Minimum")
    limit = {f"exclusive{low}": sign * whole, low.lower(): sign * (whole - 1)}
    end = {high.lower(): sign * (whole + 0.5)}
    old = {f"exclusive{low}": True, low.lower(): sign * whole}  # as in version 4 of JSON Schema
    for schema in ({**limit, **end}, {**limit, "allOf": [end]}, {**old, **end}):
        rule = Constraint("schema", json.dumps({"type": type_, **schema}))
        grammar = GrammarCompiler(v3).compile(rule)
        right = [f"{sign * (whole + part)}" for part in (0.5, 0.25, 0.001)]
        wrong = [f"{whole}", f"{whole}.0", f"-{whole}", f"{sign * (whole + 0.75)}"]
        assert [may_be(grammar, v3, text) for text in right + wrong] == [True] * 3 + [False] * 4


def may_be(grammar, tokenizer, text: str) -> bool:
    state = grammar.state([])
    token_ids = tokenizer.encode(text, bos=False)
    return (
        state.validate_tokens(token_ids) == len(token_ids)
        and state.consume_tokens(token_ids)
        and state.is_accepting()
    )
