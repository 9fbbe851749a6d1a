"""Renders Jinja templates that come with a model. Such templates are programs by strangers.

The result is the text of transformers' `apply_chat_template`: the same dialect of Jinja with the
same extras. But a template can neither reach beyond its variables, nor run for ever, nor fill the
memory.

- jinja2's sandbox keeps a template to its variables.
- The number of steps is limited, and so is the time. A step is a call, a filter, a test, an
  arithmetic operation or one iteration of a loop.
- The size of each result is counted. If a short expression can make a large result, the size is
  counted before the result is made.

Some of Jinja's functions are left out. The time of some filters may grow with the square of the
text's length (`pprint`, `wordwrap`, `striptags`, `urlize`). The result of string methods that take
a codec or a table may have any size (`encode`, `translate`). Random functions (`random`, `lipsum`)
would give the same conversation different texts. Chat templates do not need `attr`, `urlencode` or
`xmlattr`.

The limits need no thread, signal or process, so rendering works in any thread.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from mistral_ext.text.jinja_limits import (
    ITEM,
    METER,
    LimitError,
    Meter,
    before_fields,
    before_format,
    before_indent,
    before_join,
    before_replace,
    before_rows,
    before_tabs,
    check_arguments,
    measured,
    text_size,
)

MAX_SOURCE = 2**18  # the most characters of a template; the longest published ones have 2**15


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STRING_METHODS = _words(
    "strip lstrip rstrip split rsplit splitlines partition rpartition removeprefix removesuffix "
    "replace join format startswith endswith find rfind index rindex count lower upper title "
    "capitalize casefold swapcase isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper center ljust rjust zfill expandtabs format_map"
)
# Filters that convert their first argument to text. The size of this text is counted first, because
# a small list may have a huge text.
_TEXT_FILTERS = _words(
    "capitalize center e escape filesizeformat float forceescape format indent int lower replace "
    "safe string title trim truncate upper wordcount"
)
_FILTERS = _TEXT_FILTERS | _words(
    "abs batch count d default dictsort first groupby items join last length list map max min "
    "reject rejectattr reverse round select selectattr slice sort sum unique"
)
_OWN_ARGUMENTS = ("_loop_vars", "_block_vars")
_GLOBALS = ("range", "cycler", "joiner")


class SandboxedTemplate:
    """A compiled template.

    Args:
        source: the text of the template.
        name: the name of the template's file, for error messages.

    Raises:
        ValueError: the text is not Jinja, or is longer than `MAX_SOURCE`.
    """

    def __init__(self, source: str, name: str) -> None:
        self.source = source
        self.name = name
        if len(source) > MAX_SOURCE:
            raise ValueError(
                f"{name}: the chat template has {len(source)} characters, expected at most "
                f"{MAX_SOURCE}"
            )
        try:
            self._template = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{name}: the chat template is not valid Jinja: {error.message}, "
                f"line {error.lineno}"
            ) from error
        except (
            SyntaxError,
            RecursionError,
            MemoryError,
            ValueError,
            jinja2.TemplateError,
        ) as error:
            # Python has limits of its own: blocks or parentheses are nested too deeply, or numbers
            # are too long.
            raise ValueError(f"{name}: the chat template cannot be compiled: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Returns the text that the template writes.

        Args:
            variables: strings, numbers, None, lists and dicts only.

        Raises:
            ValueError: the template calls raise_exception (the error has its message), or fails, or
                exceeds a limit.
        """
        token = METER.set(Meter(text_size(variables)))
        try:
            return self._template.render(variables)
        except _Raised as error:
            raise ValueError(f"{self.name}: {error.message}") from error
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"{self.name}: the chat template failed: {str(error) or type(error).__name__}"
            ) from error
        finally:
            METER.reset(token)


