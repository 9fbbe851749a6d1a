"""Reads SentencePiece models, from the file ``tokenizer.model`` or from bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mistral_ext.files import refuse_lfs_pointer
from mistral_ext.text.added_tokens import AddedToken, AddedTokens, TokenFinder, read_added_tokens
from mistral_ext.text.vocabulary import BYTE_TOKEN, SPACE, Vocabulary, named_id, piece_bytes

# These bytes turn off the space before a text when they are appended to a model. They are the field
# normalizer_spec { add_dummy_prefix: false }. Protocol buffers may be appended to each other, and
# then the last value of a field counts.
_NO_FIRST_SPACE = b"\x1a\x02\x18\x00"


def read_sentencepiece(path: Path) -> Vocabulary:
    """Reads a ``tokenizer.model`` and the tokens that files beside it add.

    Raises:
        ValueError: a file is damaged, or the model has no <s> or no </s>.
    """
    refuse_lfs_pointer(path)
    return sentencepiece_vocabulary(path, path.read_bytes(), read_added_tokens(path.parent))


def sentencepiece_vocabulary(
    path: Path, model: bytes, added: AddedTokens, bos_id: int | None = None
) -> Vocabulary:
    """Makes a vocabulary from the bytes of a SentencePiece model.

    Args:
        path: the path of the file, for error messages.
        model: the bytes of the model, which are a protocol buffer.
        added: tokens at which a text is cut before SentencePiece encodes the pieces between them
            (added_tokens.py). The model may have them too.
        bos_id: the id of the beginning-of-text token. None: the model names it.

    Raises:
        ValueError: the model is damaged, or has no <s> or no </s>.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model)
        continuing = SentencePieceProcessor(model_proto=model + _NO_FIRST_SPACE)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable SentencePiece model ({error})") from error
    pieces = {i: processor.id_to_piece(i) for i in range(processor.vocab_size())}
    bos_id = processor.bos_id() if bos_id is None else bos_id

    # The unknown token is a control token, as in transformers and llama.cpp. Texts do not need it
    # if a character without its own token is spelled in bytes.
    control = {i for i in pieces if processor.is_control(i) or processor.is_unknown(i)}

    def read_token(token_id: int) -> bytes:
        if token_id in control:
            return b""
        piece: str = processor.id_to_piece(token_id)
        byte = BYTE_TOKEN.fullmatch(piece) if processor.is_byte(token_id) else None
        return bytes.fromhex(byte[1]) if byte else piece_bytes(piece)

    base_size = len(pieces)
    token_bytes: list[bytes | None] = [read_token(i) for i in pieces]
    finder = TokenFinder(_add(added, token_bytes, pieces, control))
    unknown = processor.unk_id()
    is_replaced = pieces[unknown] != processor.id_to_piece(unknown)
    if not any(map(processor.is_byte, range(base_size))) and not is_replaced:
        # Without tokens of bytes the unknown token stands for characters of a text. They must not
        # vanish, so the token is shown, unless an added token replaces it.
        control.discard(unknown)
        token_bytes[unknown] = processor.decode([unknown]).encode("utf-8")  # " ⁇ "
    names = {piece: i for i, piece in pieces.items()}
    eos_id = named_id(added, "eos_token", names, processor.eos_id())
    if bos_id < 0 or eos_id is None or eos_id < 0:
        raise ValueError(f"{path} has no <s> or no </s> in the vocabulary, expected both")

    def encode_rest(text: str) -> list[int]:
        spaced = text.startswith((" ", SPACE))
        is_unspaced = added.prefix == "first" or (added.prefix == "unspaced" and spaced)
        ids: list[int] = (continuing if is_unspaced else processor).encode(text)
        return ids

    def encode(text: str, first: Callable[[str], list[int]]) -> list[int]:
        encoded = []
        for i, piece in enumerate(finder.split(text)):
            if isinstance(piece, int):
                encoded.append(piece)
            else:
                encoded += first(piece) if i == 0 else encode_rest(piece)
        return encoded

    return Vocabulary(
        encode=lambda text: encode(text, processor.encode),
        token_bytes=token_bytes,
        control_ids={pieces[i]: i for i in sorted(control)},
        bos_id=bos_id,
        eos_id=eos_id,
        base_size=base_size,
        encode_rest=lambda text: encode(text, encode_rest),
        added=added,
        adds_bos=added.adds_bos is not False,
    )


def _add(
    added: AddedTokens,
    token_bytes: list[bytes | None],
    pieces: dict[int, str],
    control: set[int],
) -> list[AddedToken]:
    """Enters added tokens into the tables of a vocabulary. Returns those to find in every text: all
    but the control tokens.

    The base vocabulary may have a token of the same id. If the names are the same, too, the base
    token keeps its bytes, or becomes a control token, which has none. If the names differ, the
    added token replaces the base token.
    """
    found = []
    for i, token in added.tokens.items():
        token_bytes += [None] * (i + 1 - len(token_bytes))
        renamed = pieces.get(i) != token.content
        pieces[i] = token.content
        if token.control or (i in control and not renamed):
            control.add(i)
            token_bytes[i] = b""
        else:
            control.discard(i)
            if renamed:
                token_bytes[i] = token.content.encode("utf-8")
            found.append(token)
    return found
