"""Encodes the last reply of a conversation as a model should write it, and the prompt before it,
for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mistral_ext.text.chat_template import ChatTemplate, encode_chat, transcript
from mistral_ext.text.tokenizer import Tokenizer


def encode_reply(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    template: ChatTemplate | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[int], list[int]]:
    """Returns the token ids of the prompt for a conversation's last message, and of this message.

    `encode_chat` makes the same prompt. So a model that learns to continue this prompt gets the
    same prompt when it is used.

    Args:
        messages: the messages, as in `encode_chat`, except that the last message is the
            assistant's.
        template, tools: as in `encode_chat`.

    Returns:
        The ids of the prompt, and the ids of the reply with the text that the template writes after
        it.

    Raises:
        TypeError, ValueError: the messages are not a conversation, or the template writes the
            earlier messages differently if the reply follows.
    """
    prompt = encode_chat(tokenizer, messages[:-1], template, tools)
    whole = encode_chat(tokenizer, messages, template, tools, asks=False)
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    before, text = transcript(tokenizer, prompt), transcript(tokenizer, whole)
    if not text.startswith(before):
        raise ValueError(
            f"the chat template {template or tokenizer.version} does not write a conversation with "
            "a reply as it writes the prompt for it, expected the prompt at its beginning"
        )
    return prompt, _encode_after(tokenizer, whole, len(before))


def _encode_after(tokenizer: Tokenizer, ids: Sequence[int], length: int) -> list[int]:
    """The ids of the text after the first `length` bytes of the transcript of `ids`.

    These bytes, the prompt, may end inside a token. A model cannot write the rest of such a token
    after a prompt, so the text after the prompt is encoded separately.
    """
    first, end, last = 0, 0, b""
    while end < length:
        last = transcript(tokenizer, ids[first : first + 1])
        end += len(last)
        first += 1
    # A first piece that is removed below: the reply must not be encoded as the beginning of a text.
    pieces: list[str | int] = [tokenizer.bos_id]
    text = last[len(last) - (end - length) :]
    for token_id in ids[first:]:
        if data := tokenizer.token_bytes(token_id):
            text += data
        else:
            pieces += [text.decode("utf-8"), token_id]
            text = b""
    pieces.append(text.decode("utf-8"))
    return tokenizer.encode_pieces([piece for piece in pieces if piece != ""])[1:]
