"""Encodes the replies of a conversation as a model has to write them, for training."""

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
    """Token ids of the prompt that asks for a conversation's last message, and of that message.

    `encode_chat` makes the same prompt, so a model that learns to continue it is asked in the same
    way later.

    Args:
        messages: the messages, as `encode_chat` takes them, but the last one is the assistant's.
        template, tools: the arguments of `encode_chat` with these names.

    Returns:
        The ids of the prompt, and the ids of the reply with the text that the template writes after
        it.

    Raises:
        ValueError: the messages are no conversation, or the template writes the conversation in
            another way once it has the reply.
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
    """The ids of what follows the first `length` bytes of a transcript, which end in a token.

    The model writes a reply as a text of its own, and cannot complete a token of the prompt.
    """
    first, end, last = 0, 0, b""
    while end < length:
        last = transcript(tokenizer, ids[first : first + 1])
        end += len(last)
        first += 1
    pieces: list[str | int] = [tokenizer.bos_id]  # the reply does not begin a text
    text = last[len(last) - (end - length) :]
    for token_id in ids[first:]:
        if data := tokenizer.token_bytes(token_id):
            text += data
        else:
            pieces += [text.decode("utf-8"), token_id]
            text = b""
    pieces.append(text.decode("utf-8"))
    return tokenizer.encode_pieces([piece for piece in pieces if piece != ""])[1:]
