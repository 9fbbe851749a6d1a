"""Text to token ids and back, with the vocabularies of Mistral 7B.

Three vocabularies exist. v1 has 32000 tokens: <unk>, <s>, </s>, 256 bytes and ordinary pieces. v2
and v3 have 32768: 768 more control tokens ([INST], [/INST], ...) come first and everything else
moves up. All are SentencePiece BPE: a space is written "▁" inside a token, encoding puts one space
before the text, and a character without a token of its own is spelled in byte tokens <0xNN>.

Fine-tunes add tokens of their own (`added_tokens`). Those that are text are found in every text;
control tokens only where they are asked for, so that nobody's text can end a turn of a chat.

Bytes, not strings, are what a token contributes: an emoji may be split over four tokens. So the
only thing kept of either file format are encode functions and a table id -> bytes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_ext.files import refuse_lfs_pointer
from mistral_ext.text.added_tokens import AddedToken, AddedTokens, TokenFinder, read_added_tokens

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"  # U+2581
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

UTF8_ERRORS = "mistral_ext.replace_bytes"


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# One U+FFFD for each byte that is not UTF-8, as SentencePiece decodes; "replace" would write one
# for a whole incomplete character.
codecs.register_error(UTF8_ERRORS, _replace_bytes)


def check_text(text: str, name: str) -> None:
    """Raise TypeError or ValueError, naming the argument, unless text is a str of valid Unicode."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected str, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # e.g. a command line argument that is not UTF-8
        raise ValueError(
            f"{name}: expected valid Unicode, got a lone surrogate "
            f"{text[error.start]!r} at index {error.start}"
        ) from None


