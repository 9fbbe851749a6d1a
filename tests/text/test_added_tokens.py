"""Added tokens against transformers, which reads the same folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from checkpoints import TOKENIZERS, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from test_tokenizer import write_tokenizer_json
from transformers import AutoTokenizer

from mistral_ext import Mistral
from mistral_ext.text.added_tokens import AddedToken, TokenFinder
from mistral_ext.text.tokenizer import Tokenizer

SIZES = {"v1": 32000, "v3": 32768}
# In the order of their ids, with what is unusual about them.
ADDED = {
    "<|im_end|>": {"special": True},
    "<|im_start|>": {},  # a control token that no file marks
    "<tool_call>": {},
    "</tool_call>": {},
    "<tool_call>s": {},
    "zingle": {"single_word": True},
    "<L>": {"lstrip": True},
    "<R>": {"rstrip": True},
    "<LR>": {"lstrip": True, "rstrip": True, "special": True},
}
TEXTS = [
    "Hello <tool_call>x</tool_call> y",
    "<tool_call>",
    "<tool_call>\n x <tool_call><tool_call>  z",
    "two<tool_call>s",
    "a zingle b prezingle zingled zingle",
    "zingle\u0301 zingle½ ²zingle zingle٣ zingle‿ Ⅷzingle zingle\u200d zingle\u200b नzingle",
    "zingleⓩ 🄰zingle zingle☃",
    "a  <L>  b  <R>  c",
    "<R>\n\n<L>",
    "Grüße<tool_call>日本語</tool_call>👋🏽",
    "plain",
    "",
]
CHATS = [
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<s>a  <LR>  b</s>",
    "<s><|im_start|>",
    "a<|im_end|>b",
]


def entry(content: str, **flags: bool) -> dict:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    return {"content": content, **plain, **flags}


def write_folder(folder: Path, version: str, decoder: bool = True, **config) -> Path:
    """A folder with a SentencePiece file and added tokens above its vocabulary."""
    folder.mkdir(exist_ok=True)
    shutil.copy(TOKENIZERS[version], folder / "tokenizer.model")
    ids = {content: SIZES[version] + i for i, content in enumerate(ADDED)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    values = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"} | config
    if decoder:
        base = {
            str(i): entry(name, special=True) for i, name in enumerate(("<unk>", "<s>", "</s>"))
        }
        added = {str(i): entry(content, **ADDED[content]) for content, i in ids.items()}
        values["added_tokens_decoder"] = base | added
    values["tokenizer_class"] = "LlamaTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return folder


@pytest.fixture(scope="module", params=["v1", "v3"])
def version(request) -> str:
    return request.param


# legacy: each piece between added tokens gets a first space; not legacy: only the first.
@pytest.fixture(scope="module", params=[{}, {"legacy": True}, {"legacy": False}], ids=str)
def folder(request, version, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("added"), version, **request.param)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def oracle(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_text_tokens_are_found(text, tokenizer, oracle):
    expected = oracle.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, bos=False) == expected
    assert tokenizer.encode(text, bos=False, special_tokens=True) == expected


@pytest.mark.parametrize("text", TEXTS + CHATS)
def test_control_tokens_on_request(text, tokenizer, oracle):
    expected = oracle.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, bos=False, special_tokens=True) == expected


@pytest.mark.parametrize("text", CHATS)
def test_control_tokens_are_text_otherwise(text, tokenizer):
    ids = tokenizer.encode(text)
    assert not set(ids[1:]) & set(tokenizer.control_ids.values())
    assert tokenizer.decode(ids) == text


@given(parts=st.lists(st.sampled_from([*ADDED, "a", "é", "\n", "x y", "<", "▁"]), max_size=8))
@settings(max_examples=150)
def test_any_mixture(parts, tokenizer, oracle):
    text = "." + "".join(parts)
    expected = oracle.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, bos=False, special_tokens=True) == expected


@pytest.mark.parametrize("adds_bos", [True, False])
def test_models_that_take_no_bos(version, tmp_path, adds_bos):
    """Yi and its fine-tunes, for instance."""
    folder = write_folder(tmp_path / "sentencepiece", version, add_bos_token=adds_bos)
    oracle = AutoTokenizer.from_pretrained(folder)
    oracle.save_pretrained(tmp_path / "json")
    config = json.loads((tmp_path / "json" / "tokenizer_config.json").read_text())
    (tmp_path / "json" / "tokenizer_config.json").write_text(
        json.dumps(config | {"add_bos_token": adds_bos})
    )
    for written in (folder, tmp_path / "json"):
        tokenizer = Tokenizer.from_folder(written)
        assert tokenizer.adds_bos == adds_bos
        assert tokenizer.encode("Hello") == oracle.encode("Hello")


def test_vocabulary(tokenizer, version):
    base = SIZES[version]
    assert tokenizer.base_size == base
    assert tokenizer.vocab_size == base + len(ADDED)
    assert tokenizer.eos_id == base  # what tokenizer_config.json calls eos_token
    control = {name for name, i in tokenizer.control_ids.items() if i >= base}
    assert control == {"<|im_end|>", "<|im_start|>", "<LR>"}
    assert tokenizer.token_bytes(base + 1) == b""
    assert tokenizer.token_bytes(base + 2) == b"<tool_call>"
    assert tokenizer.decode([base + 1, base + 2, base]) == "<tool_call>"
    assert tokenizer.version == version


def test_added_tokens_json_alone(version, tmp_path):
    """No flags there: what is not a text token shows by its name, or by being named elsewhere."""
    tokenizer = Tokenizer.from_folder(
        write_folder(tmp_path, version, decoder=False, pad_token="<R>")
    )
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user<tool_call>x<|im_end|>"
    expected = oracle.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, bos=False, special_tokens=True) == expected
    assert {"<|im_end|>", "<|im_start|>", "<R>"} < tokenizer.control_ids.keys()
    assert "<tool_call>" not in tokenizer.control_ids


@pytest.fixture(scope="module")
def whole_vocabularies(version, tmp_path_factory) -> dict[bool, str]:
    """The vocabulary as a tokenizer.json, with Metaspace or without."""
    path = tmp_path_factory.mktemp("whole") / "tokenizer.json"
    processor = SentencePieceProcessor(model_file=str(TOKENIZERS[version]))
    texts = {}
    for metaspace in (False, True):
        write_tokenizer_json(processor, path, metaspace)
        texts[metaspace] = path.read_text()
    return texts


@pytest.mark.parametrize("kind", ["prepend", "metaspace always", "metaspace first"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside tokenizer.model", "alone"])
def test_tokenizer_json(kind, beside, version, whole_vocabularies, tmp_path):
    """All of the vocabulary in a tokenizer.json, with the spaces that it says."""
    path = tmp_path / "tokenizer.json"
    data = json.loads(whole_vocabularies[kind != "prepend"])
    data["added_tokens"] += [
        {"id": SIZES[version] + i, **entry(content, **flags)}
        for i, (content, flags) in enumerate(ADDED.items())
    ]
    if kind == "metaspace always":
        data["pre_tokenizer"]["prepend_scheme"] = "always"
    data["truncation"] = data["padding"] = None
    path.write_text(json.dumps(data))
    oracle = tokenizers.Tokenizer.from_file(str(path))
    if beside:
        shutil.copy(TOKENIZERS[version], tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.path.name == ("tokenizer.model" if beside else "tokenizer.json")
    assert "<|im_start|>" in tokenizer.control_ids
    assert tokenizer.base_size == SIZES[version]
    for text in TEXTS + CHATS:
        expected = oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, bos=False, special_tokens=True) == expected, text
    for text in CHATS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_reserved_token_put_to_use(tmp_path):
    """An id of the base vocabulary under a new name."""
    shutil.copy(TOKENIZERS["v3"], tmp_path / "tokenizer.model")
    decoder = {"10": entry("<|im_end|>"), "11": entry("<note>"), "12": entry("[MIDDLE]")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.control_ids["<|im_end|>"] == 10
    assert 11 not in tokenizer.control_ids.values()
    assert tokenizer.control_ids["[MIDDLE]"] == 12  # it has kept its name, and what it is
    assert tokenizer.token_bytes(11) == b"<note>"
    assert tokenizer.encode("a<note>", bos=False)[-1] == 11
    assert tokenizer.vocab_size == tokenizer.base_size == 32768
    assert "[IMG]" not in tokenizer.control_ids
    # 750 control tokens and <unk>, without id 11
    assert len(tokenizer.control_ids) == len(set(tokenizer.control_ids.values())) == 750


def test_a_hole_in_the_numbering(tmp_path):
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"far": 32003, "near": 32001}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.holes == (32000, 32002)
    assert [i for i in range(31998, 32006) if tokenizer.known(i)] == [31998, 31999, 32001, 32003]
    assert not tokenizer.known(-1)
    assert tokenizer.token_bytes(32002) == b""


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", "[]", "holds a list, expected a JSON object"),
        ("added_tokens.json", '{"x": -1}', "id is -1, expected 0 to"),
        ("added_tokens.json", '{"x": 1e12}', "id is 1000000000000.0, expected 0 to"),
        ("added_tokens.json", '{"": 32000}', "content of id 32000 is '', expected some text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "not readable as added"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {}}}', "not readable as added"),
        (
            "tokenizer_config.json",
            '{"add_bos_token": "no"}',
            "add_bos_token is 'no', expected a bool",
        ),
        ("tokenizer.json", '{"added_tokens": [3]}', "not readable as added tokens"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_damaged_files_are_named(file, content, message, tmp_path):
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}:? .*{message}"):
        Tokenizer.from_folder(tmp_path)


words = st.lists(st.text(alphabet="ab[]<é", min_size=1, max_size=5), unique=True, max_size=12)


@given(words=words, text=st.text(alphabet="ab[]<é ", max_size=30))
@settings(max_examples=500)
def test_finder_takes_the_longest_of_the_first(words, text):
    finder = TokenFinder(AddedToken(i, word, control=False) for i, word in enumerate(words))
    expected, rest = [""], text
    while rest:
        word = max((w for w in words if rest.startswith(w)), key=len, default=None)
        if word is None:
            expected[-1] += rest[0]
        else:
            expected += [words.index(word), ""]
        rest = rest[len(word or rest[0]) :]
    assert finder.split(text) == [piece for piece in expected if piece != ""]
    starts = [i for i in range(len(text)) if any(text.startswith(w, i) for w in words)]
    assert [match.start() for match in finder.starts().finditer(text)] == starts


# ---- with a model


def test_an_added_end_token_ends_a_text(tmp_path):
    """The model's only token is <|im_end|>, 32000: above the SentencePiece vocabulary."""
    write_folder(tmp_path, "v1")
    model = write_checkpoint(tmp_path, vocab_size=32000 + len(ADDED), eos_token_id=32000)
    favour(model, 32000).save_pretrained(tmp_path)
    completion = Mistral.from_pretrained(tmp_path).generate([[1, 32001, 2188]], max_tokens=9)[0]
    assert (completion.token_ids, completion.finish_reason) == ([32000], "stop")
    assert completion.text == ""


