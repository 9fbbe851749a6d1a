"""Makes tokenizers from the metadata of GGUF files.

Two kinds are supported. "llama" is SentencePiece: this module makes a SentencePiece model in
memory, and the library encodes with it. "gpt2" is byte-level BPE: this module makes a
tokenizer.json in memory. Byte-level BPE cuts a text into words before it merges bytes. GGUF files
do not hold the rules for this, only a name of the rules (`tokenizer.ggml.pre`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mistral_ext.text.added_tokens import AddedToken, AddedTokens, has_control_shape
from mistral_ext.text.sentencepiece_file import sentencepiece_vocabulary
from mistral_ext.text.tokenizer_json import json_vocabulary
from mistral_ext.text.vocabulary import Vocabulary

# The types of tokens. SentencePiece uses the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


class _Words(NamedTuple):
    """The rules that a name in a GGUF file stands for: how to cut a text into words, and more."""

    steps: list[dict[str, Any]]  # cut a text into words, in the form of tokenizer.json
    ignore_merges: bool = False  # a word that is a token is taken without merges
    adds_bos: bool = False  # used if the file has no tokenizer.ggml.add_bos_token


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT_2 = _Words([_BYTES | {"use_regex": True}])
_DIGITS_APART = _Words([{"type": "Digits", "individual_digits": True}, *_GPT_2.steps])
_LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = _Words(
    [
        {
            "type": "Split",
            "pattern": {"Regex": _LLAMA_3_WORDS},
            "behavior": "Isolated",
            "invert": False,
        },
        _BYTES | {"use_regex": False},
    ],
    ignore_merges=True,
    adds_bos=True,
)
_PRE = {
    "gpt-2": _GPT_2,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
}


def gguf_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Vocabulary | None:
    """Returns the vocabulary of a GGUF file, or None if the file has no vocabulary.

    Args:
        path: the path of the file, for error messages.
        metadata: the metadata of the file.

    Raises:
        ValueError: the kind of tokenizer is not supported, or its tokens are damaged.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    readers = {"llama": _sentencepiece, "gpt2": _byte_level}
    if kind not in readers:
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {kind!r:.60}, expected {' or '.join(readers)}"
        )
    return readers[kind](_Tokens(path, metadata))


def gguf_chat_templates(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the chat templates of a GGUF file by name. The dict may be empty."""
    key = "tokenizer.chat_template"
    templates = {
        "default" if name == key else name.removeprefix(f"{key}."): text
        for name, text in metadata.items()
        if name == key or name.startswith(f"{key}.")
    }
    for name, text in templates.items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: chat template {name!r} is {text!r:.60}, expected a text")
    return templates


class _Tokens:
    """The tokens of a file: their texts and types, and the ids of tokens with special uses."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.texts: Sequence[str] = self.values("tokens", str)
        n_tokens = len(self.texts)
        self.types: Sequence[int] = self.values("token_type", int, [_NORMAL] * n_tokens, n_tokens)

    def values(
        self, key: str, kind: type, default: Sequence[Any] | None = None, length: int | None = None
    ) -> Sequence[Any]:
        """An array of texts or numbers, as a list.

        Args:
            key: the key of the array after "tokenizer.ggml.".
            kind: the type of the elements, in Python.
            default: the array if the file has none. None: the file must have it.
            length: the number of elements. None: any number but 0.
        """
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        values = value if isinstance(value, list) else getattr(value, "tolist", list)()
        if value is None or not values or not isinstance(values[0], kind):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{key} is {value!r:.60}, expected a list of "
                f"{'texts' if kind is str else 'numbers'}"
            )
        if length is not None and len(values) != length:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{key} has {len(values)} values, expected {length}, "
                "one for each token"
            )
        return values

    def id_of(self, name: str, default: int | None = None) -> int | None:
        """The id of the token with a special use, such as "eos". Returns `default` if the file does
        not give it."""
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        if value is not None and not (isinstance(value, int) and 0 <= value < len(self.texts)):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{name}_token_id is {value!r:.60}, expected 0 to "
                f"{len(self.texts) - 1}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: tokenizer.ggml.{key} is {value!r:.60}, expected a bool")
        return value

    def text(self, key: str) -> str:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, str):
            raise ValueError(f"{self.path}: tokenizer.ggml.{key} is {value!r:.60}, expected a text")
        return value

    def added(self, types: Iterable[int], ids: Mapping[str, int | None]) -> AddedTokens:
        """Returns as added tokens the tokens of the given types, and all tokens of the form
        <|name|>, because some converters mark these as normal. `ids` has the id of the token for
        each special use, such as "eos". An id of None means that the file has no such token."""
        tokens = {}
        for i, (text, kind) in enumerate(zip(self.texts, self.types, strict=True)):
            if (kind in types or has_control_shape(text)) and text:
                is_control = kind in (_UNKNOWN, _CONTROL) or has_control_shape(text)
                tokens[i] = AddedToken(i, text, is_control)
        names = {
            f"{use}_token": None if token_id is None else self.texts[token_id]
            for use, token_id in ids.items()
        }
        # "all", because llama.cpp puts a space before each piece that follows an added token.
        return AddedTokens(tokens, names, prefix="all")


