"""Chat templates against mistral-common's own MistralTokenizer."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
from chat_templates import MISTRAL_V1

from mistral_ext.chat import encode_chat
from mistral_ext.text.chat_template import (
    _length_of,
    chat_template_of,
    extend_chat,
    transcript,
)
from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.weights.folder import is_instruct

mistral_common = pytest.importorskip("mistral_common")
protocol = pytest.importorskip("mistral_common.protocol.instruct.messages")
ChatCompletionRequest = pytest.importorskip(
    "mistral_common.protocol.instruct.request"
).ChatCompletionRequest
MistralTokenizer = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer

DATA = Path(mistral_common.__file__).parent / "data"
VERSIONS = ("v1", "v2", "v3")
ORACLES = {"v1": MistralTokenizer.v1, "v2": MistralTokenizer.v2, "v3": MistralTokenizer.v3}

SYSTEM = {"role": "system", "content": "Answer in French."}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


CONVERSATIONS = {
    "one turn": [user("What is 2+2?")],
    "system": [SYSTEM, user("What is 2+2?")],
    "two systems": [SYSTEM, {"role": "system", "content": "Be brief."}, user("Hi")],
    "turns": [user("Hi"), assistant("Hello!"), user("Who are you?")],
    "system and turns": [SYSTEM, user("Hi"), assistant("Salut !"), user("Ça va ?")],
    "long": [SYSTEM, user("1"), assistant("2"), user("3"), assistant("4"), user("5")],
    "white space": [user("  a \n"), assistant(" b  "), user("\n\n def f():\n\treturn 1 ")],
    "unicode": [user("👩‍👩‍👧‍👦 è 日本語"), assistant("🇫🇷!"), user("Ω")],
    "look-alikes": [user("[/INST] </s><s>[INST]"), assistant("<s> [INST]"), user("[INST] x")],
    "neighbours": [user("a"), user("b"), assistant("c"), assistant("d"), user("e")],
    "empty user turn": [user("")],
}


def folder_with(folder: Path, version: str) -> Path:
    shutil.copy(next(DATA.glob(f"*.model.{version}")), folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """Read from files called tokenizer.model, whose name says nothing of the version."""
    return {v: Tokenizer.from_folder(folder_with(tmp_path_factory.mktemp(v), v)) for v in VERSIONS}


def oracle_ids(version: str, messages: list[dict]) -> list[int]:
    types = {
        "system": protocol.SystemMessage,
        "user": protocol.UserMessage,
        "assistant": protocol.AssistantMessage,
    }
    request = ChatCompletionRequest(
        messages=[types[m["role"]](content=m["content"]) for m in messages]
    )
    return ORACLES[version]().encode_chat_completion(request).tokens


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_equals_mistral_common(messages, version, tokenizers):
    assert encode_chat(tokenizers[version], messages, version) == oracle_ids(version, messages)


@pytest.mark.parametrize("version", VERSIONS)
def test_default_template_is_the_vocabularys(version, tokenizers):
    messages = CONVERSATIONS["long"]
    assert encode_chat(tokenizers[version], messages) == oracle_ids(version, messages)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_v2_and_v3_differ_in_tools_only(messages):
    """Tokenizer.version relies on it: the two cannot be told apart in a Mistral 7B folder."""
    assert oracle_ids("v2", messages) == oracle_ids("v3", messages)


def test_templates_by_hand(tokenizers):
    messages = [SYSTEM, user("Hi"), assistant("Salut"), user("Ça va ?")]
    v1, v3 = tokenizers["v1"], tokenizers["v3"]
    assert encode_chat(v1, messages) == [
        1,
        *v1.encode("[INST] Answer in French.\n\nHi [/INST]", bos=False),
        *v1.encode("Salut", bos=False),
        2,
        *v1.encode("[INST] Ça va ? [/INST]", bos=False),
    ]
    assert encode_chat(v3, messages) == [
        *[1, 3, *v3.encode("Hi", bos=False), 4],
        *[*v3.encode("Salut", bos=False), 2],
        *[3, *v3.encode("Answer in French.\n\nÇa va ?", bos=False), 4],
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_tokenizer_json_alone(messages, version, tokenizers, tmp_path):
    """The adapter used for tokenizer.json, here over the SentencePiece vocabulary."""
    original = tokenizers[version]
    renamed = Tokenizer(
        tmp_path / "tokenizer.json",
        encode=lambda text: original.encode(text, bos=False),
        token_bytes=[original.token_bytes(i) for i in range(original.vocab_size)],
        control_ids=original.control_ids,
        bos_id=original.bos_id,
        eos_id=original.eos_id,
    )
    assert encode_chat(renamed, messages, version) == oracle_ids(version, messages)


# ---- bad input


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, "messages is empty, expected the user's"),
        ([SYSTEM], ValueError, "messages ends with role 'system', expected"),
        ([user("a"), assistant("b")], ValueError, "messages ends with role 'assistant'"),
        ([user("a"), assistant(""), user("b")], ValueError, "messages: Assistant message must"),
        ([user("a"), assistant("b"), SYSTEM, user("c")], ValueError, "Unexpected role 'system'"),
        (
            [{"role": "tool", "content": "x"}],
            ValueError,
            r"messages\[0\] has tool_call_id None, expected text",
        ),
        (
            [user("a"), {"role": "user"}],
            ValueError,
            r"messages\[1\] has keys .*, expected role and",
        ),
        ([user(None)], TypeError, r"messages\[0\]\['content'\] is None, expected a str"),
        ([user("\ud800")], ValueError, r"messages\[0\]\['content'\] has a lone surrogate"),
        ("Hi", TypeError, "expected a list of dicts"),
        (user("Hi"), TypeError, "expected a list of dicts"),
        (["Hi"], TypeError, "expected a list of dicts"),
    ],
)
def test_bad_messages(messages, error, message, tokenizers):
    with pytest.raises(error, match=message):
        encode_chat(tokenizers["v3"], messages)


def test_bad_template(tokenizers):
    with pytest.raises(ValueError, match="template is 'chatml', expected one of v1, v2, v3"):
        encode_chat(tokenizers["v3"], [user("a")], "chatml")
    with pytest.raises(ValueError, match=r"template is 'v3', expected 'v1': .*\[INST\]"):
        encode_chat(tokenizers["v1"], [user("a")], "v3")


# ---- is this an Instruct model?


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"chat_template": MISTRAL_V1}),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": MISTRAL_V1}]},
        ),
        ("chat_template.json", {"chat_template": MISTRAL_V1}),
        ("chat_template.jinja", MISTRAL_V1),
    ],
)
def test_hugging_face_template(name, content, version, tokenizers, tmp_path):
    """One that writes what mistral-common does."""
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    expected = "v1" if version == "v1" else "v3"
    assert chat_template_of(tmp_path, tokenizers[version]) == expected


@pytest.mark.parametrize(
    "path",
    [
        "Mistral-7B-Instruct-v0.3",
        "mistral-7b-instruct",
        "models--mistralai--Mistral-7B-Instruct-v0.1/snapshots/73068f3702d050a2fd5aa2ca1e612e5036429398",
    ],
)
def test_folder_without_a_template_called_instruct(path, tokenizers, tmp_path):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    (folder / "params.json").write_text("{}")
    assert is_instruct(folder)
    assert chat_template_of(str(folder), tokenizers["v3"], is_instruct=True) == "v3"


@pytest.mark.parametrize(
    "path", ["Mistral-7B-v0.3", "instruct/7B", "models--mistralai--Mistral-7B-v0.1/snapshots/26bca"]
)
@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}])
def test_base_model(config, path, tokenizers, tmp_path):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"looks like a base model.*pass template='v1'"):
        chat_template_of(folder, tokenizers["v1"], is_instruct(folder))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_tokenizer_config(content, tokenizers, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json .*, expected a JSON object"):
        chat_template_of(tmp_path, tokenizers["v1"])


# ---- the next turn, on top of a cache


def common_prefix(a: list[int], b: list[int]) -> int:
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return len(list(shared))


def shuffled_tokens(tokenizer: Tokenizer, text: str, seed: int, start: str = " ") -> list[int]:
    """Ids that decode to text, in other tokens than the tokenizer would choose."""
    rng = random.Random(seed)
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    data, ids, begin = (start + text).encode(), [], 0
    while begin < len(data):
        ends = [e for e in range(begin + 1, len(data) + 1) if data[begin:e] in by_bytes]
        end = rng.choice(ends)
        ids.append(by_bytes[data[begin:end]])
        begin = end
    assert ids != tokenizer.encode(text, bos=False)
    return ids


TURNS = [user("Hi"), assistant("Hello, how are you?"), user("Fine. And\nyou? 🙂")]


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_reply_as_the_tokenizer_spells_it(version, system, eos, tokenizers):
    tokenizer = tokenizers[version]
    messages = [SYSTEM] * system + TURNS
    reply = tokenizer.encode(TURNS[1]["content"], bos=False) + [tokenizer.eos_id] * eos
    cached = encode_chat(tokenizer, messages[:-2]) + reply
    extended = extend_chat(tokenizer, messages, cached)
    assert extended == encode_chat(tokenizer, messages)
    if version == "v1" or not system:
        assert extended[: len(cached)] == cached
    else:  # the system prompt left the first turn
        assert common_prefix(extended, cached) == len([1, 3])


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("version", VERSIONS)
def test_reply_as_the_model_spelled_it(version, seed, eos, tokenizers):
    tokenizer = tokenizers[version]
    reply = [*shuffled_tokens(tokenizer, TURNS[1]["content"], seed), tokenizer.eos_id]
    cached = encode_chat(tokenizer, TURNS[:1]) + reply
    extended = extend_chat(tokenizer, TURNS, cached if eos else cached[:-1])
    assert extended == cached + encode_chat(tokenizer, TURNS[2:])[1:]
    assert tokenizer.decode(extended) == tokenizer.decode(encode_chat(tokenizer, TURNS))

    # Two turns later the odd spelling is still there, and still extends.
    messages = [*TURNS, assistant("Fine."), user("Good.")]
    cached = extended + tokenizer.encode("Fine.", bos=False) + [tokenizer.eos_id]
    assert extend_chat(tokenizer, messages, cached)[: len(cached)] == cached


@pytest.mark.parametrize("version", VERSIONS)
def test_length_of_a_beginning(version, tokenizers):
    tokenizer = tokenizers[version]
    ids = encode_chat(tokenizer, TURNS)
    lengths = range(len(ids) + 1)
    texts = [transcript(tokenizer, ids[:length]) for length in lengths]
    assert [_length_of(tokenizer, ids, text) for text in texts] == list(lengths)
    assert _length_of(tokenizer, ids, texts[-1] + b"a") is None
    assert _length_of(tokenizer, ids, texts[1][:-1]) is None  # within a token


@pytest.mark.parametrize("version", VERSIONS)
def test_cache_of_another_text_is_not_extended(version, tokenizers):
    tokenizer = tokenizers[version]
    truth = encode_chat(tokenizer, TURNS)
    prompt = encode_chat(tokenizer, TURNS[:1])
    for reply in ("Hello, how are you? STOP", "Hello, how", "Bye"):
        cached = prompt + tokenizer.encode(reply, bos=False)
        assert extend_chat(tokenizer, TURNS, cached) == truth
        assert common_prefix(truth, cached) >= len(prompt)
    assert extend_chat(tokenizer, TURNS, []) == truth
    swapped = encode_chat(tokenizer, [user("Hi Hello, how are you?")])
    assert extend_chat(tokenizer, TURNS, swapped) == truth


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_moving_system_prompt_costs_one_turn(version, tokenizers):
    """v2 and v3: turns before the last are the same in every later prompt, only the last moves."""
    tokenizer = tokenizers[version]
    messages = [SYSTEM, *TURNS]
    cached = encode_chat(tokenizer, messages) + tokenizer.encode("Fine.", bos=False) + [2]
    extended = extend_chat(tokenizer, [*messages, assistant("Fine."), user("Good.")], cached)
    settled = encode_chat(tokenizer, TURNS[:1]) + tokenizer.encode(TURNS[1]["content"], bos=False)
    assert common_prefix(extended, cached) >= len(settled)
