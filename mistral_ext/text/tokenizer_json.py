"""Reads ``tokenizer.json``, the file of the library `tokenizers`, if it has BPE of one of two
kinds.

BPE with byte_fallback is a SentencePiece model in another form. Byte-level BPE (Llama 3, SmolLM2)
works on bytes, and writes each byte as a character: printable bytes as in Latin-1, other bytes as
characters from U+0100 on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_ext.files import refuse_lfs_pointer
from mistral_ext.text.added_tokens import AddedTokens, parts, read_added_tokens
from mistral_ext.text.vocabulary import BYTE_TOKEN, Vocabulary, named_id, piece_bytes

if TYPE_CHECKING:
    import tokenizers

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)
}


def read_tokenizer_json(path: Path) -> Vocabulary:
    """Reads a ``tokenizer.json`` and the tokens that files beside it add.

    Raises:
        ValueError: a file is damaged, or its tokenizer is neither BPE with byte fallback nor
            byte-level BPE, or it names no token for the beginning or the end of a text.
    """
    refuse_lfs_pointer(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from error
    return json_vocabulary(path, data, read_added_tokens(path.parent))


def json_vocabulary(
    path: Path, data: dict[str, Any], added: AddedTokens, adds_bos: bool | None = None
) -> Vocabulary:
    """Makes a vocabulary from the contents of a ``tokenizer.json``.

    Args:
        path: the path of the file, for error messages.
        data: the contents. They are changed: an added token is marked special if it is a control
            token in `added`.
        added: the added tokens, and the names of the tokens for the beginning and the end of a
            text.
        adds_bos: whether encoding begins with the beginning-of-text token. None: the contents
            decide.

    Raises:
        ValueError: the contents are damaged, or as in `read_tokenizer_json`.
    """
    try:
        model = data["model"]
        kind, byte_fallback = model.get("type"), model.get("byte_fallback")
        steps = [*parts(data.get("pre_tokenizer")), *parts(data.get("decoder"))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from error
    is_byte_level = not byte_fallback and any(step.get("type") == "ByteLevel" for step in steps)
    if kind != "BPE" or not (byte_fallback or is_byte_level):
        raise ValueError(
            f"{path} has type {kind!r} and byte_fallback {byte_fallback!r}, expected BPE with "
            "byte_fallback or of bytes (ByteLevel), as Mistral and Llama have it"
        )
    control = {token.content for token in added.tokens.values() if token.control}
    for entry in data.get("added_tokens") or ():
        entry["special"] = entry["content"] in control  # some files do not mark control tokens
    backend = _backend(data, path)
    names = backend.get_vocab(with_added_tokens=True)
    control_ids = {
        name: names[name] for name in sorted(control & names.keys(), key=names.__getitem__)
    }
    eos_id = named_id(added, "eos_token", names, control_ids.get("</s>"))
    bos_id = named_id(
        added, "bos_token", names, control_ids.get("<s>", eos_id if is_byte_level else None)
    )
    if bos_id is None or eos_id is None:
        raise ValueError(
            f"{path} has no beginning or no end of text (<s>, </s>) among the special tokens, "
            "expected both"
        )
    if adds_bos is None:
        # Files with byte fallback (Llama 2, Mistral) have this setting elsewhere, or not at all.
        # Their models expect the token, unless tokenizer_config.json says otherwise.
        adds_bos = bos_id in backend.encode("a").ids or not (
            is_byte_level or added.adds_bos is False
        )

    def read_token(token_id: int) -> bytes | None:
        piece = backend.id_to_token(token_id)
        if piece is None or piece in control_ids:
            return None if piece is None else b""
        if token_id in added.tokens:
            return piece.encode("utf-8")
        if is_byte_level:
            if all(character in BYTE_OF for character in piece):
                return bytes(BYTE_OF[character] for character in piece)
            return piece.encode("utf-8")
        byte = BYTE_TOKEN.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece_bytes(piece)

    continuing = _backend(_without_first_space(data), path) if added.prefix == "first" else backend
    return Vocabulary(
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        token_bytes=[read_token(i) for i in range(max(names.values()) + 1)],
        control_ids=control_ids,
        bos_id=bos_id,
        eos_id=eos_id,
        base_size=max(model["vocab"].values()) + 1,
        encode_rest=lambda text: continuing.encode(text, add_special_tokens=False).ids,
        added=added,
        adds_bos=adds_bos,
    )


def _backend(data: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # for a damaged file the library raises a plain Exception
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # despite its name: "</s>" in a text is encoded as text
    return backend


def _without_first_space(data: Any) -> Any:
    """A copy of a tokenizer.json that puts no space before a text."""
    if isinstance(data, list):
        return [_without_first_space(item) for item in data]
    if not isinstance(data, dict):
        return data
    changed = {"prepend_scheme": "never"} if data.get("type") == "Metaspace" else {}
    return {key: _without_first_space(value) for key, value in data.items()} | changed
