"""Turns the JSON of a request into requests to the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mistral_ext.engine.adapters import UnknownAdapterError
from mistral_ext.engine.params import SamplingParams
from mistral_ext.engine.request import Request
from mistral_ext.llm import Mistral
from mistral_ext.serve import fields, tools
from mistral_ext.serve.errors import ApiError, bad_request, removed_model, unsupported
from mistral_ext.serve.schema import Schema, check
from mistral_ext.serve.structure import Structure, structure_of
from mistral_ext.serve.tools import tool_use_of
from mistral_ext.text.chat_template import ChatTemplate
from mistral_ext.text.guardrails import with_safe_prompt
from mistral_ext.text.tokenizer import expect_token_ids
from mistral_ext.text.tool_calls import ToolFormat, ToolUse

_CHAT = fields.request_schema(fields.CHAT, ("messages",))
_COMPLETION = fields.request_schema(fields.COMPLETION, ("prompt",))

# Fields that have the same name and meaning in `SamplingParams`.
_SAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "ignore_eos",
)

_COMPLETION_TOKENS = 16  # OpenAI's default for completions


@dataclass(frozen=True)
class Job:
    """The work of an HTTP request: `params.n` completions of each prompt.

    Attributes:
        is_chat: whether the prompts are conversations, and the completions replies.
        prompts: conversations, texts or lists of token ids.
        params: the options of the completions. max_tokens is not set yet, because it depends on the
            length of the prompt.
        max_tokens: the request's limit for the tokens of a completion. None: it sets no limit.
        default_tokens: the limit if the request sets none. If fewer tokens fit into the context,
            the completion may have as many as fit. None: it may always have as many as fit.
        stream, include_usage, echo: the fields of the request with these names.
        salt, stop_token_ids: as in `Mistral.request`.
        structure: the name of the request's field with the constraint of the completions, for
            error messages. The constraint itself is in `params`. None: they have no constraint.
        tools: the functions that completions may call. None: they may call no functions.
    """

    is_chat: bool
    prompts: Sequence[Any]
    params: SamplingParams
    max_tokens: int | None
    default_tokens: int | None
    stream: bool
    include_usage: bool
    echo: bool
    salt: str | None
    stop_token_ids: tuple[int, ...]
    structure: str | None
    tools: ToolUse | None

    @property
    def count(self) -> int:
        """The number of completions of all prompts."""
        return len(self.prompts) * self.params.n


def check_fields(body: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """Checks the fields of a request, and returns those that are not null.

    Raises:
        ApiError: 400, for a field that is wrong, unknown or not supported.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in fields.NEUTRAL.items():
        if name in given and name in schema["properties"]:
            try:
                check(given[name], neutral, name)
            except ApiError:
                raise unsupported(name) from None
    check(given, schema, "")
    return given


def chat_job(body: dict[str, Any], default_tokens: int | None, form: ToolFormat | None) -> Job:
    """Makes the job of a request to /v1/chat/completions.

    Args:
        body: the body of the request, not checked yet.
        default_tokens: as in `Job`.
        form: how the model writes tool calls. None: the model takes no tools.

    Raises:
        ApiError: 400, for a field that is wrong.
    """
    given = check_fields(body, _CHAT)
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise bad_request("top_logprobs is given without logprobs: true", "top_logprobs")
    logprobs = int(given.get("top_logprobs", 0)) if given.get("logprobs") else None
    asked = given.get("max_completion_tokens", given.get("max_tokens"))
    use, messages = tool_use_of(given, form), conversation_of(given)
    return _job(given, [messages], logprobs, asked, default_tokens, is_chat=True, use=use)


def completion_job(body: dict[str, Any]) -> Job:
    """Makes the job of a request to /v1/completions. Raises the same errors as `chat_job`."""
    given = check_fields(body, _COMPLETION)
    logprobs = int(given["logprobs"]) if "logprobs" in given else None
    if given.get("echo") and logprobs is not None:
        raise bad_request("echo together with logprobs is not supported", "echo")
    prompts, asked = prompts_of(given["prompt"]), given.get("max_tokens")
    return _job(given, prompts, logprobs, asked, _COMPLETION_TOKENS, is_chat=False)


