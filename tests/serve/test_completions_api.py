"""Completions of texts and token ids, by OpenAI's client."""

from __future__ import annotations

import openai
import pytest

from mistral_ext.engine.params import TokenLogprob
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.serve.logprobs import LogprobWriter
from mistral_ext.text.tokenizer import Tokenizer

ONCE = "Once upon a time there was"
OPTIONS = {"model": "demo", "max_tokens": 12, "seed": 3}


def complete(server, prompt=ONCE, **options):
    return server.client().completions.create(prompt=prompt, **{**OPTIONS, **options})


def token_ids(server, text: str) -> list[int]:
    return server.post("/tokenize", {"prompt": text}).json()["tokens"]


def test_completion_and_its_stream(demo):
    whole = complete(demo)
    assert whole.object == "text_completion"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    chunks = list(complete(demo, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_default_length_is_openais(demo):
    reply = demo.client().completions.create(model="demo", prompt=ONCE)
    assert reply.usage.completion_tokens == 16


def test_token_ids_are_as_good_as_text(demo):
    assert complete(demo, token_ids(demo, ONCE)).choices[0].text == complete(demo).choices[0].text


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_several_prompts_with_several_completions(demo, kind):
    texts = [ONCE, "The king said"]
    prompts = texts if kind == "text" else [token_ids(demo, text) for text in texts]
    reply = complete(demo, prompts, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    alone = [choice.text for text in texts for choice in complete(demo, text, n=2).choices]
    assert [choice.text for choice in reply.choices] == alone
    assert reply.usage.prompt_tokens == sum(len(token_ids(demo, text)) for text in texts)
    assert reply.usage.completion_tokens == 48


def test_echo_puts_the_prompt_first(demo):
    text = complete(demo).choices[0].text
    assert complete(demo, echo=True).choices[0].text == ONCE + text
    assert complete(demo, token_ids(demo, ONCE), echo=True).choices[0].text == ONCE + text
    chunks = complete(demo, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == ONCE + text


def test_logprobs(demo):
    choice = complete(demo, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs)
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    ends = [*logprobs.text_offset[1:], len(choice.text)]
    pieces = [choice.text[a:b] for a, b in zip(logprobs.text_offset, ends, strict=True)]
    assert pieces == logprobs.tokens
    chunks = list(complete(demo, logprobs=2, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == logprobs.tokens
    assert [o for part in parts for o in part.text_offset] == logprobs.text_offset


def test_of_tokens_with_the_same_text_the_most_likely_is_reported():
    tokenizer = Tokenizer.from_folder(DEMO_MODEL)
    comma, byte = (i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b",")
    writer = LogprobWriter(tokenizer, starts_text=False)
    token = TokenLogprob(comma, -0.5, {comma: -0.5, byte: -9.0})
    assert writer.text([token])["top_logprobs"] == [{",": -0.5}]


@pytest.mark.parametrize(
    "field", [{"suffix": "end"}, {"best_of": 2}, {"echo": True, "logprobs": 1}]
)
def test_what_is_missing_is_said(demo, field):
    with pytest.raises(openai.BadRequestError, match="not supported"):
        complete(demo, **field)
