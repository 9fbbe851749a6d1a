"""Turns the messages of a chat into token ids, with the template that a model was trained with.

Mistral's own Instruct models have the templates v1, v2 and v3 (`mistral_template`). A fine-tune
brings its own template (`jinja_template`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_ext.files import read_json_object, read_text_file
from mistral_ext.text.jinja_template import JinjaTemplate
from mistral_ext.text.mistral_template import encode_with_mistral_common
from mistral_ext.text.tokenizer import Tokenizer, check_text
from mistral_ext.text.tool_calls import ToolFormat
from mistral_ext.text.tool_messages import Message, Tools, with_parsed_arguments

# llama.cpp's converter writes such a name, instead of a template, for weights in Mistral's format.
_LLAMA_CPP_NAMES = {"mistral-v1": "v1", "mistral-v3": "v3"}
_OVERRIDE = "; if it was trained with Mistral's chat format, pass template='v1', 'v2' or 'v3'"

_TOOL_CALLS = "[TOOL_CALLS]"  # Mistral's control token before calls
_TOOL_KEYS = ("tool_calls", "tool_call_id", "name")  # keys of messages, for tools only

ChatTemplate = str | JinjaTemplate


def chat_template_of(
    folder: str | Path, tokenizer: Tokenizer, is_instruct: bool = False
) -> ChatTemplate:
    """Returns the chat template of a model's folder: "v1", "v2" or "v3" of mistral-common, or the
    folder's own template.

    If the folder's template writes conversations as mistral-common does, apart from white space,
    that of mistral-common is returned. Mistral's published templates differ from mistral-common in
    white space, and mistral-common is right. Some GGUF files have, instead
    of a template, llama.cpp's name for one of Mistral's. Then mistral-common's is returned, too.

    Args:
        folder: the folder of the model.
        tokenizer: the tokenizer of the model.
        is_instruct: whether the model is a Mistral Instruct model. This counts only if the folder
            has no template.

    Raises:
        ValueError: the model seems to be a base model, or a file or template is damaged. The
            message names the file.
    """
    folder = Path(folder)
    found = _read_templates(folder)
    if tokenizer.chat_templates:
        found = tokenizer.path, tokenizer.chat_templates
    if found is None:
        if is_instruct:
            return tokenizer.version
        raise ValueError(
            f"{folder}: no chat template, and the name does not say Instruct: this looks like a "
            f"base model, which completes text and cannot chat{_OVERRIDE}"
        )
    path, sources = found
    source = sources.get("default")
    if source in _LLAMA_CPP_NAMES:
        return _LLAMA_CPP_NAMES[source]
    template = JinjaTemplate(path, sources, tokenizer)
    if "{" not in template.source():
        raise ValueError(
            f"{path}: the chat template is {template.source()!r:.60}, expected Jinja, which writes "
            f"messages{_OVERRIDE}"
        )
    return tokenizer.version if _is_mistrals(template, tokenizer) else template


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: ChatTemplate | None = None,
    tools: Tools | None = None,
    asks: bool = True,
) -> list[int]:
    """Encodes a conversation to token ids, ready for the model to reply.

    Args:
        messages: dicts {"role": "system" | "user" | "assistant" | "tool", "content": str} in
            OpenAI's format. An assistant's message may have "tool_calls", and a tool's message has
            "tool_call_id". The last message is the user's or a tool's. Mistral's templates join
            neighbours of the same role by an empty line. A model's own template may refuse such
            neighbours, or take more keys of messages.
        template: the chat template: "v1", "v2" or "v3", or the model's own. None: the template of
            the tokenizer's version.
        tools: functions that the model may call, in OpenAI's format.
        asks: whether the ids end where the model should reply. If False, the last message must be
            the assistant's, and the ids end with this message.

    Raises TypeError or ValueError that says which message, or which order of roles, is wrong.
    """
    template = template or tokenizer.version
    _check_messages(messages, template, asks)
    _check_tools(tools)
    try:
        if isinstance(template, JinjaTemplate):
            return template.encode(with_parsed_arguments(messages), tools, asks)
        return encode_with_mistral_common(tokenizer, messages, template, tools, asks)
    except RecursionError:
        raise ValueError("messages or tools are nested too deep") from None


def tool_format(tokenizer: Tokenizer, template: ChatTemplate) -> ToolFormat | None:
    """How a model with this chat template writes tool calls. Returns None if the template takes no
    tools, or if the format of its calls is unknown."""
    control_ids = tokenizer.control_ids
    if isinstance(template, JinjaTemplate):
        source = template.source([{}])
        takes_tools, writes_mistral = "tools" in source, _TOOL_CALLS in source
    else:
        source = ""
        takes_tools = writes_mistral = template != "v1"
    if not takes_tools:
        return None
    if writes_mistral and _TOOL_CALLS in control_ids:
        return ToolFormat(control_ids[_TOOL_CALLS])
    if "<tool_call>" in source:
        begin, end = "<tool_call>", "</tool_call>"
        return ToolFormat(control_ids.get(begin, begin), control_ids.get(end, end))
    return None


def extend_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    cached_ids: Sequence[int],
    template: ChatTemplate | None = None,
    tools: Tools | None = None,
) -> list[int]:
    """Does what encode_chat() does, for the next turn of a chat. If possible, the result extends
    the ids in the KV cache.

    cached_ids are the ids of the last turn: its prompt, and the reply as the model wrote it, with
    or without the end of the turn. The model may spell a reply in other tokens than the tokenizer
    would. The result then keeps the model's tokens, so that the reply is not read again.

    If the text of cached_ids is not the beginning of the conversation's text, the result is that of
    encode_chat(), and only the prefix that it shares with cached_ids can be reused. This happens
    with a reply that was cut at a stop string, with a system prompt (v2 and v3 move it to the new
    turn), and with a template that trims replies.
    """
    ids = encode_chat(tokenizer, messages, template, tools)
    # The token with which the model ended the turn may differ from the token that the template
    # writes. So the cached ids are also tried without their last token.
    for cached in (list(cached_ids), list(cached_ids)[:-1]):
        known = _length_of(tokenizer, ids, transcript(tokenizer, cached))
        if known is not None:
            return cached + ids[known:]
    return ids


def _length_of(tokenizer: Tokenizer, ids: Sequence[int], text: bytes) -> int | None:
    """The number of ids at the beginning of `ids` whose transcript is `text`. Returns None if
    `text` ends within a token, or if the transcript of `ids` does not begin with `text`."""
    if not transcript(tokenizer, ids).startswith(text):
        return None
    length = 0
    for count, token_id in enumerate(ids):
        if length >= len(text):
            return count if length == len(text) else None
        length += len(transcript(tokenizer, [token_id]))
    return len(ids) if length == len(text) else None


def transcript(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The text of ids as bytes, in which control tokens can be compared, too. A control token
    becomes its id between two bytes 0xFF, which do not occur in UTF-8."""
    return b"".join(tokenizer.token_bytes(i) or b"\xff%d\xff" % i for i in ids)


