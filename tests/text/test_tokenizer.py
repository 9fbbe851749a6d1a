"""Tokenizer against SentencePiece, mistral-common and the real vocabularies the latter ships."""

import io
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from mistral_ext.text.tokenizer import Tokenizer

mistral_common = pytest.importorskip("mistral_common")
MistralTokenizer = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer

DATA = Path(mistral_common.__file__).parent / "data"
VERSIONS = ("v1", "v2", "v3")
ORACLES = {"v1": MistralTokenizer.v1, "v2": MistralTokenizer.v2, "v3": MistralTokenizer.v3}

TEXTS = [
    "",
    " ",
    "   ",
    "Once upon a time",
    " leading",
    "  two leading",
    "trailing ",
    "trailing two  ",
    "a  b   c    d",
    "\n",
    "\n\n  indented\n\tTab\r\n",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # code\n",
    "Grüße, Ærøskøbing; ελληνικά; русский; 日本語; العربية; हिन्दी",
    "👋🏽 family 👩‍👩‍👧‍👦, flag 🇫🇷",
    "zero\u200bwidth, nul\x00, full width \uff21, ligature ﬁ, combining e\u0301",
    "[INST] hi [/INST]",
    "<s>a</s><unk>[TOOL_CALLS]<0x0A>",
    "underscore▁block",
    "0123456789 3.14159",
]


def real_file(version: str) -> Path:
    return next(DATA.glob(f"*.model.{version}"))


def folder_with(tmp_path: Path, **files: Path) -> Path:
    """A folder in tmp_path that holds copies under new names, "." written "_"."""
    for name, source in files.items():
        shutil.copy(source, tmp_path / name.replace("_", "."))
    return tmp_path


@pytest.fixture(scope="module", params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(version, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(version)
    return Tokenizer.from_folder(folder_with(folder, tokenizer_model=real_file(version)))


@pytest.fixture(scope="module")
def processor(version) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(real_file(version)))


@pytest.fixture(scope="module")
def oracle(version):
    return ORACLES[version]().instruct_tokenizer.tokenizer


# ---- ids and text


def test_vocabulary(tokenizer, version, oracle, processor):
    assert tokenizer.vocab_size == oracle.n_words == (32000 if version == "v1" else 32768)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (oracle.bos_id, oracle.eos_id) == (1, 2)
    ids = range(oracle.n_words)
    control = [i for i in ids if processor.is_control(i) or processor.is_unknown(i)]
    assert tokenizer.control_ids == {processor.id_to_piece(i): i for i in control}
    assert ("[INST]" in tokenizer.control_ids) == (version != "v1")


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_mistral_common(text, tokenizer, oracle):
    assert tokenizer.encode(text) == oracle.encode(text, bos=True, eos=False)
    assert tokenizer.encode(text, bos=False) == oracle.encode(text, bos=False, eos=False)
    # The block that SentencePiece writes for a space is the one character that does not survive.
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_unknown_token_is_a_control_token(tokenizer):
    """As in transformers and llama.cpp: it is found on request only, and it is no text."""
    assert 0 not in tokenizer.encode("a<unk>b")
    assert 0 in tokenizer.encode("a<unk>b", special_tokens=True)
    assert tokenizer.decode([0]) == ""


@pytest.mark.parametrize("is_listed", [False, True])
def test_unknown_characters_stay_visible_without_tokens_of_bytes(is_listed, tmp_path):
    """tokenizer_config.json may list <unk> as a special token."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd fab"] * 10),
        model_writer=model,
        vocab_size=12,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    if is_listed:
        listed = {"added_tokens_decoder": {"0": {"content": "<unk>", "special": True}}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("ab é🙂b")
    assert ids.count(0) == 1
    assert tokenizer.decode(ids) == "ab  ⁇ b"
    assert "<unk>" not in tokenizer.control_ids
    assert 0 not in tokenizer.encode("a", special_tokens=True)


@given(text=st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_text_round_trips_and_holds_no_control_token(text, tokenizer):
    ids = tokenizer.encode(text, bos=False)
    assert not set(ids) & set(tokenizer.control_ids.values())
    assert tokenizer.decode(ids) == text.replace("▁", " ")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_ids_decode_as_sentencepiece(data, tokenizer, processor):
    # Control tokens come first: in the middle of a character SentencePiece would break it in two.
    # The unknown token is left out: SentencePiece decodes it as a question mark.
    known = [i for i in tokenizer.control_ids.values() if processor.is_control(i)]
    control = data.draw(st.lists(st.sampled_from(known)))
    byte_ids = [i for i in range(1100) if processor.is_byte(i)]
    ordinary = st.integers(byte_ids[-1] + 1, tokenizer.vocab_size - 1)
    text_ids = data.draw(st.lists(st.one_of(ordinary, st.sampled_from(byte_ids)), max_size=30))
    if text_ids and tokenizer.token_bytes(text_ids[0]) == b" " and text_ids[0] in byte_ids:
        return  # SentencePiece keeps a first space spelled as a byte; no encoder writes one
    ids = control + text_ids
    assert tokenizer.decode(ids) == processor.decode(ids)


def test_decode_of_a_continuation_keeps_its_space(tokenizer):
    ids = tokenizer.encode("there was", bos=False)
    assert tokenizer.decode(ids) == "there was"
    assert tokenizer.decode(ids, strip_first_space=False) == " there was"
    only_one_is_stripped = tokenizer.encode("   three", bos=True)
    assert tokenizer.decode(only_one_is_stripped) == "   three"


def test_token_bytes(tokenizer, processor):
    def bytes_of(piece: str) -> bytes:
        return tokenizer.token_bytes(processor.piece_to_id(piece))

    assert bytes_of("▁the") == b" the"
    assert bytes_of("▁▁▁▁") == b"    "
    assert bytes_of("<0x0A>") == b"\n"
    assert bytes_of("<0xF0>") == b"\xf0"
    assert bytes_of("é") == "é".encode()
    assert bytes_of("<s>") == bytes_of("</s>") == b""
    emoji = tokenizer.encode("🫠", bos=False)
    assert len(emoji) > 2
    assert b"".join(map(tokenizer.token_bytes, emoji)) == " 🫠".encode()


@pytest.mark.parametrize("token_id", [-1, 32768])
def test_id_outside_the_vocabulary(token_id, tokenizer):
    with pytest.raises(ValueError, match=rf"token id is {token_id}, expected 0 to"):
        tokenizer.decode([5, token_id])


def test_encode_refuses_what_is_not_text(tokenizer):
    with pytest.raises(TypeError, match=r"text is b'.*', expected a str"):
        tokenizer.encode(b"bytes")
    with pytest.raises(ValueError, match=r"text has a lone surrogate '\\udcff' at index 2"):
        tokenizer.encode("ab\udcff")


# ---- which file


def test_version_comes_from_the_vocabulary_not_the_name(tmp_path):
    v3_in_disguise = folder_with(tmp_path, tokenizer_model=real_file("v3"))
    assert Tokenizer.from_folder(v3_in_disguise).version == "v3"


@pytest.mark.parametrize("version", VERSIONS)
def test_version_of_a_versioned_file(version, tmp_path):
    shutil.copy(real_file(version), tmp_path / f"tokenizer.model.{version}")
    assert Tokenizer.from_folder(tmp_path).version == version


def test_prefers_the_unversioned_file_then_the_highest_version(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": "never read"}')
    for number in (1, 2, 10):
        source = real_file("v1" if number < 10 else "v3")
        shutil.copy(source, tmp_path / f"tokenizer.model.v{number}")
    assert Tokenizer.from_folder(tmp_path).path.name == "tokenizer.model.v10"
    shutil.copy(real_file("v1"), tmp_path / "tokenizer.model")
    assert Tokenizer.from_folder(str(tmp_path)).path.name == "tokenizer.model"


def test_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert Tokenizer.from_folder(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "tokenizer.json"])
def test_damaged_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}(: not a readable| is a git-lfs pointer)"):
        Tokenizer.from_folder(tmp_path)


def test_truncated_sentencepiece_file(tmp_path):
    whole = real_file("v1").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) // 2 + 3])
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a readable"):
        Tokenizer.from_folder(tmp_path)


def test_tekken_is_refused(tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tekken\.json is a Tekken tokenizer"):
        Tokenizer.from_folder(tmp_path)


# ---- tokenizer.json


def write_tokenizer_json(processor: SentencePieceProcessor, path: Path, metaspace: bool) -> None:
    """The vocabulary of a SentencePiece BPE file, in either of the forms that are in use."""
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        if processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i):
            continue
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        halves = [h for h in halves if h[0] in vocab and h[1] in vocab]
        merges += [(processor.get_score(i), h) for h in halves]
    merges.sort(key=lambda merge: -merge[0])
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab, [h for _, h in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if metaspace:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            prepend_scheme="first", split=False
        )
    else:
        normalizers = tokenizers.normalizers
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    special = [p for i, p in enumerate(pieces) if processor.is_control(i)]
    backend.add_special_tokens(["<unk>", *special])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(path))


@pytest.fixture(scope="module", params=["prepend", "metaspace"])
def json_tokenizer(request, processor, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("json")
    write_tokenizer_json(processor, folder / "tokenizer.json", request.param == "metaspace")
    (folder / "tekken.json").write_text("never read")
    return Tokenizer.from_folder(folder)


def test_tokenizer_json_is_the_same_vocabulary(json_tokenizer, tokenizer):
    assert json_tokenizer.path.name == "tokenizer.json"
    assert json_tokenizer.vocab_size == tokenizer.vocab_size
    assert json_tokenizer.version == ("v1" if tokenizer.version == "v1" else "v3")
    assert (json_tokenizer.bos_id, json_tokenizer.eos_id) == (1, 2)
    assert json_tokenizer.control_ids == tokenizer.control_ids
    ids = range(tokenizer.vocab_size)
    assert all(json_tokenizer.token_bytes(i) == tokenizer.token_bytes(i) for i in ids)


@given(text=st.one_of(st.text(max_size=60), st.sampled_from(TEXTS)))
@settings(max_examples=75, deadline=None)
def test_tokenizer_json_encodes_as_sentencepiece(text, json_tokenizer, tokenizer):
    if text.startswith((" ", "▁")):
        text = "." + text  # Metaspace adds no space before a space
    assert json_tokenizer.encode(text) == tokenizer.encode(text)
    assert json_tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_tokenizer_json_with_an_added_word_and_a_hole(tmp_path):
    backend = {
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "▁": 4, "▁a": 5, "far": 9},
            "merges": ["▁ a"],
        },
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "added_tokens": [
            {
                "id": i,
                "content": content,
                "special": content.startswith("<"),
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, content in [(1, "<s>"), (2, "</s>"), (7, "new ▁word")]
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == 10
    assert tokenizer.token_bytes(8) == b""
    assert tokenizer.token_bytes(7) == "new ▁word".encode()
    assert tokenizer.encode("a") == [1, 5]


@pytest.mark.parametrize(
    "model", [tokenizers.models.BPE({"a": 0}, []), tokenizers.models.WordLevel({"a": 0}, "a")]
)
def test_tokenizer_json_of_another_family(model, tmp_path):
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json has type .*, expected BPE"):
        Tokenizer.from_folder(tmp_path)


def test_tokenizer_json_without_bos(tmp_path):
    model = tokenizers.models.BPE({"a": 0}, [], byte_fallback=True)
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no beginning or no end of text"):
        Tokenizer.from_folder(tmp_path)