def _job(
    given: dict[str, Any],
    prompts: Sequence[Any],
    logprobs: int | None,
    max_tokens: float | None,
    default_tokens: int | None,
    is_chat: bool,
    use: ToolUse | None = None,
) -> Job:
    options = given.get("stream_options")
    if options is not None and not given.get("stream"):
        raise bad_request("stream_options is given without stream: true", "stream_options")
    stop_token_ids = tuple(map(int, given.get("stop_token_ids", ())))
    if stop_token_ids and given.get("ignore_eos"):
        text = "stop_token_ids is given with ignore_eos, expected one of them"
        raise bad_request(text, "stop_token_ids")
    structure = structure_of(given)
    return Job(
        is_chat=is_chat,
        prompts=prompts,
        params=_params(given, logprobs, structure),
        max_tokens=None if max_tokens is None else int(max_tokens),
        default_tokens=default_tokens,
        stream=given.get("stream", False),
        include_usage=bool((options or {}).get("include_usage")),
        echo=given.get("echo", False),
        salt=given.get("cache_salt"),
        stop_token_ids=stop_token_ids,
        structure=structure.field if structure else None,
        tools=use,
    )


def _params(
    given: Mapping[str, Any], logprobs: int | None, structure: Structure | None
) -> SamplingParams:
    options = {name: given[name] for name in _SAME if name in given}
    options["temperature"] = given.get("temperature", 1.0)
    options["top_k"] = max(0, int(given.get("top_k", 0)))  # -1 means all tokens, as in vLLM
    options["n"] = int(given.get("n", 1))
    options["logprobs"] = logprobs
    if "seed" in given:
        options["seed"] = int(given["seed"]) % 2**64
    if "logit_bias" in given:
        options["logit_bias"] = {_token_id(k): b for k, b in given["logit_bias"].items()}
    if structure is None:
        return SamplingParams(**options)
    options[structure.option] = structure.value
    try:
        return SamplingParams(**options)
    except (TypeError, ValueError) as error:
        # The constraint is wrong, because the request's schema has checked all other options.
        raise bad_request(str(error), structure.field) from error


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise bad_request(f"logit_bias has key {key!r:.40}, expected a token id", "logit_bias")
    return int(key)


