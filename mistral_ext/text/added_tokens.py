"""Reads the tokens that a fine-tune added to its base model's vocabulary, and finds them in texts.

Up to three files list these tokens: `tokenizer.json`, `tokenizer_config.json`
("added_tokens_decoder") and `added_tokens.json`. Encoding first cuts a text at the added tokens
that it spells out, except control tokens. Then the vocabulary's own algorithm encodes the pieces
between them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any

from mistral_ext.files import read_json_object

# The ids of added tokens must be below this limit. Without it a damaged file could make a table of
# a thousand million entries.
_ID_LIMIT = 2**20

# The keys under which tokenizer_config.json and special_tokens_map.json name special tokens.
_SPECIAL_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")

# Tokens such as <|im_start|>. Many files do not mark them special, although they end turns.
_CONTROL_SHAPE = re.compile(r"<\|[^\s|]+\|>")
_WHITE_SPACE = re.compile(r"\s+")
_JOINERS = "\u200c\u200d"  # invisible characters inside a word
# Circled and squared letters, which have the category of symbols.
_LETTER_SYMBOL = re.compile("[Ⓐ-ⓩ🄰-🅉🅐-🅩🅰-🆉]")


def has_control_shape(content: str) -> bool:
    """Whether a token has the form <|name|>."""
    return _CONTROL_SHAPE.fullmatch(content) is not None


@dataclass(frozen=True)
class AddedToken:
    """A token that a text may spell out.

    Attributes:
        control: whether the token is a signal and not text: a file marks it special, or it has the
            form <|name|>.
        lstrip, rstrip: whether white space on the left or right side of the token belongs to it.
        single_word: if True, the token is found only where it is not a part of a longer word.
    """

    id: int
    content: str
    control: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class AddedTokens:
    """What the files of a folder say about tokens, beyond the base vocabulary.

    Attributes:
        tokens: the added tokens by their ids. The base vocabulary may have some of them, too.
        names: the texts of the tokens for "bos_token", "eos_token" and so on, if a file names them.
            A text is None if a file says that there is no such token.
        prefix: encoding may put a space before a text. If the text was cut at added tokens, these
            pieces get the space: "first" (only the piece with which the text begins), "all", or
            "unspaced" (those that do not begin with a space).
        adds_bos: whether texts begin with the beginning-of-text token. None: the files do not say
            it.
    """

    tokens: dict[int, AddedToken]
    names: dict[str, str | None]
    prefix: str
    adds_bos: bool | None = None


def read_added_tokens(folder: Path) -> AddedTokens:
    """Reads the files that list added tokens. Each of them may be missing from a model folder.

    Raises:
        ValueError: a file is damaged. The message names the file.
    """
    data = {
        name: read_json_object(folder / name) if (folder / name).is_file() else {}
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
        )
    }
    config = data["tokenizer_config.json"]
    names: dict[str, str | None] = {}
    special: set[str | None] = set()
    for values in (data["special_tokens_map.json"], config):
        names |= {key: _content(values.get(key)) for key in _SPECIAL_KEYS if key in values}
        names |= {
            key: content
            for key, token in values.items()
            if key.endswith("_token") and (content := _content(token)) is not None
        }
        for key in _SPECIAL_LISTS:
            listed = values.get(key) or ()
            if isinstance(listed, dict):  # names that this model alone has, such as "image_token"
                names |= {name: _content(token) for name, token in listed.items()}
            else:
                special.update(map(_content, listed))
    special.update(names.values())

    tokens: dict[int, AddedToken] = {}
    for name, entries in (
        ("tokenizer.json", _listed(data["tokenizer.json"])),
        ("tokenizer_config.json", _decoder(config)),
        ("added_tokens.json", _plain(data["added_tokens.json"])),
    ):
        try:
            _merge(tokens, [_token(entry, special) for entry in entries])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / name}: not readable as added tokens ({error})") from error
    adds_bos = config.get("add_bos_token")
    if not isinstance(adds_bos, bool | None):
        file = folder / "tokenizer_config.json"
        raise ValueError(f"{file}: add_bos_token is {adds_bos!r:.60}, expected a bool")
    return AddedTokens(tokens, names, _prefix(data["tokenizer.json"], config), adds_bos)


def _content(token: Any) -> str | None:
    """The text of a token. In a file a token is the text itself, or an object that has the text.
    Returns None if it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _listed(tokenizer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from tokenizer.get("added_tokens") or ()


def _decoder(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for token_id, entry in (config.get("added_tokens_decoder") or {}).items():
        yield {**entry, "id": int(token_id)}


def _plain(added: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for content, token_id in added.items():
        yield {"content": content, "id": token_id}


def _token(entry: Mapping[str, Any], special: set[str | None]) -> AddedToken:
    token_id, content = entry["id"], entry["content"]
    if not isinstance(token_id, int) or not 0 <= token_id < _ID_LIMIT:
        raise ValueError(f"id is {token_id!r}, expected 0 to {_ID_LIMIT - 1}")
    if not isinstance(content, str) or not content:
        raise ValueError(f"content of id {token_id} is {content!r}, expected some text")
    return AddedToken(
        token_id,
        content,
        control=bool(entry.get("special") or content in special or has_control_shape(content)),
        lstrip=bool(entry.get("lstrip")),
        rstrip=bool(entry.get("rstrip")),
        single_word=bool(entry.get("single_word")),
    )


def _merge(tokens: dict[int, AddedToken], more: Iterable[AddedToken]) -> None:
    """Adds tokens of another file. A token that is there already stays as it is, except that it
    becomes a control token if it is one in the other file."""
    by_content = {token.content: token.id for token in tokens.values()}
    for token in more:
        token_id = by_content.get(token.content, token.id)
        earlier = tokens.get(token_id)
        if earlier is None:
            tokens[token_id] = token
        elif earlier.content == token.content and token.control:
            tokens[token_id] = replace(earlier, control=True)


def _prefix(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    for part in parts(tokenizer.get("normalizer")):
        if part.get("type") == "Prepend":
            return "all"
    for part in parts(tokenizer.get("pre_tokenizer")):
        if part.get("type") == "Metaspace":
            return "unspaced" if part.get("prepend_scheme", "always") == "always" else "first"
    # Otherwise, as without a tokenizer.json, the key "legacy" decides. If it is false, encoding
    # puts no space after an added token. Older files do not have this key, which then counts as
    # true.
    return "first" if config.get("legacy") is False else "all"


def parts(step: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in tokenizer.json. It is a sequence of steps, or a
    single step."""
    if not isinstance(step, dict):
        return []
    inner = step.get("normalizers") or step.get("pretokenizers") or [step]
    return [part for part in inner if isinstance(part, dict)]


class TokenFinder:
    """Cuts texts at the tokens that they spell out. At each place the longest token is taken."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        self._any = _longest_of(list(self._tokens)) if self._tokens else "(?!)"  # matches nothing
        self._pattern = re.compile(self._any)

    def split(self, text: str) -> list[str | int]:
        """The ids of the tokens in a text, and the non-empty pieces of text around them, without
        the white space that belongs to a token."""
        pieces: list[str | int] = []
        start = 0
        for match in self._pattern.finditer(text):
            token = self._tokens[match[0]]
            begin, end = match.span()
            if token.single_word and _inside_word(text, begin, end):
                continue
            before = text[start:begin]
            pieces += [before.rstrip() if token.lstrip else before, token.id]
            start = end
            if token.rstrip and (space := _WHITE_SPACE.match(text, end)):
                start = space.end()
        pieces.append(text[start:])
        return [piece for piece in pieces if piece != ""]

    def starts(self) -> re.Pattern[str]:
        """A pattern that matches each character at which a token begins, even inside another token.
        If all these characters are replaced, the text spells out no token."""
        return re.compile(f"(?=(?:{self._any})).", re.DOTALL)


def _longest_of(words: list[str]) -> str:
    """A pattern that matches the longest of some words. It is a tree of words: trying the hundreds
    of control tokens of v3 one by one would take seconds in a text of a million brackets."""
    start = commonprefix(words)  # noqa: RUF071  these words are not paths
    rest = sorted(word[len(start) :] for word in words)
    branches = [_longest_of(list(some)) for _, some in groupby(filter(None, rest), lambda w: w[0])]
    tree = f"(?:{'|'.join(branches)})" if branches else ""
    return re.escape(start) + tree + ("?" if tree and "" in rest else "")


def _inside_word(text: str, begin: int, end: int) -> bool:
    return any(_is_word_character(text[i]) for i in (begin - 1, end) if 0 <= i < len(text))


def _is_word_character(character: str) -> bool:
    """Whether a character is part of a word for the library `tokenizers`: letters, marks such as
    accents, digits, and joiners. (The `\\w` of Python's `re` has fractions, too, but no marks.)"""
    category = unicodedata.category(character)
    if category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in _JOINERS:
        return True
    return _LETTER_SYMBOL.match(character) is not None