# SentencePiece


def _sentencepiece(tokens: _Tokens) -> Vocabulary:
    scores = tokens.values("scores", float, length=len(tokens.texts))
    ids = {"bos": tokens.id_of("bos", 1), "eos": tokens.id_of("eos", 2)}
    pieces = zip(tokens.texts, scores, tokens.types, strict=True)
    model = _model_proto(pieces, tokens.flag("add_space_prefix", True))
    added = tokens.added((_USER_DEFINED,), ids)
    vocabulary = sentencepiece_vocabulary(tokens.path, model, added, ids["bos"])
    return vocabulary._replace(adds_bos=tokens.flag("add_bos_token", True))


def _model_proto(pieces: Iterable[tuple[str, float, int]], adds_first_space: bool) -> bytes:
    """The bytes of a SentencePiece model: BPE without normalisation, in which a character without a
    token of its own is spelled in bytes. The numbers of the fields are those of ModelProto in
    sentencepiece_model.proto."""
    proto = bytearray()
    for text, score, kind in pieces:
        # The unknown token keeps its type, because a model must have one.
        if kind != _UNKNOWN and has_control_shape(text):
            kind = _CONTROL
        data = text.encode("utf-8", "surrogateescape")
        # b"\x15" announces the score: field 2, a 32-bit float.
        piece = _field(1, data) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        proto += _field(1, piece)
    bpe_with_bytes = _number(3, 2) + _number(35, 1)
    spaces = _number(3, adds_first_space) + _number(4, 0) + _number(5, 1)
    proto += _field(2, bpe_with_bytes) + _field(3, _field(1, b"identity") + spaces)
    return bytes(proto)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


# Byte-level BPE


def _byte_level(tokens: _Tokens) -> Vocabulary:
    pre = tokens.text("pre")
    if pre not in _PRE:
        raise ValueError(
            f"{tokens.path}: tokenizer.ggml.pre is {pre!r:.60}, expected one of {', '.join(_PRE)}: "
            "another would give other tokens"
        )
    eos_id = tokens.id_of("eos")
    added = tokens.added(
        (_UNKNOWN, _CONTROL, _USER_DEFINED), {"bos": tokens.id_of("bos", eos_id), "eos": eos_id}
    )
    data = {
        "added_tokens": [_added_entry(token) for token in added.tokens.values()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[pre].steps},
        "decoder": _BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            # If a token occurs twice, its first id counts.
            "vocab": {text: i for i, text in reversed(list(enumerate(tokens.texts)))},
            "merges": list(tokens.values("merges", str)),
            "ignore_merges": _PRE[pre].ignore_merges,
        },
    }
    adds_bos = tokens.flag("add_bos_token", _PRE[pre].adds_bos)
    return json_vocabulary(tokens.path, data, added, adds_bos)


def _added_entry(token: AddedToken) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token.id, "content": token.content, "special": token.control, **flags}
