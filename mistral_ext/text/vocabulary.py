"""What is read from a tokenizer file: functions that encode text, and the bytes of each token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mistral_ext.text.added_tokens import AddedTokens

SPACE = "▁"  # U+2581, a space inside a SentencePiece token
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary(NamedTuple):
    """The contents of a tokenizer file. The arguments and attributes of `Tokenizer` explain the
    fields."""

    encode: Callable[[str], list[int]]
    token_bytes: Sequence[bytes | None]
    control_ids: Mapping[str, int]
    bos_id: int
    eos_id: int
    base_size: int | None = None
    encode_rest: Callable[[str], list[int]] | None = None
    added: AddedTokens | None = None
    adds_bos: bool = True


def piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece token that is neither a control nor a byte token (<0x0A>)."""
    return piece.replace(SPACE, " ").encode("utf-8")


def named_id(
    added: AddedTokens, key: str, ids: Mapping[str, int], default: int | None
) -> int | None:
    """The id of the token that the tokenizer's files name as `key`, such as "eos_token". Returns
    `default` if they name no token, or a token that is not in `ids`."""
    name = added.names.get(key)
    return default if name is None else ids.get(name, default)