def _check_messages(messages: Sequence[Message], template: ChatTemplate, asks: bool) -> None:
    """Raises TypeError or ValueError unless messages are a conversation in a form that templates
    take."""
    if isinstance(messages, (str, Mapping)) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(
            f"messages is {messages!r:.60}, expected a list of dicts "
            "{'role': ..., 'content': ...}"
        )
    takes_tools = template != "v1"
    is_open = isinstance(template, JinjaTemplate)
    roles = ["system", "user", "assistant", *(["tool"] if takes_tools else [])]
    known = {"role", "content", *(_TOOL_KEYS if takes_tools else ())}
    for i, message in enumerate(messages):
        calls_tools = takes_tools and message.get("tool_calls")
        needed = {"role"} if calls_tools else {"role", "content"}
        if not needed <= message.keys() or not (is_open or message.keys() <= known):
            raise ValueError(f"messages[{i}] has keys {list(message)}, expected role and content")
        if message["role"] not in roles:
            raise ValueError(
                f"messages[{i}] has role {message['role']!r}, expected {', '.join(roles[:-1])} or "
                f"{roles[-1]}"
            )
        if not (calls_tools and message.get("content") is None):
            check_text(message["content"], f"messages[{i}]['content']")
    if not messages or messages[-1]["role"] not in (("user", "tool") if asks else ("assistant",)):
        last = f"ends with role {messages[-1]['role']!r}" if messages else "is empty"
        expected = "user's" if asks else "assistant's"
        raise ValueError(f"messages {last}, expected the {expected} message at the end")


def _check_tools(tools: Any) -> None:
    if tools is not None and (
        isinstance(tools, (str, Mapping))
        or not isinstance(tools, Sequence)
        or not all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise TypeError(f"tools is {tools!r:.60}, expected a list of dicts")


# Recognising Mistral's templates

_PROBE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "five"},
]
_SYSTEM_PROBE = [{"role": "system", "content": "zero"}, *_PROBE]


def _is_mistrals(template: JinjaTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a template writes the same text as mistral-common, apart from white space."""
    if "[INST]" not in template.source():
        return False
    for probe in (_PROBE, _SYSTEM_PROBE):
        try:
            ids = template.encode(probe)
        except ValueError:
            # Mistral's first published template refuses system prompts. If the other probe gives
            # the same text, the template counts as Mistral's.
            if probe is _SYSTEM_PROBE:
                continue
            return False
        expected = encode_with_mistral_common(tokenizer, probe, tokenizer.version, None)
        texts = (transcript(tokenizer, i) for i in (ids, expected))
        if len({b"".join(text.split()) for text in texts}) > 1:
            return False
    return True


def _read_templates(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """The file with a folder's chat templates, and the texts of the templates by name. Returns None
    if the folder has no template."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return jinja, {path.stem: read_text_file(path) for path in more} | {
            "default": read_text_file(jinja)
        }
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        templates = read_json_object(path).get("chat_template") if path.is_file() else None
        if not templates:
            continue
        if isinstance(templates, str):
            return path, {"default": templates}
        try:
            if not isinstance(templates, dict):
                templates = {entry["name"]: entry["template"] for entry in templates}
        except (TypeError, KeyError):
            templates = {}
        if not templates or not all(isinstance(text, str) for text in templates.values()):
            raise ValueError(
                f"{path}: chat_template has another form, expected a text, or a list of objects "
                "with a name and a template"
            )
        return path, templates
    return None
