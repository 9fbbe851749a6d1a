"""Instruct chat: messages to token ids, with the templates of mistral-common.

mistral-common is Mistral's own implementation of its templates; this module picks the template,
hands the messages over, and turns its errors into ValueError. v1 writes [INST] as plain text and
puts the system prompt before the first user turn; v2 and v3 write it as a control token and put the
system prompt before the last user turn (for chat without tools they are the same).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_ext.text.tokenizer import Tokenizer, check_text

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TEMPLATES = ("v1", "v2", "v3")
_OVERRIDE = "; if it was trained with Mistral's chat format, pass template='v1', 'v2' or 'v3'"


def chat_template_of(folder: str | Path, tokenizer: Tokenizer) -> str:
    """The chat template of an Instruct model's folder: "v1", "v2" or "v3".

    A folder is taken for an Instruct model when it holds a Hugging Face chat template written with
    [INST], or, as Mistral's own format holds none, when its name (or hub id) says "instruct".
    Raises ValueError for a base model, and for one trained with another chat format.
    """
    folder = Path(folder)
    template = _read_template(folder)
    if template is None and "instruct" not in _model_name(folder).lower():
        raise ValueError(
            f"{folder}: no chat template, and the name does not say Instruct: this looks like a "
            f"base model, which completes text and cannot chat{_OVERRIDE}"
        )
    if template is not None and "[INST]" not in template:
        raise ValueError(f"{folder}: its chat template does not use [INST]{_OVERRIDE}")
    return tokenizer.version


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], template: str | None = None
) -> list[int]:
    """Token ids of a conversation, ready for the model to reply.

    Args:
        messages: dicts {"role": "system" | "user" | "assistant", "content": str}; the last one is
            the user's. Neighbours of the same role are joined by an empty line.
        template: "v1", "v2" or "v3"; None: the tokenizer's version.

    Raises ValueError that says which message, or which order of roles, is wrong.
    """
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct import messages as protocol
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    _check_messages(messages)
    types = {
        "system": protocol.SystemMessage,
        "user": protocol.UserMessage,
        "assistant": protocol.AssistantMessage,
    }
    request = ChatCompletionRequest(
        messages=[types[message["role"]](content=message["content"]) for message in messages]
    )
    encoder = _instruct_encoder(tokenizer, template or tokenizer.version)
    try:
        return encoder.encode_chat_completion(request).tokens
    except MistralCommonException as error:
        raise ValueError(f"messages: {error}") from error


def extend_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    cached_ids: Sequence[int],
    template: str | None = None,
) -> list[int]:
    """encode_chat() for the next turn of a chat, that extends what the KV cache holds if it can.

    cached_ids are the ids of the turn before: its prompt and the reply as the model produced it,
    with or without </s>. The model may spell a reply in other tokens than the tokenizer would; the
    result then keeps the model's, so that nothing is read again. Where the conversation in
    cached_ids is not the text of `messages` up to the new user message (a reply cut at a stop
    string; a system prompt, which v2 and v3 move to the new turn), the result is encode_chat(), and
    only a common prefix with cached_ids can be reused.
    """
    ids = encode_chat(tokenizer, messages, template)
    eos = tokenizer.eos_id
    history = list(cached_ids)
    if not history or history[-1] != eos:
        history.append(eos)
    # Each reply ends in </s>, and text never encodes to it: the new turn follows the last one.
    new_turn = len(ids) - ids[::-1].index(eos) if eos in ids else 0
    if _transcript(tokenizer, history) != _transcript(tokenizer, ids[:new_turn]):
        return ids
    return history + ids[new_turn:]


def _transcript(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The text of ids with control tokens kept apart by 0xFF, which no UTF-8 text contains."""
    return b"".join(tokenizer.token_bytes(i) or b"\xff%d\xff" % i for i in ids)


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if isinstance(messages, (str, Mapping)) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(
            "messages: expected a list of dicts {'role': ..., 'content': ...}, "
            f"got {type(messages).__name__} {messages!r:.60}"
        )
    for i, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise ValueError(f"messages[{i}]: expected keys role and content, got {list(message)}")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(
                f"messages[{i}]: role {message['role']!r}; expected system, user or assistant"
            )
        check_text(message["content"], f"messages[{i}]['content']")
    if not messages or messages[-1]["role"] != "user":
        last = f"one of role {messages[-1]['role']}" if messages else "no message"
        raise ValueError(f"messages: expected the last to be the user's, got {last}")


@functools.lru_cache(maxsize=4)  # reading the vocabulary again for each turn would be slow
def _instruct_encoder(tokenizer: Tokenizer, template: str) -> MistralTokenizer:
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.validator import MistralRequestValidator
    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}")
    if template != "v1" and "[INST]" not in tokenizer.control_ids:
        raise ValueError(
            f"template {template!r} needs the control token [INST], which "
            f"{tokenizer.path} lacks; expected 'v1'"
        )
    # MistralTokenizer.from_file() would infer the version from the file's name, and a Hugging Face
    # folder's tokenizer.model may be of any version. So it is put together here.
    if tokenizer.path.name == "tokenizer.json":
        text_tokenizer = _TextTokenizer(tokenizer, TokenizerVersion(template))
    else:
        text_tokenizer = SentencePieceTokenizer(str(tokenizer.path), TokenizerVersion(template))
    encoder = getattr(instruct, f"InstructTokenizer{template.upper()}")(text_tokenizer)
    return MistralTokenizer(
        encoder,
        validator=MistralRequestValidator(),
        request_normalizer=InstructRequestNormalizer.normalizer(),
    )


class _TextTokenizer:
    """A Tokenizer in the form in which mistral-common's templates call theirs.

    For folders with tokenizer.json only; mistral-common reads SentencePiece files itself.
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
        # Templates look up tokens for images and tools too, which older vocabularies lack.
        return self._tokenizer.control_ids.get(s, 0)


def _read_template(folder: Path) -> str | None:
    """The text of the folder's Hugging Face chat template; None: it has none."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: expected a JSON object ({error})") from error
        if template:
            # Either the template, or a list of named ones.
            return template if isinstance(template, str) else json.dumps(template)
    return None


def _model_name(folder: Path) -> str:
    """The folder's name; in the hub's cache, models--ORG--NAME of .../snapshots/COMMIT."""
    folder = folder.resolve()
    return folder.parents[1].name if folder.parent.name == "snapshots" else folder.name
