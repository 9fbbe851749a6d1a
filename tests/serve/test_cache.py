"""What is reused of earlier prompts. The numbers are those of complaints about other servers."""

from __future__ import annotations

import random
import threading

import pytest
from servers import serving

STORY = "The king had three daughters, and each of them lived in a tower of her own. "


@pytest.fixture(scope="module")
def long_story():
    """Conversations that begin with a long text of their own."""
    return [f"Story {i}. " + STORY * 12 + f"And now chapter {i}." for i in range(4)]


def ask(server, messages, **fields):
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, "logprobs": True, **fields}
    reply = server.post("/v1/chat/completions", body).json()
    cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    return reply["choices"][0], cached, reply["usage"]["prompt_tokens"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_20_interleaved_conversations_never_mix(tiny, long_story):
    """Four conversations take turns, also at the same time, and say what each says alone."""

    def turns(text: str, salt: str):
        messages, replies = [], []
        for turn in range(3):
            messages.append(user(f"{text} Question {turn}?"))
            choice, cached, _ = ask(tiny, messages, cache_salt=salt)
            messages.append({"role": "assistant", "content": choice["message"]["content"] or "-"})
            replies.append(choice)
            assert (cached > 0) == (turn > 0)
        return replies

    alone = [turns(text, f"alone {i}") for i, text in enumerate(long_story)]
    together = [None] * 4

    def run(i: int) -> None:
        together[i] = turns(long_story[i], "together")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_21_a_hit_does_not_consume_the_entry_of_another(tiny, long_story):
    salt = {"cache_salt": "21"}
    first, second = long_story[:2]
    ask(tiny, [user(first)], **salt)
    ask(tiny, [user(second)], **salt)
    for _ in range(3):  # both go on from what is kept, again and again
        for text in (first, second):
            _, cached, length = ask(tiny, [user(text)], **salt)
            assert cached >= length - 32


def test_22_cold_and_warm_are_the_same_to_the_bit(tiny, long_story):
    generator = random.Random(0)
    for i in range(4):
        words = long_story[i].split()
        text = " ".join(words[: generator.randrange(60, len(words))])
        cold, none, _ = ask(tiny, [user(text)], cache_salt=f"22 {i}")
        warm, cached, _ = ask(tiny, [user(text)], cache_salt=f"22 {i}")
        assert none == 0
        assert cached > 0
        assert warm == cold  # log-probabilities, too
        longer = [user(text + " And what then?")]
        cold, none, _ = ask(tiny, longer, cache_salt=f"22 {i} cold")
        warm, cached, _ = ask(tiny, longer, cache_salt=f"22 {i}")
        assert none == 0
        assert cached > 0
        assert warm == cold


def test_23_other_salts_never_hit(tiny, long_story):
    text = [user(long_story[3])]
    assert ask(tiny, text, cache_salt="a")[1] == 0
    assert ask(tiny, text, cache_salt="b")[1] == 0
    assert ask(tiny, text)[1] == 0
    assert ask(tiny, text, cache_salt="a")[1] > 0
    assert ask(tiny, text)[1] > 0


def test_hits_are_counted(tiny_folder, long_story):
    with serving("--model", tiny_folder) as server:
        texts = [long_story[0], long_story[0], long_story[1]]
        found = [ask(server, [user(text)]) for text in texts]
        queries = server.metric("prefix_cache_queries_total")
        assert queries == sum(length for _, _, length in found)
        assert server.metric("prefix_cache_hits_total") == sum(cached for _, cached, _ in found)