def conversation_of(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages of a request for `Mistral.chat`. If the request has `safe_prompt`, they begin
    with the system prompt of `mistral_ext.text.guardrails`."""
    messages = _messages_of(given["messages"])
    return with_safe_prompt(messages) if given.get("safe_prompt") else messages


def _messages_of(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Converts OpenAI's messages to messages for `Mistral.chat`."""
    roles = {"developer": "system"}
    plain: list[Mapping[str, Any]] = [
        {
            "role": roles.get(m["role"], m["role"]),
            "content": _text(m.get("content")),
            **{key: m[key] for key in tools.OF_MESSAGE if m.get(key)},
        }
        for m in messages
    ]
    # Drops replies that were ended before their first word, because a template cannot write an
    # empty reply.
    return [m for m in plain if m["content"] or m["role"] != "assistant" or "tool_calls" in m]


def _text(content: str | Sequence[Mapping[str, str]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def context_length(llm: Mistral) -> int:
    """The most tokens that the prompt and completion of a request may have together.

    A model with a sliding window has no limit of its own. The server limits it to the positions
    that it was trained for. Without a window, the tokens must also fit into the cache.
    """
    positions: int = llm.config.max_positions
    return positions if llm.max_length is None else min(positions, llm.engine.pool.slots)


def encode(
    llm: Mistral,
    prompt: Any,
    template: ChatTemplate | None,
    is_chat: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Encodes a prompt of a job to token ids.

    Args:
        prompt: a conversation, a text or token ids.
        template: the chat template of conversations. None: the model's own template.
        is_chat: whether the prompt is a conversation.
        tools: functions that a reply may call. None: a reply may call no functions.

    Raises:
        ApiError: 400 for text that is not Unicode, ids that the model does not have, or messages
            that are not a conversation.
    """
    param = "messages" if is_chat else "prompt"
    try:
        if is_chat:
            return llm.encode_chat(prompt, tools, template)
        if isinstance(prompt, str):
            return llm.require_tokenizer().encode(prompt)
        ids = [int(i) for i in prompt]
        expect_token_ids(ids, llm.config.vocab_size, param)
    except ValueError as error:
        raise bad_request(str(error), param) from error
    return ids


def moderation_requests(
    llm: Mistral,
    template: ChatTemplate | None,
    contents: Sequence[Any],
    param: str,
    salt: str | None,
    cuts: bool = False,
    adapter: str | None = None,
) -> list[Request]:
    """Makes requests with which the model judges contents (see `Mistral.moderation_request`).

    Args:
        template: the chat template of conversations. None: the model's own template.
        contents: texts, or conversations, of which the last message is judged.
        param: the field of the request from which the contents come.
        salt: as in `Request`.
        cuts: if True, only the end of a content that is too long is judged. If False, such a
            content is refused.
        adapter: as in `Mistral.moderation_request`.

    Raises:
        ApiError: 400 for a content that is too long, or if the model has no chat template; 404 if
            the adapter was removed.
    """
    room = context_length(llm) - 1 if cuts else None
    with _refusing(param):
        requests = [
            llm.moderation_request(content, template, salt, room, adapter) for content in contents
        ]
    for request in requests:
        _check_length(len(request.prompt_ids), 1, context_length(llm), param)
    return requests


def embedding_requests(llm: Mistral, texts: Sequence[Any], *options: Any) -> list[Request]:
    """Makes requests for the hidden states of texts. `options` are the other arguments of
    `Mistral.embedding_requests`.

    Raises:
        ApiError: 400 for a text that is too long, or ids that the model does not have; 404 if the
            adapter was removed.
    """
    # JSON Schema takes the number 1.0 for an integer, too, so an id may be a float.
    given = [text if isinstance(text, str) else [int(i) for i in text] for text in texts]
    with _refusing("input", "texts"):
        requests = llm.embedding_requests(given, *options)
    for request in requests:
        _check_length(len(request.prompt_ids), None, context_length(llm), "input")
    return requests


def prompts_of(prompt: Any) -> Sequence[Any]:
    """The list of prompts in a field that has one prompt or several. A prompt is a text or a list
    of token ids."""
    is_one = isinstance(prompt, str) or not isinstance(prompt[0], (str, list))
    return [prompt] if is_one else prompt


def compile_grammar(llm: Mistral, job: Job) -> None:
    """Compiles the constraint of a job's completions. This may take long, so a thread does it. Then
    `requests_of`, which runs in the event loop, finds the constraint compiled.

    Raises:
        ApiError: 400 if the constraint cannot be compiled.
    """
    try:
        llm.grammar(job.params, starts_text=job.is_chat, tools=job.tools)
    except (ValueError, ImportError) as error:
        raise bad_request(str(error), "tools" if job.tools else job.structure) from error


def requests_of(
    job: Job, prompts: Sequence[list[int]], llm: Mistral, adapter: str | None
) -> list[Request]:
    """Makes a job's requests to the engine, n for each prompt.

    Args:
        prompts: the token ids of the prompts.
        adapter: as in `Mistral.request`.

    Raises:
        ApiError: 400 for a prompt that is too long; 404 if the adapter was removed.
    """
    context, param = context_length(llm), "messages" if job.is_chat else "prompt"
    requests = []
    for ids in prompts:
        _check_length(len(ids), job.max_tokens, context, param)
        room = context - len(ids)
        max_tokens = job.max_tokens or min(job.default_tokens or room, room)
        params = dataclasses.replace(job.params, max_tokens=max_tokens)
        for index in range(params.n):
            with _refusing(param):
                request = llm.request(
                    ids,
                    params,
                    index,
                    starts_text=job.is_chat,
                    salt=job.salt,
                    stop_token_ids=job.stop_token_ids,
                    tools=job.tools,
                    adapter=adapter,
                )
            requests.append(request)
    return requests


@contextmanager
def _refusing(param: str, name: str | None = None) -> Iterator[None]:
    """Turns errors of the library in the block into ApiError: 404 if the adapter was removed after
    the request came, else 400.

    Args:
        param: the field of the request that the error names.
        name: the name of that field in the library's messages, which `param` replaces. None: the
            messages do not name the field.
    """
    try:
        yield
    except UnknownAdapterError as error:
        raise removed_model(error) from error
    except ValueError as error:
        text = str(error)
        raise bad_request(text.replace(name, param, 1) if name else text, param) from error


def _check_length(prompt: int, max_tokens: int | None, context: int, param: str) -> None:
    needed = prompt + (max_tokens or 1)
    if needed <= context:
        return
    text = f"the model's context has {context} tokens, but the prompt has {prompt}"
    if max_tokens is not None:
        text += f" and max_tokens is {max_tokens}, {needed} together"
    raise bad_request(text, param, "context_length_exceeded")