def favour(model, token_id: int):
    """Makes a model's most likely token always the same."""
    model.model.embed_tokens.weight.data.add_(1.0)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.norm.weight.data.fill_(1.0)
    model.lm_head.weight.data[token_id] = 9.0
    return model


def test_tokenizers_end_token_ends_a_text_too(tmp_path):
    """config.json says </s>, tokenizer_config.json says <|im_end|>."""
    write_folder(tmp_path, "v1")
    model = write_checkpoint(tmp_path, vocab_size=32000 + len(ADDED), eos_token_id=2)
    favour(model, 32000).save_pretrained(tmp_path)
    assert Mistral.from_pretrained(tmp_path).generate("a", max_tokens=9)[0].token_ids == [32000]


def test_an_ordinary_end_token_is_no_part_of_the_text(tmp_path):
    """generation_config.json alone says that "zingle", a token like any other, ends a text."""
    write_folder(tmp_path, "v1", eos_token="</s>")
    zingle = 32000 + list(ADDED).index("zingle")
    model = write_checkpoint(tmp_path, vocab_size=32000 + len(ADDED))
    favour(model, zingle).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, zingle]}))
    llm = Mistral.from_pretrained(tmp_path)
    assert llm.tokenizer.token_bytes(zingle) == b"zingle"
    completion = llm.generate("a", max_tokens=9)[0]
    assert (completion.token_ids, completion.finish_reason) == ([zingle], "stop")
    assert completion.text == ""
    assert list(llm.stream("a", max_tokens=9)) == []
    assert llm.generate("a", max_tokens=2, ignore_eos=True)[0].text == "zinglezingle"


