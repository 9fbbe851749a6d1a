"""What the readers of tokenizer files make: encode functions, and a table id -> bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mistral_ext.text.added_tokens import AddedTokens

SPACE = "▁"  # U+2581, a space inside a SentencePiece token
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary(NamedTuple):
    """See the arguments of `Tokenizer`."""

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
    """What a SentencePiece token of the ordinary kind stands for."""
    return piece.replace(SPACE, " ").encode("utf-8")


def named_id(
    added: AddedTokens, key: str, ids: Mapping[str, int], default: int | None
) -> int | None:
    """The token that the files call by a name such as eos_token, if it is a token."""
    name = added.names.get(key)
    return default if name is None else ids.get(name, default)
