"""Describes the fields of requests in JSON Schema. Requests are checked against these schemas, and
/openapi.json shows them.

A field that is null counts as missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral_ext.serve import structure, tools
from mistral_ext.serve.schema import Schema, or_null

# The most alternatives of a token whose log-probabilities a request may ask for (OpenAI's limit).
MOST_LOGPROBS = 20

_FLAG = {"type": "boolean"}
_TEXT = {"type": "string"}
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": 256}
_TOKEN_ID = {"type": "integer", "minimum": 0}
_TOKEN_IDS = {"type": "array", "items": _TOKEN_ID, "minItems": 1}
_PENALTY = {"type": "number", "minimum": -2, "maximum": 2}
_MODEL = {"type": "string", "description": "a model that /v1/models names; it may be left out"}
_MAX_TOKENS = {"type": "integer", "minimum": 1, "maximum": 2**31}
_SALT = {
    "type": "string",
    "minLength": 1,
    "maxLength": 1024,
    "description": "only requests of the same salt share what is cached of their prompts",
}

_SAMPLING: dict[str, Schema] = {
    "model": _MODEL,
    "max_tokens": _MAX_TOKENS,
    "temperature": {"type": "number", "minimum": 0, "maximum": 100, "default": 1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31, "default": 0},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
    "repetition_penalty": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 100,
        "default": 1,
    },
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
    "stop": {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": 16}]},
    "stop_token_ids": {"type": "array", "items": _TOKEN_ID, "maxItems": 64},
    "logit_bias": {
        "type": "object",
        "description": "token id -> what is added to its logit",
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
    },
    "n": {"type": "integer", "minimum": 1, "maximum": 128, "default": 1},
    "ignore_eos": _FLAG,
    "stream": _FLAG,
    "stream_options": {
        "type": "object",
        "properties": {
            "include_usage": or_null(_FLAG),
            "include_obfuscation": or_null(_FLAG),
        },
        "additionalProperties": False,
    },
    "cache_salt": _SALT,
    **structure.FIELDS,
}

_PART = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": ["text"]}, "text": _TEXT},
    "required": ["type", "text"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "null"}, _TEXT, {"type": "array", "items": _PART}]},
        "function_call": {"type": "null"},
        **tools.OF_MESSAGE,
    },
    "required": ["role"],
}
MESSAGES: Schema = {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 4096}

# The most inputs of a request (OpenAI's limit).
_MOST_INPUTS = 2048


def _one_or_several(**limits: int) -> Schema:
    """The schema of one input (a text or a list of token ids) or of a list of inputs, all of one
    kind. `limits`, such as maxItems, apply to the list of inputs."""
    text: Schema = {"type": "string", "minLength": 1}
    several = [
        {"type": "array", "items": item, "minItems": 1, **limits} for item in (text, _TOKEN_IDS)
    ]
    return {"anyOf": [text, _TOKEN_IDS, *several]}


_SAFE_PROMPT = {
    **_FLAG,
    "description": "begin with the system prompt of guardrails of Mistral 7B's paper",
}

CHAT: dict[str, Schema] = {
    "messages": MESSAGES,
    **_SAMPLING,
    **tools.FIELDS,
    "safe_prompt": _SAFE_PROMPT,
    "max_completion_tokens": _MAX_TOKENS,
    "logprobs": _FLAG,
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MOST_LOGPROBS},
}

COMPLETION: dict[str, Schema] = {
    "prompt": _one_or_several(),
    **_SAMPLING,
    "logprobs": {"type": "integer", "minimum": 0, "maximum": MOST_LOGPROBS},
    "echo": _FLAG,
}

TOKENIZE: dict[str, Schema] = {
    "model": _MODEL,
    "prompt": {"type": "string"},
    "add_special_tokens": _FLAG,
    "messages": MESSAGES,
    "safe_prompt": _SAFE_PROMPT,
    "tools": tools.TOOLS,
}

MODERATION: dict[str, Schema] = {
    "model": _MODEL,
    "input": {
        "anyOf": [
            _TEXT,
            {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": _MOST_INPUTS},
        ]
    },
    "cache_salt": _SALT,
}

EMBEDDING: dict[str, Schema] = {
    "model": _MODEL,
    "input": _one_or_several(maxItems=_MOST_INPUTS),
    "encoding_format": {"type": "string", "enum": ["float", "base64"], "default": "float"},
    "dimensions": {
        "type": "integer",
        "minimum": 1,
        "description": "how many numbers a vector keeps: the first ones, scaled to length 1",
    },
    "instruction": {"type": "string", "description": "what queries are for; documents have none"},
    "pooling": {"type": "string", "enum": ["last", "mean"], "default": "last"},
    "cache_salt": _SALT,
}

DETOKENIZE: dict[str, Schema] = {
    "model": _MODEL,
    "tokens": {"type": "array", "items": _TOKEN_ID},
}

_ADAPTER_NAME = {"type": "string", "minLength": 1, "maxLength": 256}

LOAD_ADAPTER: dict[str, Schema] = {
    "lora_name": _ADAPTER_NAME,
    "lora_path": {"type": "string", "minLength": 1, "maxLength": 4096},
}

UNLOAD_ADAPTER: dict[str, Schema] = {"lora_name": _ADAPTER_NAME}

# Fields that OpenAI's clients send, and that do not change the text of completions.
IGNORED = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "reasoning_effort",
    "verbosity",
)

# Fields that can change the text of completions, but are not supported. These schemas describe the
# values that change nothing. Requests with other values are refused.
NEUTRAL: dict[str, Schema] = {
    "functions": {"type": "array", "maxItems": 0},
    "function_call": {"type": "string", "enum": ["none", "auto"]},
    "modalities": {"type": "array", "items": {"type": "string", "enum": ["text"]}},
    "audio": {"type": "null"},
    "web_search_options": {"type": "null"},
    "suffix": {"type": "string", "maxLength": 0},
    "best_of": {"type": "integer", "enum": [1]},
    "min_tokens": {"type": "integer", "enum": [0]},
    "use_beam_search": {"type": "boolean", "enum": [False]},
    "skip_special_tokens": {"type": "boolean", "enum": [True]},
    "include_stop_str_in_output": {"type": "boolean", "enum": [False]},
    "add_generation_prompt": {"type": "boolean", "enum": [True]},
    "continue_final_message": {"type": "boolean", "enum": [False]},
}


def request_schema(fields: Mapping[str, Schema], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """The schema of a request with these fields. The fields of `IGNORED` and `NEUTRAL` are
    added."""
    properties: dict[str, Any] = {
        name: schema if name in required else or_null(schema)
        for name, schema in {**NEUTRAL, **fields}.items()
    }
    properties |= {name: {"description": "accepted, without effect"} for name in IGNORED}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
