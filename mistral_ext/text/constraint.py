"""Checks constraints of completions: a JSON schema, a regular expression or a Lark grammar.

`grammar` compiles a constraint, and imports numpy. This module is apart from it, so that the
command line can check options without waiting for large imports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mistral_ext.text.schema_copies import closed, in_known_keywords, inclusive, without_notes

MOST_BYTES = 2**16  # the most bytes of a schema, regular expression or grammar
MOST_LEVELS = 64  # the most levels of brackets in such a text, because its parsers recurse

# The white space that JSON may have between its tokens. Without the limit of 8 a model may write
# white space up to max_tokens.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,8}"


@dataclass(frozen=True)
class Constraint:
    """A rule that a completion must match.

    Args:
        kind: "schema", "regex", "grammar" or "tools" (text or calls of tools; see `ToolUse`).
        text: the rule: JSON for a schema, a regular expression in the syntax of Rust's regex crate,
            or Lark for a grammar or tools.
        content: for "tools", the constraint of a completion's text. In `text` its name is @content.
            None: `text` does not use this name.

    Raises:
        ValueError: the text is too long, has brackets nested too deep, or is not valid Unicode.
    """

    kind: str
    text: str
    content: Constraint | None = None

    def __post_init__(self) -> None:
        try:
            size, levels = len(self.text.encode()), _levels(self.text)
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.kind} is not valid Unicode: {error}") from None
        if size > MOST_BYTES:
            raise ValueError(f"{self.kind} has {size} bytes, expected at most {MOST_BYTES}")
        if levels > MOST_LEVELS:
            raise ValueError(f"{self.kind} has {levels} levels, expected at most {MOST_LEVELS}")


def schema_text(schema: object) -> str:
    """A JSON schema as JSON text.

    Args:
        schema: a dict, JSON text, or a pydantic model. If a pydantic model does not say whether its
            objects may have other properties, they may not: pydantic would ignore such properties,
            and a completion could continue with them for ever.

    Raises:
        TypeError, ValueError: `schema` is something else.
    """
    if hasattr(schema, "model_json_schema"):
        schema = closed(schema.model_json_schema())
    try:
        if isinstance(schema, str):
            # `Constraint` refuses a text that is nested too deep for the JSON parser.
            schema = json.loads(Constraint("schema", schema).text)
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"schema is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise TypeError(f"schema is {text:.60}, expected an object, its JSON or a pydantic model")
    return text


def guided(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Adds options for llguidance to a schema, leaves out notes, replaces keywords that llguidance
    refuses, and makes bounds inclusive. The options replace any that the schema came with
    ("x-guidance"), because those could make the check less strict."""
    options = {"whitespace_pattern": _WHITE_SPACE, "lenient": False, "coerce_one_of": False}
    return {**inclusive(in_known_keywords(without_notes(schema))), "x-guidance": options}


def _levels(text: str) -> int:
    """How deep the brackets of a text are nested. Brackets in strings and after backslashes also
    count."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest
