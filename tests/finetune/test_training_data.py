"""What is read of training data, what of it is trained on, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from chat_templates import CHATML, MISTRAL_V1, ZEPHYR
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext import Mistral
from mistral_ext.finetune import Trainer
from mistral_ext.finetune.data import read_samples
from mistral_ext.text.jinja_template import JinjaTemplate
from mistral_ext.text.reply import encode_reply

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
        }
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says how it is.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


TURNS = [user("Hi"), assistant("Hello!"), user("Who are you?"), assistant("A wolf, 🐺.")]


@pytest.fixture(scope="module", params=["v1", "v3", "chatml", "zephyr"])
def chatty(request, tmp_path_factory):
    """A model for each kind of template; its weights do not matter."""
    folder = tmp_path_factory.mktemp("chatty") / "instruct"
    version = "v3" if request.param == "v3" else "v1"
    size = 32770 if version == "v3" else 32002
    write_checkpoint(folder, vocab_size=size, hidden_size=32, intermediate_size=32, head_dim=32)
    shutil.copy(TOKENIZERS[version], folder / "tokenizer.model")
    templates = {"v1": MISTRAL_V1, "chatml": CHATML, "zephyr": ZEPHYR}
    settings = {}
    if request.param in templates:
        settings["chat_template"] = templates[request.param]
    if request.param == "chatml":
        added = {"<|im_end|>": 32000, "<|im_start|>": 32001}
        (folder / "added_tokens.json").write_text(json.dumps(added))
        settings["eos_token"] = "<|im_end|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Mistral.from_pretrained(folder, progress=False)


def trained(llm, sample) -> list[str]:
    """The texts that a sample trains on; each stands alone. An end token shows as $."""
    ends = {*llm.config.eos_ids, llm.tokenizer.eos_id}
    found, part = [], []
    for token_id, weight in zip(sample.ids.tolist(), sample.weights.tolist(), strict=True):
        if weight:
            part.append(token_id)
        elif part:
            found.append(part)
            part = []
    found += [part] if part else []
    texts = []
    for ids in found:
        assert ids[-1] in ends
        assert not {*ids[:-1]} & ends
        texts.append(llm.tokenizer.decode(ids) + "$")
    return texts


def test_only_replies_are_trained_on(chatty, write_lines):
    (sample,) = read_samples(write_lines("a", {"messages": TURNS}), chatty, 500)
    assert trained(chatty, sample) == ["Hello!$", "A wolf, 🐺.$"]
    # The model is asked later as it is trained.
    prompt = chatty.encode_chat(TURNS[:-1])
    assert sample.ids.tolist()[: len(prompt)] == prompt
    assert sample.prompt == chatty.encode_chat(TURNS[:1])


@pytest.mark.parametrize("chatty", ["v3"], indirect=True)
def test_a_template_may_be_chosen(chatty, write_lines):
    path = write_lines("data.jsonl", {"messages": TURNS})
    (own,) = read_samples(path, chatty, 256)
    (chosen,) = read_samples(path, chatty, 256, "v1")
    last = chatty.encode_chat(TURNS[:-1], template="v1")
    assert chosen.ids[: len(last)].tolist() == last
    assert own.ids[: len(last)].tolist() != last


def test_a_first_token_is_no_target(tiny, write_lines, tmp_path):
    """Even if a template writes nothing before a reply: the model predicts from earlier tokens."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny[0], folder)
    source = (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    llm = Mistral.from_pretrained(folder, progress=False)
    (sample,) = read_samples(write_lines("a", {"messages": TURNS[:2]}), llm, 500)
    assert sample.weights.tolist() == [0] + [1] * (len(sample.ids) - 1)
    assert len(sample.prompt) == 1


def test_weights_of_messages(chatty, write_lines):
    turns = [TURNS[0], assistant("Hello!", weight=0), TURNS[2], assistant("A wolf.", weight=0.5)]
    (sample,) = read_samples(write_lines("a", {"messages": turns}), chatty, 500)
    assert trained(chatty, sample) == ["A wolf.$"]
    assert {*sample.weights.tolist()} == {0, 0.5}
    turns[1]["weight"], turns[3]["weight"] = 1, 0
    (sample,) = read_samples(write_lines("b", {"messages": turns}), chatty, 500)
    assert trained(chatty, sample) == ["Hello!$"]


def test_a_message_cannot_end_a_turn(chatty, write_lines):
    """Control tokens that a message spells out are text, in replies too."""
    spelled = "a</s>b<|im_end|>[INST] c"
    turns = [user(spelled), assistant(spelled)]
    (sample,) = read_samples(write_lines("a", {"messages": turns}), chatty, 500)
    assert trained(chatty, sample) == [f"{spelled}$"]


def test_turns_that_a_template_moves(chatty, write_lines):
    """v3 puts the system prompt before the last turn: then each turn is a sample of its own."""
    expected = 2 if chatty.chat_template() == "v3" else 1
    samples = read_samples(write_lines("a", {"messages": [SYSTEM, *TURNS]}), chatty, 500)
    assert len(samples) == expected
    texts = [text for sample in samples for text in trained(chatty, sample)]
    assert texts == ["Hello!$", "A wolf, 🐺.$"]
    for sample, end in zip(samples, (2, 4) if expected == 2 else (4,), strict=True):
        prompt = chatty.encode_chat([SYSTEM, *TURNS][:end])
        assert sample.ids.tolist()[: len(prompt)] == prompt


@pytest.mark.parametrize("chatty", ["v3"], indirect=True)
def test_tools(chatty, write_lines):
    messages = [
        user("How is Paris?"),
        CALL,
        {"role": "tool", "tool_call_id": "abcdef123", "content": "Sunny."},
        assistant("It is sunny."),
    ]
    samples = read_samples(write_lines("a", {"messages": messages, "tools": TOOLS}), chatty, 500)
    texts = [text for sample in samples for text in trained(chatty, sample)]
    assert texts == [
        '[{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdef123"}]$',
        "It is sunny.$",
    ]
    prompt = chatty.encode_chat(messages[:1], TOOLS)
    assert samples[0].ids.tolist()[: len(prompt)] == prompt


def test_reply_that_would_share_a_token_with_the_prompt(llm):
    """The prompt ends in a space, which a tokenizer joins with the word that follows."""
    source = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    template = JinjaTemplate("x", {"default": source}, llm.tokenizer)
    tokenizer = llm.tokenizer
    prompt, reply = encode_reply(tokenizer, TURNS, template)
    assert prompt == template.encode(TURNS[:-1])
    assert template.encode(TURNS, asks=False)[: len(prompt)] != prompt
    assert tokenizer.decode(reply) == "A wolf, 🐺."
    assert reply[-1] == tokenizer.eos_id


def test_texts(llm, write_lines):
    path = write_lines("a", {"text": "One."}, "", "  ", {"text": "Two </s> é\nthree."})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    samples = read_samples(path, llm, 500)
    assert [sample.ids.tolist() for sample in samples] == [
        [*llm.tokenizer.encode(text), llm.tokenizer.eos_id]
        for text in ("One.", "Two </s> é\nthree.")
    ]
    for sample in samples:
        assert sample.weights.tolist() == [0, *[1] * (len(sample.ids) - 1)]
        assert sample.prompt == [llm.tokenizer.bos_id]
        assert sample.ids.dtype == torch.int32


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"not JSON: Expecting ',' delimiter at column 13"),
        ("[1, 2]", r"the line has \[1, 2\], expected an object with text or messages"),
        ('{"prompt": "a"}', r"the line has keys \['prompt'\], expected an object with text or"),
        ('{"text": "a", "messages": []}', "expected an object with text or messages"),
        ('{"text": ""}', "text is '', expected some text"),
        ('{"text": 7}', "text is 7, expected some text"),
        ('{"text": "a", "txet": "b"}', "the line has the key 'txet', expected text"),
        ('{"text": "\\ud800"}', "text has a lone surrogate"),
        ('{"messages": "a"}', "messages is 'a', expected a list of objects"),
        ({"messages": [user("a")]}, "messages has no reply to train on"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "messages has no reply to train on"),
        ({"messages": [user("a"), assistant("b", weight=-1)]}, r"\[1\] has weight -1, expected 0,"),
        ({"messages": [user("a"), assistant("b", weight=1e-50)]}, "has weight 1e-50, expected 0"),
        ({"messages": [user("a"), assistant("b", weight=1e300)]}, "a number from 1e-6 to 1e6"),
        ({"messages": [user("a"), assistant("b", weight=10**400)]}, "has weight 10000"),
        ({"messages": [user("a"), assistant("b", weight=True)]}, r"\[1\] has weight True"),
        ({"messages": [{**user("a"), "weight": 1}, assistant("b")]}, r"\[0\] has a weight"),
        ({"messages": [assistant("b")]}, "messages is empty, expected the user's message"),
        ({"messages": [user("a"), assistant("b"), assistant("c")]}, "ends with role 'assistant'"),
        ({"messages": [user("a"), {"role": "assistant"}]}, r"messages\[1\] has keys \['role'\]"),
        ({"messages": [{"role": "bot", "content": "a"}, assistant("b")]}, "has role 'bot'"),
        ({"text": "word " * 90}, r"the sample has 9\d tokens, expected up to 64"),
    ],
)
def test_wrong_lines(llm, write_lines, tmp_path, line, message):
    path = write_lines("data.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(llm, path, tmp_path / "out", tokens_per_pass=64)
    assert str(caught.value).startswith(f"{path}:3: ")
    good = write_lines("good.jsonl", {"text": "fine"})
    with pytest.raises(ValueError, match=message):
        Trainer(llm, good, tmp_path / "out", eval_data=path, tokens_per_pass=64)
    assert not (tmp_path / "out").exists()


def test_a_text_without_tokens(llm, write_lines, tmp_path, monkeypatch):
    """The end token follows nothing."""
    path = write_lines("data.jsonl", {"text": "fine"}, {"text": "\u200b"})
    encode = llm.tokenizer.encode
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text: encode(text) if "f" in text else [])
    with pytest.raises(ValueError, match=r"data.jsonl:2: the sample has no token to train on"):
        read_samples(path, llm, 64)


def test_wrong_files(llm, tmp_path):
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path / "none", llm, 64)
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="empty has no samples"):
        read_samples(tmp_path / "empty", llm, 64)
    (tmp_path / "latin").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin:2 is not UTF-8"):
        read_samples(tmp_path / "latin", llm, 64)


def test_models_that_cannot_be_trained(llm, tiny, write_lines, tmp_path):
    data = write_lines("a", {"text": "a"})
    half = Mistral.from_pretrained(tiny[0], dtype=torch.float16, progress=False)
    with pytest.raises(ValueError, match="dtype is float16"):
        Trainer(half, data, tmp_path / "out")
    folder = tmp_path / "base"
    shutil.copytree(tiny[0], folder)
    (folder / "tokenizer_config.json").unlink()
    base = Mistral.from_pretrained(folder, progress=False)
    chat = write_lines("b", {"messages": TURNS})
    with pytest.raises(ValueError, match="looks like a base model"):
        Trainer(base, chat, tmp_path / "out")
    Trainer(base, chat, tmp_path / "out", chat, template="v1", max_steps=1).train()
    settings = {"chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="writes none of the tokens that end a text"):
        Trainer(base, chat, tmp_path / "other")
