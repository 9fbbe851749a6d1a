"""Text to token ids and back, with the vocabularies of Mistral 7B.

Three vocabularies exist. v1 has 32000 tokens: <unk>, <s>, </s>, 256 bytes and ordinary pieces. v2
and v3 have 32768: 768 more control tokens ([INST], [/INST], ...) come first and everything else
moves up. All are SentencePiece BPE: a space is written "▁" inside a token, encoding puts one space
before the text, and a character without a token of its own is spelled in byte tokens <0xNN>.

Bytes, not strings, are what a token contributes: an emoji may be split over four tokens. So the
only thing kept of either file format is an encode function and a table id -> bytes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

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
        bos_id, eos_id: ids of <s> and </s>.
        control_ids: name -> id of every control token, e.g. {"<s>": 1, "[INST]": 3, ...}. Text
            never encodes to one of them, and they decode to nothing.
        adds_first_space: encoding puts a space before the text (true for Mistral's files).
    """

    def __init__(
        self,
        path: Path,
        encode: Callable[[str], list[int]],
        token_bytes: list[bytes],
        control_ids: dict[str, int],
        bos_id: int,
        eos_id: int,
    ) -> None:
        self.path = path
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.control_ids = control_ids
        self._encode = encode
        self._token_bytes = token_bytes
        self.adds_first_space = token_bytes[encode("a")[0]].startswith(b" ")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Read the tokenizer of a model folder; None when the folder has no tokenizer file.

        Takes `tokenizer.model`, else `tokenizer.model.vN` with the highest N, else
        `tokenizer.json`. Raises ValueError that names a damaged or unsuitable file.
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
        """Number of token ids; the model's embedding must have at least as many rows."""
        return len(self._token_bytes)

    @property
    def version(self) -> str:
        """Mistral's tokenizer version, "v1", "v2" or "v3": the chat template to use by default.

        v1 is told by its vocabulary, which lacks [INST]. v2 and v3 are not: the file released as
        `tokenizer.model.v3` with Mistral 7B v0.3 is byte for byte the v2 file of mistral-common.
        Their templates differ in tool use only, so a file not named `.v2` counts as v3.
        """
        if "[INST]" not in self.control_ids:
            return "v1"
        return "v2" if self.path.suffix == ".v2" else "v3"

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of text, after <s> if bos. Control tokens spelled out in text stay text."""
        check_text(text, "text")
        ids = self._encode(text)
        return [self.bos_id, *ids] if bos else ids

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
        return self._token_bytes[token_id]


def _piece_bytes(piece: str) -> bytes:
    return piece.replace(_SPACE, " ").encode("utf-8")


def _read_sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a readable SentencePiece model ({error})") from error
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise ValueError(f"{path}: no <s> or no </s> in the vocabulary; expected both")

    def read_token(token_id: int) -> bytes:
        piece = processor.id_to_piece(token_id)
        if processor.is_control(token_id):
            return b""
        if processor.is_byte(token_id):
            return bytes.fromhex(_BYTE_TOKEN.fullmatch(piece)[1])
        if processor.is_unknown(token_id):
            return processor.decode([token_id]).encode("utf-8")
        return _piece_bytes(piece)

    ids = range(processor.vocab_size())
    return Tokenizer(
        path,
        encode=processor.encode,
        token_bytes=[read_token(i) for i in ids],
        control_ids={processor.id_to_piece(i): i for i in ids if processor.is_control(i)},
        bos_id=processor.bos_id(),
        eos_id=processor.eos_id(),
    )


def _read_tokenizer_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        text = path.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        model = json.loads(text)["model"]
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from error
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ValueError(
            f"{path}: expected BPE with byte_fallback, the kind Mistral 7B uses; got type "
            f"{model.get('type')!r}, byte_fallback {model.get('byte_fallback')!r}"
        )
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # that is: "</s>" in a text is encoded as text

    added = backend.get_added_tokens_decoder()
    control_ids = {token.content: i for i, token in added.items() if token.special}
    if "<s>" not in control_ids or "</s>" not in control_ids:
        raise ValueError(f"{path}: no <s> or no </s> among the special tokens; expected both")

    def read_token(token_id: int) -> bytes:
        piece = backend.id_to_token(token_id)
        if piece is None or piece in control_ids:  # None: a hole in the numbering
            return b""
        if token_id in added:
            return piece.encode("utf-8")
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else _piece_bytes(piece)

    highest_id = max(backend.get_vocab(with_added_tokens=True).values())
    return Tokenizer(
        path,
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        token_bytes=[read_token(i) for i in range(highest_id + 1)],
        control_ids=control_ids,
        bos_id=control_ids["<s>"],
        eos_id=control_ids["</s>"],
    )