class Tokenizer:
    """Encodes text to token ids and decodes ids to text.

    Attributes:
        path: the file it was read from.
        bos_id, eos_id: ids of <s> and </s>; eos_id may be another that the model's files name.
        control_ids: name -> id of every control token, e.g. {"<s>": 1, "[INST]": 3, ...}. Text
            never encodes to one of them unless that is asked for, and they decode to nothing.
            An added token is one if any file marks it special, or if it is written <|so|>: many
            fine-tunes leave <|im_start|> and <|im_end|> unmarked.
        names: of tokens by their use, as far as files say: "bos_token", "pad_token", ...; None if
            they say that there is none.
        base_size: ids of the vocabulary without added tokens; a model must have as many rows.
        adds_first_space: encoding puts a space before the text (true for Mistral's files).

    Args:
        encode: ids of a text.
        token_bytes: of each id; None where the numbering has a hole.
        encode_rest: ids of a text that follows a control token; None: as at the beginning.
        added: tokens beyond the base vocabulary; their flags count for control tokens.
    """

    def __init__(
        self,
        path: Path,
        encode: Callable[[str], list[int]],
        token_bytes: Sequence[bytes | None],
        control_ids: Mapping[str, int],
        bos_id: int,
        eos_id: int,
        base_size: int | None = None,
        encode_rest: Callable[[str], list[int]] | None = None,
        added: AddedTokens | None = None,
    ) -> None:
        self.path = path
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.control_ids = dict(control_ids)
        self.names = dict(added.names) if added else {}
        self.base_size = len(token_bytes) if base_size is None else base_size
        self._encode = encode
        self._encode_rest = encode_rest or encode
        self._token_bytes = token_bytes
        tokens = added.tokens if added else {}
        self._control_finder = TokenFinder(
            tokens.get(i, AddedToken(i, name, control=True)) for name, i in control_ids.items()
        )
        self.adds_first_space = (self.token_bytes(encode("a")[0])).startswith(b" ")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Read the tokenizer of a model folder; None when the folder has no tokenizer file.

        Takes `tokenizer.model`, else `tokenizer.model.vN` with the highest N, else
        `tokenizer.json`; and added tokens from wherever they stand. Raises ValueError that names a
        damaged or unsuitable file.
        """
        folder = Path(folder)
        names = {path.name for path in folder.iterdir()}
        versions = [int(m[1]) for n in names if (m := re.fullmatch(r"tokenizer\.model\.v(\d+)", n))]
        if "tokenizer.model" in names:
            return _read_sentencepiece(folder / "tokenizer.model")
        if versions:
            return _read_sentencepiece(folder / f"tokenizer.model.v{max(versions)}")
        if "tokenizer.json" in names:
            return _read_tokenizer_json(folder / "tokenizer.json")
        if "tekken.json" in names:
            raise ValueError(
                f"{folder / 'tekken.json'}: a Tekken tokenizer, which no Mistral 7B uses; "
                "expected tokenizer.model, tokenizer.model.vN or tokenizer.json"
            )
        return None

    @property
    def vocab_size(self) -> int:
        """Ids of the vocabulary, added tokens and holes in the numbering included.

        A model with fewer rows can neither read nor write the rest, one with more must not write
        what has no token: it may sample the ids below both numbers that are no `holes`.
        """
        return len(self._token_bytes)

    def known(self, token_id: int) -> bool:
        """Whether there is a token of this id."""
        return 0 <= token_id < self.vocab_size and self._token_bytes[token_id] is not None

    @property
    def holes(self) -> tuple[int, ...]:
        """Ids below vocab_size that no token has."""
        return tuple(i for i, data in enumerate(self._token_bytes) if data is None)

    @property
    def version(self) -> str:
        """Mistral's tokenizer version, "v1", "v2" or "v3": the chat template to use by default.

        v1 is told by its vocabulary, which lacks [INST]. v2 and v3 are not: the file released as
        `tokenizer.model.v3` with Mistral 7B v0.3 is byte for byte the v2 file of mistral-common.
        Their templates differ in tool use only, so a file not named `.v2` counts as v3.
        """
        if self.control_ids.get("[INST]", self.base_size) >= self.base_size:
            return "v1"
        return "v2" if self.path.suffix == ".v2" else "v3"

    def encode(self, text: str, bos: bool = True, special_tokens: bool = False) -> list[int]:
        """Token ids of text, after <s> if bos.

        Control tokens spelled out in text stay text, unless special_tokens: then they are those
        tokens, as in the text that a chat template writes.
        """
        check_text(text, "text")
        ids = self.encode_pieces(self.split_control_tokens(text) if special_tokens else [text])
        return [self.bos_id, *ids] if bos else ids

    def split_control_tokens(self, text: str) -> list[str | int]:
        """A text cut at the control tokens that it spells out: their ids, and the text between."""
        return self._control_finder.split(text)

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Token ids of a text that is cut already; the strings are text, whatever they spell."""
        ids = []
        for i, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encode(piece) if i == 0 else self._encode_rest(piece)
        return ids

    def control_token_starts(self) -> re.Pattern[str]:
        """A pattern of one character: any of a text at which it spells out a control token."""
        return self._control_finder.starts()

    def decode(self, ids: Iterable[int], strip_first_space: bool = True) -> str:
        """Text of ids, without control tokens.

        strip_first_space: ids start a text, so remove the space that encoding put there. False: ids
        continue a text, and a first space belongs to it. Bytes that are not UTF-8 become U+FFFD.
        """
        data = b"".join(map(self.token_bytes, ids))
        if strip_first_space and self.adds_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", UTF8_ERRORS)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a running text: b"" for control tokens.

        Raises ValueError for an id outside the vocabulary.
        """
        if not 0 <= token_id < len(self._token_bytes):
            raise ValueError(
                f"token id {token_id}: expected 0 to {self.vocab_size - 1} ({self.path.name})"
            )
        return self._token_bytes[token_id] or b""


def _piece_bytes(piece: str) -> bytes:
    return piece.replace(_SPACE, " ").encode("utf-8")


def _eos_id(added: AddedTokens, ids: Mapping[str, int], default: int) -> int:
    """The token that ends a text: what the files call eos_token, if it is a token."""
    name = added.names.get("eos_token")
    return default if name is None else ids.get(name, default)


# Protocol buffers may be appended to each other, and the last value of a field counts. These bytes
# are normalizer_spec { add_dummy_prefix: false }.
_NO_FIRST_SPACE = b"\x1a\x02\x18\x00"


def _read_sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    refuse_lfs_pointer(path)
    try:
        model = path.read_bytes()
        processor = SentencePieceProcessor(model_file=str(path))
        continuing = SentencePieceProcessor(model_proto=model + _NO_FIRST_SPACE)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable SentencePiece model ({error})") from error
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise ValueError(f"{path}: no <s> or no </s> in the vocabulary; expected both")
    added = read_added_tokens(path.parent)

    def read_token(token_id: int) -> bytes:
        if processor.is_control(token_id):
            return b""
        if processor.is_unknown(token_id):
            text: str = processor.decode([token_id])
            return text.encode("utf-8")
        piece: str = processor.id_to_piece(token_id)
        byte = _BYTE_TOKEN.fullmatch(piece) if processor.is_byte(token_id) else None
        return bytes.fromhex(byte[1]) if byte else _piece_bytes(piece)

    ids = range(processor.vocab_size())
    token_bytes: list[bytes | None] = [read_token(i) for i in ids]
    pieces = {i: processor.id_to_piece(i) for i in ids}
    control = {i for i in ids if processor.is_control(i)}
    finder = TokenFinder(_add(added, token_bytes, pieces, control))

    def encode_rest(text: str) -> list[int]:
        spaced = text.startswith((" ", _SPACE))
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

    return Tokenizer(
        path,
        encode=lambda text: encode(text, processor.encode),
        token_bytes=token_bytes,
        control_ids={pieces[i]: i for i in sorted(control)},
        bos_id=processor.bos_id(),
        eos_id=_eos_id(added, {piece: i for i, piece in pieces.items()}, processor.eos_id()),
        base_size=len(ids),
        encode_rest=lambda text: encode(text, encode_rest),
        added=added,
    )


def _add(
    added: AddedTokens,
    token_bytes: list[bytes | None],
    pieces: dict[int, str],
    control: set[int],
) -> list[AddedToken]:
    """Enters added tokens into a vocabulary's tables; returns those to be found in every text.

    Some are of the base vocabulary, under the same name or (a reserved token put to use) a new one.
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


