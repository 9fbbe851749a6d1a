"""Turns text into token ids and back, with the vocabularies of Mistral 7B and of Llama models.

Mistral 7B has three versions of its tokenizer, with two vocabularies. v1 has 32000 tokens: <unk>,
<s>, </s>, 256 bytes and ordinary pieces. v2 and v3 have 32768 tokens: 768 more control tokens
([INST], [/INST], ...) follow </s>, and later ids are higher by 768. Both are SentencePiece BPE: a
space is written "▁" inside a token, encoding puts one space before the text, and a character
without its own token is spelled in byte tokens <0xNN>.

Fine-tunes add their own tokens (`added_tokens`). Added tokens that are text are found in every
text. Control tokens are found only on request, so that nobody's text can end a turn of a chat.

Llama 3 and SmolLM2 have byte-level BPE: no first space, and a token for each byte.

A token stands for bytes, not for a string: an emoji may be split over four tokens. So every file
format is reduced to encode functions and a table id -> bytes (`vocabulary`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from mistral_ext.text.added_tokens import AddedToken, AddedTokens, TokenFinder
from mistral_ext.text.gguf_tokenizer import gguf_chat_templates, gguf_vocabulary
from mistral_ext.text.sentencepiece_file import read_sentencepiece
from mistral_ext.text.tokenizer_json import read_tokenizer_json

UTF8_ERRORS = "mistral_ext.replace_bytes"


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# Writes one U+FFFD for each byte that is not UTF-8, as SentencePiece does. "replace" would write a
# single U+FFFD for a whole incomplete character.
codecs.register_error(UTF8_ERRORS, _replace_bytes)


def check_text(text: str, name: str) -> None:
    """Raises TypeError or ValueError unless text is valid Unicode. The message names the
    argument."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {text!r:.60}, expected a str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # for instance a command line argument that is not UTF-8
        raise ValueError(
            f"{name} has a lone surrogate {text[error.start]!r} at index {error.start}, expected "
            "valid Unicode"
        ) from None


def expect_token_ids(ids: object, vocab_size: int, name: str) -> None:
    """Raises TypeError or ValueError unless ids are a sequence of one or more token ids below
    vocab_size. The message has `name`."""
    # In Python the elements of bytes are ints, and bool is a subclass of int. Neither bytes nor
    # bools are token ids.
    if (
        not isinstance(ids, Sequence)
        or isinstance(ids, bytes | bytearray | memoryview)
        or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids)
    ):
        raise TypeError(f"{name} is {ids!r:.60}, expected text or a list of token ids")
    if not ids:
        raise ValueError(f"{name} is empty, expected at least one token id")
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"{name} has token id {i}, expected 0 to {vocab_size - 1}")


