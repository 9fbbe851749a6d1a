"""Encodes conversations with the templates of mistral-common, Mistral's implementation.

v1 writes [INST] as plain text and puts the system prompt before the first user turn. v2 and v3
write [INST] as a control token and put the system prompt before the last user turn. (Without tools
v2 and v3 are the same.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.text.tool_messages import Message, Tools, mistral_messages

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.messages import (
        AssistantMessage,
        SystemMessage,
        ToolMessage,
        UserMessage,
    )
    from mistral_common.tokens.tokenizers.base import Tokenized
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TEMPLATES = ("v1", "v2", "v3")


def encode_with_mistral_common(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str,
    tools: Tools | None,
    asks: bool = True,
) -> list[int]:
    """Encodes a conversation. `template` is one of `TEMPLATES`. The other arguments are those of
    `chat_template.encode_chat`.

    Raises:
        ValueError: the tokenizer lacks a token of the template, a tool is not in OpenAI's format,
            or the template takes no tools, or refuses the messages.
    """
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Tool

    encoder = _instruct_encoder(tokenizer, template, asks)
    if tools and template == "v1":
        raise ValueError(f"tools has {len(tools)} tools, expected none: the chat template is v1")
    converted = mistral_messages(messages)
    try:
        request = ChatCompletionRequest(
            messages=converted,
            tools=[Tool.from_openai(dict(tool)) for tool in tools] if tools else None,
        )
    except (ValueError, KeyError) as error:  # errors of pydantic
        raise ValueError(f"tools: not in OpenAI's format: {error}") from error
    try:
        return encoder.encode_chat_completion(request).tokens
    except MistralCommonException as error:
        raise ValueError(f"messages: {error}") from error


@functools.lru_cache(maxsize=4)
def _instruct_encoder(
    tokenizer: Tokenizer, template: str, asks: bool
) -> MistralTokenizer[UserMessage, AssistantMessage, ToolMessage, SystemMessage, Tokenized]:
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.validator import MistralRequestValidator, ValidationMode
    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}, expected one of {', '.join(TEMPLATES)}")
    if template != "v1" and "[INST]" not in tokenizer.control_ids:
        raise ValueError(
            f"template is {template!r}, expected 'v1': {tokenizer.path} lacks the control token "
            "[INST]"
        )
    # MistralTokenizer.from_file() would infer the version from the file's name. But a Hugging Face
    # folder's tokenizer.model may have any version, so the tokenizer is put together here.
    text_tokenizer = _TextTokenizer(tokenizer, TokenizerVersion(template))
    encoder = getattr(instruct, f"InstructTokenizer{template.upper()}")(text_tokenizer)
    return MistralTokenizer(
        encoder,
        validator=MistralRequestValidator(ValidationMode("test" if asks else "finetuning")),
        request_normalizer=InstructRequestNormalizer.normalizer(),
    )


class _TextTokenizer:
    """A Tokenizer with the interface that mistral-common's templates use.

    mistral-common itself reads SentencePiece files, but neither tokenizer.json nor added tokens.
    """

    model_settings_builder = None

    def __init__(self, tokenizer: Tokenizer, version: object) -> None:
        self.version = version
        self.bos_id = tokenizer.bos_id
        self.eos_id = tokenizer.eos_id
        self._tokenizer = tokenizer

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return self._tokenizer.encode(s, bos=bos) + [self.eos_id] * eos

    def decode(self, tokens: Sequence[int], special_token_policy: object = None) -> str:
        return self._tokenizer.decode(tokens)

    def get_special_token(self, s: str) -> int:
        # Templates also look up tokens for images and tools. Older vocabularies lack these tokens,
        # and then the id is not used.
        return self._tokenizer.control_ids.get(s, 0)