def _read_tokenizer_json(path: Path) -> Tokenizer:
    refuse_lfs_pointer(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model = data["model"]
        kind, byte_fallback = model.get("type"), model.get("byte_fallback")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from error
    if kind != "BPE" or not byte_fallback:
        raise ValueError(
            f"{path}: expected BPE with byte_fallback, the kind Mistral 7B uses; got type "
            f"{kind!r}, byte_fallback {byte_fallback!r}"
        )
    added = read_added_tokens(path.parent)
    control = {token.content for token in added.tokens.values() if token.control}
    for entry in data.get("added_tokens") or ():
        entry["special"] = entry["content"] in control  # which some files do not say
    backend = _backend(data, path)
    names = backend.get_vocab(with_added_tokens=True)
    control_ids = {
        name: names[name] for name in sorted(control & names.keys(), key=names.__getitem__)
    }
    if "<s>" not in control_ids or "</s>" not in control_ids:
        raise ValueError(f"{path}: no <s> or no </s> among the special tokens; expected both")

    def read_token(token_id: int) -> bytes | None:
        piece = backend.id_to_token(token_id)
        if piece is None or piece in control_ids:
            return None if piece is None else b""
        if token_id in added.tokens:
            return piece.encode("utf-8")
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else _piece_bytes(piece)

    continuing = _backend(_without_first_space(data), path) if added.prefix == "first" else backend
    return Tokenizer(
        path,
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        token_bytes=[read_token(i) for i in range(max(names.values()) + 1)],
        control_ids=control_ids,
        bos_id=control_ids["<s>"],
        eos_id=_eos_id(added, names, control_ids["</s>"]),
        base_size=max(model["vocab"].values()) + 1,
        encode_rest=lambda text: continuing.encode(text, add_special_tokens=False).ids,
        added=added,
    )


def _backend(data: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # that is: "</s>" in a text is encoded as text
    return backend


def _without_first_space(data: Any) -> Any:
    """The contents of a tokenizer.json that puts no space before a text."""
    if isinstance(data, list):
        return [_without_first_space(item) for item in data]
    if not isinstance(data, dict):
        return data
    changed = {"prepend_scheme": "never"} if data.get("type") == "Metaspace" else {}
    return {key: _without_first_space(value) for key, value in data.items()} | changed
