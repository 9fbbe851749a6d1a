"""Tokenizers of GGUF files, and byte-level BPE: the ids of SentencePiece and of `tokenizers`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from checkpoints import TOKENIZERS
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mistral_ext.text.chat_template import chat_template_of, encode_chat
from mistral_ext.text.tokenizer import Tokenizer

PATH = Path("model.gguf")
TEXTS = [
    "a",
    " ",
    "  two leading, trailing  ",
    "a  b   c    d",
    "\n\n  indented\n\tTab\r\n",
    "Don't you'll WE'VE it's",
    "0123456789 3.14159 12",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # code\n",
    "Grüße, Ærøskøbing; ελληνικά; русский; 日本語; العربية; हिन्दी",
    "👋🏽 family 👩‍👩‍👧‍👦, flag 🇫🇷",
    "zero\u200bwidth, nul\x00, full width \uff21, ligature ﬁ, combining e\u0301",
    "<s>a</s><unk><0x0A>",
    "underscore▁block",
]


# SentencePiece


def sentencepiece_metadata(processor: SentencePieceProcessor) -> dict:
    def kind(i: int) -> int:
        if processor.is_unknown(i):
            return 2
        return 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1

    ids = range(processor.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([processor.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in ids], np.int32),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
    }


@pytest.fixture(scope="module", params=["v1", "v3"])
def processor(request) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(TOKENIZERS[request.param]))


@pytest.fixture(scope="module")
def metadata(processor) -> dict:
    return sentencepiece_metadata(processor)


@pytest.fixture(scope="module")
def tokenizer(metadata) -> Tokenizer:
    return Tokenizer.from_gguf(PATH, metadata)


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_sentencepiece(text, tokenizer, processor):
    assert tokenizer.encode(text) == [processor.bos_id(), *processor.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_vocabulary(tokenizer, processor):
    ids = range(processor.vocab_size())
    assert tokenizer.vocab_size == len(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (processor.bos_id(), processor.eos_id())
    control = [i for i in ids if processor.is_control(i) or processor.is_unknown(i)]
    assert tokenizer.control_ids == {processor.id_to_piece(i): i for i in control}


def test_flags_of_spaces_and_beginnings(metadata, processor):
    flags = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = Tokenizer.from_gguf(PATH, metadata | flags)
    continuing = SentencePieceProcessor(
        model_proto=processor.serialized_model_proto() + b"\x1a\x02\x18\x00"
    )
    assert tokenizer.encode("once upon") == continuing.encode("once upon")
    assert tokenizer.encode("once upon") != processor.encode("once upon")


@pytest.mark.parametrize("kind", [1, 3, 4, 5], ids=["normal", "control", "user", "unused"])
def test_added_tokens(metadata, processor, kind):
    """Old converters made <|im_end|> a token of any type. llama.cpp goes by its name, too."""
    n = processor.vocab_size()
    more = {"<|im_end|>": kind, "<tool>": 4, "<|pad|>": 3}
    texts = [*metadata["tokenizer.ggml.tokens"], *more]
    types = np.array([*metadata["tokenizer.ggml.token_type"], *more.values()])
    scores = np.append(metadata["tokenizer.ggml.scores"], [0.0] * len(more))
    changed = {
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.eos_token_id": n,
    }
    tokenizer = Tokenizer.from_gguf(PATH, metadata | changed)
    assert tokenizer.eos_id == tokenizer.control_ids["<|im_end|>"] == n
    assert "<tool>" not in tokenizer.control_ids
    # A token that is text is found in any; one that ends turns only where that is asked for.
    assert n + 1 in tokenizer.encode("a <tool> b")
    assert n not in tokenizer.encode("a <|im_end|> b")
    assert n in tokenizer.encode("a <|im_end|> b", special_tokens=True)
    assert tokenizer.decode([n, n + 1, n + 2]) == "<tool>"


def test_an_unknown_token_of_that_form(metadata, processor):
    texts = list(metadata["tokenizer.ggml.tokens"])
    texts[processor.unk_id()] = "<|unk|>"
    tokenizer = Tokenizer.from_gguf(PATH, metadata | {"tokenizer.ggml.tokens": texts})
    assert tokenizer.control_ids["<|unk|>"] == processor.unk_id()
    assert tokenizer.encode("Once upon") == [processor.bos_id(), *processor.encode("Once upon")]


# Byte-level BPE

WORDS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
SPECIAL = ["<|begin|>", "<|end|>", "<|im_end|>"]


@pytest.fixture(scope="module", params=WORDS)
def pre(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(pre) -> tokenizers.Tokenizer:
    return train(pre)


def train(pre: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = WORDS["gpt-2"]  # so that merges cross what others cut apart
    backend.decoder = decoders.ByteLevel()
    text = Path(__file__).parents[1].joinpath("data/held_out.txt").read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text, *TEXTS * 3, *[" 0123456789 12"] * 50], trainer)
    backend.pre_tokenizer = WORDS[pre]
    backend.encode_special_tokens = True
    return backend


def byte_level_metadata(backend: tokenizers.Tokenizer, pre: str) -> dict:
    model = json.loads(backend.to_str())["model"]
    n = backend.get_vocab_size()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [backend.id_to_token(i) for i in range(n)],
        "tokenizer.ggml.token_type": np.array([3] * len(SPECIAL) + [1] * (n - len(SPECIAL))),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.fixture(scope="module")
def byte_level(trained, pre) -> Tokenizer:
    return Tokenizer.from_gguf(PATH, byte_level_metadata(trained, pre))


@pytest.mark.parametrize("text", [*TEXTS, *SPECIAL])
def test_byte_level_encodes_as_the_library(text, trained, byte_level):
    assert byte_level.encode(text, bos=False) == trained.encode(text).ids
    assert byte_level.decode(byte_level.encode(text)) == text


def test_byte_level_tokens_are_bytes(trained, byte_level):
    assert sorted(byte_level.token_bytes(i) for i in range(len(SPECIAL), 259)) == sorted(
        bytes([i]) for i in range(256)
    )
    assert byte_level.control_ids == {name: i for i, name in enumerate(SPECIAL)}
    assert not byte_level.adds_first_space


def test_unknown_token_of_byte_level_is_found_on_request_only(trained, pre):
    metadata = byte_level_metadata(trained, pre)
    types = np.array(metadata["tokenizer.ggml.token_type"])
    unknown = len(types) - 1
    types[unknown] = 2
    texts = [*metadata["tokenizer.ggml.tokens"][:-1], "<unk>"]
    changed = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    changed["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:1]
    tokenizer = Tokenizer.from_gguf(PATH, metadata | changed)
    assert unknown not in tokenizer.encode("a<unk>b")
    assert unknown in tokenizer.encode("a<unk>b", special_tokens=True)


def test_who_begins_texts(trained, pre, byte_level):
    assert byte_level.adds_bos == (pre == "llama-bpe")
    metadata = byte_level_metadata(trained, pre) | {"tokenizer.ggml.add_bos_token": True}
    assert Tokenizer.from_gguf(PATH, metadata).encode("a")[0] == 0


def test_a_token_that_is_there_twice_is_the_first(trained, pre, byte_level):
    metadata = byte_level_metadata(trained, pre)
    metadata["tokenizer.ggml.tokens"].append(metadata["tokenizer.ggml.tokens"][300])
    metadata["tokenizer.ggml.tokens"].append("[PAD]")
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], [1, 5])
    tokenizer = Tokenizer.from_gguf(PATH, metadata)
    assert tokenizer.holes == (900,)
    assert all(tokenizer.encode(text) == byte_level.encode(text) for text in TEXTS)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_byte_level_tokenizer_json(adds_bos, trained, tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained.to_str())
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 2)
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=True).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_level_tokenizer_json_without_an_end(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json has no beginning or no end of text"):
        Tokenizer.from_folder(tmp_path)


# Templates

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}"
)


def test_chat_templates(trained, pre):
    metadata = byte_level_metadata(trained, pre)
    metadata["tokenizer.chat_template"] = CHATML
    metadata["tokenizer.chat_template.tool_use"] = "tools" + CHATML
    tokenizer = Tokenizer.from_gguf(PATH, metadata)
    template = chat_template_of(PATH, tokenizer)
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    assert template.render(messages) == "<|im_start|>user\nhi <|im_end|><|im_end|>"
    assert template.render(messages, [{}]).startswith("tools<|im_start|>")
    assert encode_chat(tokenizer, messages, template).count(2) == 1  # not that of the message


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5', expected llama or gpt2"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2', expected one of gpt-2, smollm"),
        ({"pre": None}, "tokenizer.ggml.pre is None, expected a text"),
        ({"merges": [1, 2]}, r"tokenizer.ggml.merges is \[1, 2\], expected a list of texts"),
        ({"merges": ["a b c d"]}, "not a readable tokenizer"),
        ({"tokens": None}, "tokenizer.ggml.tokens is None, expected a list of texts"),
        ({"token_type": np.array([1])}, "token_type has 1 values, expected 9"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000, expected 0 to"),
        ({"eos_token_id": None}, "no beginning or no end of text"),
        ({"add_bos_token": 1}, "add_bos_token is 1, expected a bool"),
    ],
)
def test_what_is_wrong_is_named(changes, message, trained, pre):
    metadata = byte_level_metadata(trained, pre)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    if changes.get("eos_token_id", 0) is None:
        del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_gguf(PATH, metadata)
    assert "model.gguf" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores is None, expected a list of numbers"),
        ({"scores": np.zeros(3)}, "scores has 3 values, expected 3"),
        ({"token_type": np.ones(32768, int)}, "expected 32000|not a readable SentencePiece"),
    ],
)
def test_damaged_sentencepiece(changes, message, metadata):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_gguf(PATH, metadata | changes)
    assert "model.gguf" in str(error.value)


def test_a_file_without_a_tokenizer():
    assert Tokenizer.from_gguf(PATH, {}) is None
    assert Tokenizer.from_gguf(PATH, {"tokenizer.ggml.model": "none"}) is None