class Tokenizer:
    """Encodes text to token ids and decodes ids to text.

    Attributes:
        path: the file that holds the tokenizer.
        bos_id, eos_id: the ids of the tokens that begin and end a text. They are <s> and </s>,
            unless the files name other tokens.
        control_ids: name -> id of every control token, e.g. {"<s>": 1, "[INST]": 3, ...}. Text
            encodes to a control token only on request, and control tokens decode to nothing. The
            unknown token, <unk>, is a control token, except in a SentencePiece file without tokens
            of bytes, where it stands for characters. An added token is a control token if a file
            marks it special, or if it has the form <|name|>, because many fine-tunes do not mark
            <|im_start|> and <|im_end|>.
        names: the texts of tokens by their use ("bos_token", "pad_token", ...), if the files name
            them. A text is None if the files say that there is no such token.
        base_size: the number of ids without added tokens. A model's output matrix must have at
            least as many rows.
        adds_bos: whether encoding begins with the beginning-of-text token (true for Mistral's
            files, false if tokenizer_config.json has an add_bos_token of false).
        chat_templates: templates by name, if the file itself holds them, as GGUF files do. Empty:
            it holds no templates.
        adds_first_space: whether encoding puts a space before the text (true for Mistral's files).

    Args:
        encode: returns the ids of a text.
        token_bytes: the bytes of each id, or None if no token has the id.
        encode_rest: returns the ids of a text that follows a control token. Some vocabularies put
            no space before it. None: `encode` does this, too.
        added: the added tokens. They give the control tokens their flags (`lstrip`, ...). None: no
            tokens were added.
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
        adds_bos: bool = True,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.control_ids = dict(control_ids)
        self.adds_bos = adds_bos
        self.chat_templates = dict(chat_templates or {})
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
        """Reads the tokenizer of a model folder. Returns None if the folder has no tokenizer file.

        Reads `tokenizer.model`, else `tokenizer.model.vN` with the highest N, else
        `tokenizer.json`, and adds the tokens of other files. Raises ValueError if a file is damaged
        or unsuitable. The message names the file.
        """
        folder = Path(folder)
        names = {path.name for path in folder.iterdir()}
        versions = [int(m[1]) for n in names if (m := re.fullmatch(r"tokenizer\.model\.v(\d+)", n))]
        if "tokenizer.model" in names:
            return cls._read(folder / "tokenizer.model")
        if versions:
            return cls._read(folder / f"tokenizer.model.v{max(versions)}")
        if "tokenizer.json" in names:
            return cls._read(folder / "tokenizer.json")
        if "tekken.json" in names:
            raise ValueError(
                f"{folder / 'tekken.json'} is a Tekken tokenizer, expected tokenizer.model, "
                "tokenizer.model.vN or tokenizer.json: no Mistral 7B uses Tekken"
            )
        return None

    @classmethod
    def _read(cls, path: Path) -> Tokenizer:
        is_json = path.suffix == ".json"
        vocabulary = read_tokenizer_json(path) if is_json else read_sentencepiece(path)
        return cls(path, **vocabulary._asdict())

    @classmethod
    def from_gguf(cls, path: Path, metadata: Mapping[str, Any]) -> Tokenizer | None:
        """Makes the tokenizer that the metadata of a GGUF file describe. Returns None if they
        describe no tokenizer.

        Raises ValueError if the metadata are wrong. The message names the file.
        """
        vocabulary = gguf_vocabulary(path, metadata)
        if vocabulary is None:
            return None
        templates = gguf_chat_templates(path, metadata)
        return cls(path, **vocabulary._asdict(), chat_templates=templates)

    @property
    def vocab_size(self) -> int:
        """The number of ids in the vocabulary, including added tokens and holes in the numbering.

        The output matrix of a model may have fewer or more rows. The model may sample the ids below
        both numbers, except `holes`.
        """
        return len(self._token_bytes)

    def first_difference(self, other: Tokenizer, count: int) -> int | None:
        """The lowest of the first `count` ids that stands for another token in the vocabulary
        `other`. Returns None if all these ids stand for the same tokens."""
        names, others = (
            {token_id: name for name, token_id in one.control_ids.items()} for one in (self, other)
        )
        for i in range(count):
            if not (self.known(i) == other.known(i) and names.get(i) == others.get(i)):
                return i
            if self.known(i) and self.token_bytes(i) != other.token_bytes(i):
                return i
        return None

    def known(self, token_id: int) -> bool:
        """Whether a token has this id."""
        return 0 <= token_id < self.vocab_size and self._token_bytes[token_id] is not None

    @property
    def holes(self) -> tuple[int, ...]:
        """Ids below vocab_size that no token has."""
        return tuple(i for i, data in enumerate(self._token_bytes) if data is None)

    @property
    def version(self) -> str:
        """Mistral's tokenizer version, "v1", "v2" or "v3", which is also the name of the chat
        template to use by default.

        v1 is recognised by its vocabulary, which lacks [INST]. v2 and v3 have the same vocabulary:
        the `tokenizer.model.v3` of Mistral 7B v0.3 is byte for byte the v2 file of mistral-common.
        Their templates differ only in the use of tools, so a file not named `.v2` counts as v3.
        """
        if self.control_ids.get("[INST]", self.base_size) >= self.base_size:
            return "v1"
        return "v2" if self.path.suffix == ".v2" else "v3"

    def encode(self, text: str, bos: bool = True, special_tokens: bool = False) -> list[int]:
        """Encodes text to token ids. They begin with <s> if `bos`, and if the model's texts begin
        so (`adds_bos`).

        Control tokens that the text spells out stay text. With `special_tokens` they become control
        tokens, as in the text that a chat template writes. A text that spells out <s> at its start
        gets no second <s>.
        """
        check_text(text, "text")
        ids = self.encode_pieces(self.split_control_tokens(text) if special_tokens else [text])
        return [*self.start, *ids] if bos and ids[:1] != [self.bos_id] else ids

    @property
    def start(self) -> list[int]:
        """The ids with which every text begins: that of <s>, or an empty list."""
        return [self.bos_id] if self.adds_bos else []

    def split_control_tokens(self, text: str) -> list[str | int]:
        """Cuts a text at the control tokens that it spells out. Returns the ids of these tokens and
        the pieces of text between them, in order."""
        return self._control_finder.split(text)

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Encodes pieces of a text. An int is a token id. A string is plain text, even if it spells
        a control token."""
        ids = []
        for i, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encode(piece) if i == 0 else self._encode_rest(piece)
        return ids

    def control_token_starts(self) -> re.Pattern[str]:
        """A pattern that matches single characters: the first of each control token that a text
        spells out. jinja_template.py marks these characters in messages."""
        return self._control_finder.starts()

    def decode(self, ids: Iterable[int], strip_first_space: bool = True) -> str:
        """The text of ids, without control tokens.

        With `strip_first_space` the ids begin a text, so the space that encoding put there is
        removed. Without it the ids continue a text, and a first space belongs to the text. Bytes
        that are not UTF-8 become U+FFFD.
        """
        data = b"".join(map(self.token_bytes, ids))
        if strip_first_space and self.adds_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", UTF8_ERRORS)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a running text. They are b"" for control tokens and for
        holes.

        Raises ValueError for an id outside the vocabulary.
        """
        if not 0 <= token_id < len(self._token_bytes):
            raise ValueError(
                f"token id is {token_id}, expected 0 to {self.vocab_size - 1} ({self.path.name})"
            )
        return self._token_bytes[token_id] or b""