class _Raised(jinja2.TemplateError):
    """The template has called raise_exception."""


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            # Nothing may be evaluated at compile time, because results are not measured then.
            optimized=False,
            finalize=_written,
        )
        self.filters = {name: _metered(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = _metered("tojson", _tojson)
        tests: Mapping[str, Any] = self.tests  # Any, so that type checkers accept each function
        self.tests = {name: _stepped(test) for name, test in tests.items()}
        self.globals = {name: self.globals[name] for name in _GLOBALS} | {
            "dict": _make_dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if obj is None or isinstance(obj, (bool, int, float, complex, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # These names begin with __, so that they do not collide with keyword arguments of the
        # template.
        METER.get().step()
        # In loops and blocks jinja2 adds its own arguments, and removes them later.
        given = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
        check_arguments(*args, *given.values())
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 has wrapped str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            name = method.__name__
            if name == "replace":
                before_replace(text, *args, **given)
            elif name in ("format", "format_map"):
                before_fields(text, [*args, *given.values()])
            elif name == "expandtabs":
                before_tabs(text, *args, **given)
            elif name == "join":
                args = tuple(list(items) for items in args)
                before_join(text, *args)
        return measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        meter.step()
        sequences = (str, list, tuple)
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, sequences) and isinstance(times, int):
                    size = 1 if isinstance(sequence, str) else ITEM
                    meter.made(len(sequence) * max(times, 0) * size)
        elif operator == "**":
            if not abs(right) <= 64:
                raise LimitError("it raises to a power above 64")
        elif operator == "%" and isinstance(left, str):
            before_format(left, right)
        return measured(super().call_binop(context, operator, left, right))

    # Functions that _Metering inserts into a template

    def turn(self, characters: int) -> bool:
        """Counts the constant text in the body of a loop or macro. Each iteration and each call of
        the macro begins with a call of this function, which `call` above counts as a step."""
        METER.get().made(characters)
        return True

    def same(self, value: Any) -> Any:
        return value  # the template calls this function through `call`, which measures the result

    def join_measured(self, *values: Any) -> str:
        METER.get().made(sum(map(text_size, values)))
        return "".join(map(str, values))


class _Metering(NodeTransformer):
    """Inserts calls into a template, to count what `_Environment` would not see. `turn` counts the
    iterations of loops, and the constant text in loops and macros. `same` and `join_measured`
    measure lists, tuples, dicts and texts joined by ~."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.visit_Macro(node)
        # In {% for a in ... if ... %} the body runs only if the test is true, so the test counts a
        # step, too.
        if node.test is not None:
            node.test = nodes.And(_call("turn", [nodes.Const(0)], node.lineno), node.test)
        return node

    def visit_Macro(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        data = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        turn = _call("turn", [nodes.Const(data)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_measured", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # a target, such as {% for a, b in ... %}
            return node
        return _call("same", [node], node.lineno)

    visit_Tuple = visit_Dict = visit_List


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}. Templates mark with it the text on which a model is trained."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # the contents are left out, because they cannot be measured


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with '_'")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise _Raised(str(message)[:1000])


def _strftime_now(form: Any) -> str:
    return datetime.now().strftime(str(form)[:1000])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > 16:
        raise LimitError("it indents JSON by more than 16")
    meter = METER.get()
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    pieces = []
    for piece in encoder.iterencode(value):  # one element after another, until a limit
        meter.made(len(piece))
        pieces.append(piece)
    return "".join(pieces)


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    """Counts the size of a value. jinja2 calls this function for each value that a template
    writes."""
    METER.get().made(text_size(value))
    return value


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # position of the filtered value

    @functools.wraps(function)  # keeps the attribute that makes jinja2 pass its context
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.step()
        passed, value, rest = args[:first], args[first], args[first + 1 :]
        check_arguments(*rest, *kwargs.values())
        if name in _TEXT_FILTERS:
            meter.made(text_size(value))
        if name == "replace":
            before_replace(value, *rest, **kwargs)
        elif name == "indent":
            before_indent(value, *rest, **kwargs)
        elif name == "format":
            before_format(str(value), [*rest, *kwargs.values()])
        elif name in ("batch", "slice"):
            before_rows(*rest, *kwargs.values())
            # The result is made a list, because a generator could not be measured.
            return measured(list(function(*passed, value, *rest, **kwargs)))
        elif name == "join":
            value = list(value)
            before_join(str(rest[0] if rest else kwargs.get("d", "")), value)
        elif name == "sum" and not isinstance(
            rest[1] if len(rest) > 1 else kwargs.get("start", 0), (int, float)
        ):
            raise LimitError("it sums what is no number")
        return measured(function(*passed, value, *rest, **kwargs))

    return metered


def _stepped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        METER.get().step()
        return function(*args, **kwargs)

    return stepped


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment()


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    environment = _environment()
    tree = environment.parse(source)
    _Metering().visit(tree)
    tree.set_environment(environment)
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))
