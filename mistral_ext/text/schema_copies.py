"""Makes changed copies of JSON schemas, before llguidance compiles them to grammars.

`closed` forbids properties that a schema does not list. `without_notes` leaves out what does not
limit values. `in_known_keywords` says some rules in keywords that llguidance knows. `inclusive`
works around a fault of llguidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard
from urllib.parse import unquote

# Keywords whose value has schemas by name, and keywords whose value is no schema.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NO_SCHEMA = ("const", "enum", "default", "examples", "example")
_ALTERNATIVES = ("anyOf", "oneOf")

# Keywords for readers. They permit and forbid nothing.
_NOTES = (
    *("title", "description", "default", "examples", "example"),
    *("$comment", "deprecated", "readOnly", "writeOnly"),
)
# Formats that any text has. Pydantic and OpenAPI write them. JSON Schema does not know them, and
# llguidance refuses unknown formats.
_FREE_FORMATS = ("binary", "password", "path", "file-path", "directory-path")

# Formats of pydantic and OpenAPI that a pattern describes.
_HEX = "[0-9a-fA-F]"
_UUID = f"^{_HEX}{{8}}-{_HEX}{{4}}-%d{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}$"
_BASE64 = "^([%s]{4})*([%s]{2}==|[%s]{3}=)?$"
_PATTERNS = {
    **{f"uuid{version}": _UUID % version for version in range(1, 9)},
    **dict.fromkeys(("base64", "byte"), _BASE64 % (("A-Za-z0-9+/",) * 3)),
    "base64url": _BASE64 % (("A-Za-z0-9_-",) * 3),
}

# Keywords, besides additionalProperties, for properties that are not listed.
_OTHER_PROPERTIES = {"patternProperties", "unevaluatedProperties"}

# The included bound (or its negative) that replaces an excluded bound of 0. The least float would
# be closer to 0, but it has 324 digits, so its grammar would be too large.
_FROM_ZERO = 1e-16


def without_notes(schema: Any) -> Any:
    """Returns a copy of a schema that permits the same values, without descriptions and the like.
    It is smaller, and has no formats and rules that limit nothing."""
    if not isinstance(schema, dict):
        return schema
    copy = _with_inner(schema, without_notes)
    return {key: value for key, value in copy.items() if not _permits_all(key, value)}


def _permits_all(key: str, value: Any) -> bool:
    """Whether a keyword with this value forbids nothing. llguidance refuses some keywords even
    then, and other programs write them: zod gives each record `propertyNames`."""
    if key == "format":
        return value in _FREE_FORMATS
    if key == "uniqueItems":
        return value is False
    if key == "propertyNames":  # each name is a string
        return value is True or value in ({}, {"type": "string"})
    return key in _NOTES


def in_known_keywords(schema: Any) -> Any:
    """Returns a copy of a schema that permits the same values, with other keywords in place of some
    that llguidance refuses: patterns for formats, and a list of properties for `propertyNames` with
    names to choose from, as pydantic writes a dict whose keys are literals or an Enum."""

    def change(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        copy = _with_inner(part, change)
        pattern = _PATTERNS.get(str(copy.get("format")))
        if pattern and "pattern" not in copy:
            del copy["format"]
            copy["pattern"] = pattern
        _list_names(copy, schema)
        return copy

    return change(schema)


def _list_names(schema: dict[str, Any], root: Any) -> None:
    """Replaces `propertyNames` if it gives the names to choose from."""
    rule = _dict_in(schema, "propertyNames")
    rule = _target(root, rule["$ref"]) if set(rule) == {"$ref"} else rule
    names = _names_of(rule)
    if names is None or not _OTHER_PROPERTIES.isdisjoint(schema):
        return
    listed, others = _dict_in(schema, "properties"), schema.get("additionalProperties", True)
    if set(listed) <= set(names):
        del schema["propertyNames"]
        more = {name: others for name in names if name not in listed and others is not False}
        schema["properties"] = {**listed, **more}
        schema["additionalProperties"] = False


def _names_of(rule: Any) -> list[str] | None:
    """The texts that a schema permits, if it lists them and says nothing else."""
    if not isinstance(rule, dict) or rule.get("type", "string") != "string":
        return None
    keywords = rule.keys() - {"type"}
    names = [rule["const"]] if keywords == {"const"} else rule.get("enum")
    if not isinstance(names, list) or len(keywords) != 1:
        return None
    return names if all(isinstance(name, str) for name in names) else None


def _target(root: Any, reference: Any) -> Any:
    """The schema inside of `root` to which a $ref points, or None."""
    if not isinstance(reference, str) or (reference != "#" and reference[:2] != "#/"):
        return None
    found = root
    for name in unquote(reference[1:]).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found


def inclusive(schema: Any) -> Any:
    """Returns a copy of a schema in which excluded bounds are replaced by included bounds that are
    close to them.

    This avoids a fault of llguidance: if numbers have to be above 1 and at most 1.5, it permits 1,
    too. It does so if the excluded bound is whole, and the other bound is less than 1 away and
    farther from 0. The other bound may be in another part of the schema. So each whole bound is
    replaced if the numbers lie farther from 0 than the bound.
    """
    if not isinstance(schema, dict):
        return schema
    copy = _with_inner(schema, inclusive)
    if copy.get("type") != "integer":
        _include(copy, "minimum", "exclusiveMinimum", 1)
        _include(copy, "maximum", "exclusiveMaximum", -1)
    return copy


def _include(schema: dict[str, Any], included: str, excluded: str, sign: int) -> None:
    """Replaces a bound that is excluded. `sign` is 1 if the numbers lie above it, -1 if below."""
    bound, other = schema.get(excluded), schema.get(included)
    if bound is True:  # as in version 4 of JSON Schema: the other keyword has the bound
        bound = other
    if not _is_number(bound) or bound != int(bound) or not 0 <= sign * bound < 2**50:
        return
    # llguidance reads some numbers as the float next to them, so the next float is too close.
    nearest = sign * bound + (4 * math.ulp(bound) if bound else _FROM_ZERO)
    given = [sign * other] if _is_number(other) else []
    del schema[excluded]
    schema[included] = sign * max([nearest, *given])


def _is_number(value: Any) -> TypeGuard[float]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < math.inf


def closed(schema: Any) -> Any:
    """Returns a copy of a schema in which objects that list their properties may have no other
    properties. What the schema itself says about other properties stays.

    An object may have several schemas that list properties, as with allOf, or with a $ref beside
    properties. If each of them were closed, it would forbid the properties of the others. So these
    parts stay open, and the schema that combines them lists all their properties and is closed. A
    $ref in a part leads to an open copy of its target, because the target itself is closed.
    """
    return _Closing(schema).copy_of_root()


class _Closing:
    """Makes the copy for `closed`. `root` is the whole schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._lists: dict[int, bool] = {}  # what `_lists_some` found, by the id of the schema
        self._names_of_open: dict[int, str] = {}  # by the id of the schema that was copied
        self._open: dict[str, Any] = {}  # the open copies of targets, by their names in $defs

    def copy_of_root(self) -> Any:
        copy = self._copy(self._root)
        if self._open:
            copy["$defs"] = {**_dict_in(copy, "$defs"), **self._open}
        return copy

    def _copy(self, schema: Any) -> Any:
        """Returns the closed copy of a schema."""
        if not isinstance(schema, dict):
            return schema
        listing = self._listing(schema)
        if listing > 1:
            copy, names = self._open_copy(schema), self._names(schema, set())
            if names is None or "additionalProperties" in schema:
                return copy
            own = _dict_in(copy, "properties")
            copy["properties"] = {**own, **{name: {} for name in names if name not in own}}
            return {"additionalProperties": False, **copy}
        copy = _with_inner(schema, self._copy)
        if listing == 1 and not _dict_in(schema, "properties"):
            return copy  # only one schema lists properties, inside of this one; it is closed
        lists = isinstance(schema.get("properties"), dict)
        return {"additionalProperties": False, **copy} if lists else copy

    def _open_copy(self, schema: Any) -> Any:
        """Returns a copy of a schema in which the schema and its parts are open, and the schemas of
        properties are closed."""
        if not isinstance(schema, dict):
            return schema
        copy = _with_inner(schema, self._copy, self._open_copy)
        target = _target(self._root, schema.get("$ref"))
        if isinstance(target, dict) and self._lists_some(target):
            copy["$ref"] = f"#/$defs/{self._name_of_open(target)}"
        return copy

    def _name_of_open(self, target: dict[str, Any]) -> str:
        """The name in $defs of the open copy of a $ref's target."""
        if id(target) not in self._names_of_open:
            name = f"open-{len(self._names_of_open)}"
            while name in _dict_in(self._root, "$defs"):
                name += "-"
            self._names_of_open[id(target)] = name  # comes first: the target may refer to itself
            self._open[name] = self._open_copy(target)
        return self._names_of_open[id(target)]

    def _listing(self, schema: Mapping[str, Any]) -> int:
        """How many of the schemas that a value must match at the same time list properties."""
        groups = sum(any(map(self._lists_some, group)) for group in self._groups(schema))
        return groups + bool(_dict_in(schema, "properties"))

    def _lists_some(self, schema: Mapping[str, Any]) -> bool:
        if id(schema) not in self._lists:
            self._lists[id(schema)] = False  # in case that the schema refers to itself
            # An empty list counts, too: if that part were closed, it would permit no property.
            lists = isinstance(schema.get("properties"), dict)
            self._lists[id(schema)] = lists or self._listing(schema) > 0
        return self._lists[id(schema)]

    def _groups(self, schema: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
        """Yields the schemas with which a schema is combined. A value must match one of each
        group."""
        for part in _dicts_in(schema, "allOf"):
            yield [part]
        for key in _ALTERNATIVES:
            yield _dicts_in(schema, key)
        target = _target(self._root, schema.get("$ref"))
        yield [target] if isinstance(target, dict) else []

    def _names(self, schema: Mapping[str, Any], seen: set[int]) -> dict[str, None] | None:
        """The names of the properties that the parts of a schema list, in their order. None: a part
        permits other properties, too. `seen` are the ids of parts that were looked at before."""
        names: dict[str, None] = {}
        for part in [part for group in self._groups(schema) for part in group]:
            if id(part) in seen:
                continue
            seen.add(id(part))
            of_parts = self._names(part, seen)
            is_open = part.get("additionalProperties", False) is not False
            if of_parts is None or is_open or "patternProperties" in part:
                return None
            names |= {**dict.fromkeys(_dict_in(part, "properties")), **of_parts}
        return names


def _dict_in(schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = schema.get(key)
    return value if isinstance(value, dict) else {}


def _dicts_in(schema: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = schema.get(key)
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _with_inner(
    schema: Mapping[str, Any],
    change: Callable[[Any], Any],
    change_part: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Returns a copy of a schema in which the schemas directly inside of it are changed.
    `change_part` changes those that the schema combines. None: `change` does it."""

    def changed(key: str, value: Any) -> Any:
        if key in _NO_SCHEMA:
            return value
        if key in _BY_NAME and isinstance(value, dict):
            return {name: change(inner) for name, inner in value.items()}
        of_key = change_part if change_part and key in ("allOf", *_ALTERNATIVES) else change
        return [of_key(inner) for inner in value] if isinstance(value, list) else of_key(value)

    return {key: changed(key, value) for key, value in schema.items()}