def test_more_tokens_than_rows(tmp_path):
    """A padding token without a row is no reason to refuse a model; it is never used."""
    write_folder(tmp_path, "v1", eos_token="</s>")
    write_checkpoint(tmp_path, vocab_size=32000)
    llm = Mistral.from_pretrained(tmp_path)
    sampled = llm.generate("a", max_tokens=20, temperature=50.0, ignore_eos=True, seed=1)[0]
    assert max(sampled.token_ids) < 32000
    with pytest.raises(ValueError, match="token id 32000, expected 0 to 31999"):
        llm.generate([[32000]])
    with pytest.raises(ValueError, match="32000"):
        llm.generate("a", logit_bias={32000: 1.0})


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}], ids=str)
def test_a_hole_is_never_sampled(options, tmp_path):
    """The model's favourite row is of an id between the added tokens that no token has."""
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"near": 32001, "far": 32003}')
    favour(write_checkpoint(tmp_path, vocab_size=32010), 32002).save_pretrained(tmp_path)
    llm = Mistral.from_pretrained(tmp_path)
    completion = llm.generate("a", max_tokens=3, logprobs=1, ignore_eos=True, **options)[0]
    assert all(map(llm.tokenizer.known, completion.token_ids))
    assert all(32002 not in token.top for token in completion.logprobs)
    with pytest.raises(ValueError, match="logit_bias has token id 32000, expected the id of"):
        llm.generate("a", logit_bias={32000: 1.0})


def test_more_ordinary_tokens_than_rows(tmp_path):
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    write_checkpoint(tmp_path, vocab_size=31999)
    with pytest.raises(ValueError, match=r"has 32000 tokens, but the model .* only 31999"):
        Mistral.from_pretrained(tmp_path)


@pytest.mark.parametrize("eos", [32000, [2, 32002], 32005])
def test_end_token_that_can_never_be_sampled(eos, tmp_path):
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"near": 32001, "far": 32003}')
    write_checkpoint(tmp_path, vocab_size=32010, eos_token_id=eos)
    last = eos[-1] if isinstance(eos, list) else eos
    with pytest.raises(ValueError, match=f"end of text is token id {last}, .* no such token"):
        Mistral.from_pretrained(tmp_path)
