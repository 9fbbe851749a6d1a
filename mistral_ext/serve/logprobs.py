"""Writes log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from mistral_ext.engine.params import TokenLogprob
from mistral_ext.text.tokenizer import UTF8_ERRORS, Tokenizer


class LogprobWriter:
    """Writes the log-probabilities of one completion, token after token.

    Args:
        tokenizer: the model's tokenizer.
        starts_text: whether the completion begins a text. Some tokenizers put a space before each
            text. This space is then left out.
        offset: the number of characters of the text before the completion.
    """

    def __init__(self, tokenizer: Tokenizer, starts_text: bool, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._names = {i: name for name, i in tokenizer.control_ids.items()}
        self._strips = starts_text and tokenizer.adds_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(UTF8_ERRORS)
        self._offset = offset

    def chat(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Writes the log-probabilities of tokens in the form of /v1/chat/completions."""
        content = []
        for token in tokens:
            entry = self._entry(token.token_id, token.logprob)
            entry["top_logprobs"] = [self._entry(i, logprob) for i, logprob in token.top.items()]
            self._go_on(token.token_id)
            content.append(entry)
        return {"content": content, "refusal": None}

    def text(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Writes the log-probabilities of tokens in the form of /v1/completions."""
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            lists["tokens"].append(self._shown(token.token_id))
            lists["token_logprobs"].append(_finite(token.logprob))
            top: dict[str, float] = {}
            for i, logprob in token.top.items():
                # Several tokens may have the same text. The most likely one, which is first, stays.
                top.setdefault(self._shown(i), _finite(logprob))
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(self._offset)
            self._go_on(token.token_id)
        return lists

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._shown(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._bytes(token_id)),
        }

    def _bytes(self, token_id: int) -> bytes:
        if token_id >= self._tokenizer.vocab_size:  # the model may have more ids than that
            return b""
        data = self._tokenizer.token_bytes(token_id)
        return data.removeprefix(b" ") if self._strips else data

    def _shown(self, token_id: int) -> str:
        data = self._bytes(token_id)
        try:
            return data.decode() if data else self._names.get(token_id, "")
        except UnicodeDecodeError:  # the token is a part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _go_on(self, token_id: int) -> None:
        data = self._bytes(token_id)
        self._offset += len(self._decoder.decode(data))
        if self._tokenizer.token_bytes(token_id):
            self._strips = False


def _finite(logprob: float) -> float:
    """Limits a log-probability to a number that JSON can hold. JSON has no infinity, so an
    impossible token gets -9999.0, as with OpenAI."""
    return max(logprob, -9999.0)
