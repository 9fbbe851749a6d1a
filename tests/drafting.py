"""Drafts of every kind for tests: right and wrong, many and few, of some sequences and of others.

`Oracle` stands in for the policy. It knows each completion from a run without drafts.
"""

from __future__ import annotations

import random

import torch
from adapters import write_peft
from checkpoints import write_checkpoint

from mistral_ext import Mistral, SamplingParams
from mistral_ext.engine.drafts import Drafter
from mistral_ext.engine.engine import Engine
from mistral_ext.engine.request import Request

VOCABULARY = 131
WINDOW = 48  # its rings have 64 slots more


class Oracle(Drafter):
    """Gives drafts of which a part is right.

    Args:
        known: prompt, seed and index of a request -> the tokens of its completion.
        share: how many of the drafts are right.
        idle: how many passes have none.
    """

    def __init__(self, known, share=0.8, seed=0, idle=0.0):
        super().__init__()
        self.known, self.share, self.idle = known, share, idle
        self.random = random.Random(seed)
        self.passes = 0  # with drafts

    def choose(self, sequences, room, unknown=0):
        if self.idle and self.random.random() < self.idle:
            return {}
        if unknown:  # of steps under way, which the engine then waits for
            return {sequence: [] for sequence in sequences}
        drafts, free = {}, 8 - len(sequences)
        for sequence, most in zip(sequences, room, strict=True):
            count = min(self.random.choice([most, self.random.randint(0, 7)]), most, free)
            if count <= 0:
                continue
            begin = len(sequence.ids) - sequence.prompt_length
            given = list(self.known[key(sequence.request)][begin : begin + count])
            given += [5] * (count - len(given))
            drafts[sequence] = [
                token if self.random.random() < self.share else self.random.randrange(3, 131)
                for token in given
            ]
            free -= count
        self.passes += bool(drafts)
        return drafts

    def note(self, *args):
        pass


def key(request: Request):
    return tuple(request.prompt_ids), request.params.seed, request.index


def engine_of(model, **options) -> Engine:
    return Engine(model, VOCABULARY, **{"max_batch": 4, "cache_tokens": 4096} | options)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


def request(ids, max_tokens=40, seed=5, eos_ids=(), **options) -> Request:
    given = {"temperature": 1.0, "logprobs": 1} | options
    params = SamplingParams(max_tokens=max_tokens, seed=seed, **given)
    return Request(ids, params, max_length=len(ids) + max_tokens, eos_ids=eos_ids)


def run(engine: Engine, requests) -> list:
    """The completion of each request, or its error."""
    ids = [engine.add(r) for r in requests]
    results = {}
    while engine.has_work:
        for output in engine.step():
            if output.is_last:
                results[output.request_id] = output.completion or output.error
    return [results[i] for i in ids]


def content(completion):
    return completion.token_ids, completion.text, completion.finish_reason, completion.logprobs


def plainly(make_engine, requests):
    """The completions without drafts, and what an `Oracle` knows."""
    engine = make_engine()
    engine.passes.drafter.choose = lambda *_: {}
    plain = run(engine, requests)
    return plain, {key(r): c.token_ids for r, c in zip(requests, plain, strict=True)}


def check_adapters(folder) -> None:
    """Completions with and without an adapter, in one batch, are the same with drafts."""
    base = write_checkpoint(folder / "base", intermediate_size=256)
    write_peft(base, folder / "a")
    adapters = {"a": folder / "a"}
    llm = Mistral.from_pretrained(folder / "base", dtype=torch.bfloat16, adapters=adapters)
    prompts, names = [prompt(9), prompt(40, 1), prompt(5, 2)], ["a", None, "a"]
    options = {"max_tokens": 30, "ignore_eos": True, "seed": 1, "temperature": 0.5, "logprobs": 0}
    plain = llm.generate(prompts, adapter=names, drafts=0, **options)
    known = {(tuple(p), 1, 0): c.token_ids for p, c in zip(prompts, plain, strict=True)}
    llm.engine.passes.drafter = Oracle(known)
    drafted = llm.generate(prompts, adapter=names, **options)
    assert [content(c) for c in drafted] == [content(c) for c in plain]
    assert llm.engine.passes.drafter.passes > 5


def assert_empty(engine: Engine) -> None:
    assert not list(engine.scheduler.running())
    while engine.scheduler.prefixes.drop_oldest():
        pass
    assert engine.pool.free_slots == engine.pool.slots


KINDS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {7: 4.0, 9: -3.0}, "logprobs": None},
    {"top_k": 5, "eos_ids": (11, 12, 13)},
    {"min_p": 0.2, "eos_ids": (20, 21), "logprobs": None},
]


def of_every_kind(seed: int) -> list[Request]:
    """Requests with every option, of lengths up to where a ring wraps and an extent grows."""
    lengths = random.Random(seed).choices([1, 5, 9, 33, 70, 120, 250], k=len(KINDS))
    return [
        request(prompt(n, n), 1 + (37 * i + 50 * seed) % 130, seed=seed, **kind)
        for i, (n, kind) in enumerate(zip(lengths, KINDS, strict=True))
    ]
