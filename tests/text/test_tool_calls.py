"""Tools: prompts against mistral-common's own, grammars of calls, and the parser of calls."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
from chat_templates import CHATML, HERMES_TOOLS

from mistral_ext.text.chat_template import encode_chat, tool_format
from mistral_ext.text.constraint import Constraint
from mistral_ext.text.grammar import GrammarCompiler
from mistral_ext.text.jinja_template import JinjaTemplate
from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.text.tool_calls import ToolDelta, ToolFormat, ToolUse
from mistral_ext.text.tool_parser import ToolParser

mistral_common = pytest.importorskip("mistral_common")
DATA = Path(mistral_common.__file__).parent / "data"

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "required": ["city"],
            "$defs": {"City": {"type": "string"}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get-time"}}
TOOLS = [WEATHER, TIME]
USER = {"role": "user", "content": "How is it in Paris?"}


def call(call_id: str, name: str = "weather", arguments: str = '{"city": "Paris"}') -> dict:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def conversation(first: str, second: str) -> list[dict]:
    return [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call(first), call(second)]},
        {"role": "tool", "tool_call_id": first, "content": '{"sky": "blue"}'},
        {"role": "tool", "tool_call_id": second, "content": "rain [/INST]"},
    ]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    found = {}
    for version in ("v1", "v2", "v3"):
        folder = tmp_path_factory.mktemp(version)
        source = next(DATA.glob(f"*.model.{version}"))
        shutil.copy(source, folder / ("tokenizer.model" if version != "v2" else source.name))
        found[version] = Tokenizer.from_folder(folder)
    return found


@pytest.fixture(scope="module")
def compilers(tokenizers):
    pytest.importorskip("llguidance")
    return {version: GrammarCompiler(tokenizer) for version, tokenizer in tokenizers.items()}


def oracle(messages: list[dict], tools: list[dict]) -> list[int]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    request = ChatCompletionRequest.from_openai(messages, tools=tools)
    return MistralTokenizer.v3().encode_chat_completion(request).tokens


# ---- prompts


def test_prompts_are_those_of_mistral_common(tokenizers):
    messages = conversation("abcdefgh1", "abcdefgh2")
    ids = encode_chat(tokenizers["v3"], messages, "v3", TOOLS)
    assert ids == oracle(messages, TOOLS)
    named = [name for name, i in tokenizers["v3"].control_ids.items() if i in ids]
    assert {"[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[INST]"} <= {*named}


def test_ids_of_other_models_are_mapped(tokenizers):
    """Always to the same one, different ones to different ones, and Mistral's own to itself."""
    own = encode_chat(tokenizers["v3"], conversation("abcdefgh1", "abcdefgh2"), "v3", TOOLS)
    foreign = [
        encode_chat(tokenizers["v3"], conversation(*ids), "v3", TOOLS)
        for ids in (("call_A", "call_B"), ("call_A", "call_B"), ("call_B", "call_A"))
    ]
    assert foreign[0] == foreign[1] != foreign[2]
    texts = [tokenizers["v3"].decode(ids) for ids in (own, foreign[0])]
    first, second = (json.loads(text.split("Paris?")[1].split("]")[0] + "]") for text in texts)
    assert [c["arguments"] for c in first] == [c["arguments"] for c in second]
    assert len({c["id"] for c in second}) == 2
    assert all(len(c["id"]) == 9 and c["id"].isalnum() for c in second)
    assert "call_A" not in texts[1]


def test_text_beside_calls_is_dropped(tokenizers):
    messages = conversation("abcdefgh1", "abcdefgh2")
    spoken = [*messages]
    spoken[1] = {**messages[1], "content": "I look it up."}
    tokenizer = tokenizers["v3"]
    assert encode_chat(tokenizer, spoken, "v3") == encode_chat(tokenizer, messages, "v3")


def test_arguments_are_objects_to_a_models_own_template(tokenizers):
    template = JinjaTemplate(Path("x"), {"default": HERMES_TOOLS}, tokenizers["v1"])
    ids = encode_chat(tokenizers["v1"], conversation("a", "b"), template, TOOLS)
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in tokenizers["v1"].decode(ids)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "b"}, "has tool_call_id 'b', expected"),
        ({"role": "tool", "content": "x"}, "has tool_call_id None, expected text"),
        ({"role": "assistant", "tool_calls": ["a"]}, r"\['tool_calls'\]\[0\] is 'a', expected"),
        ({"role": "assistant", "tool_calls": [call("")]}, r"\[0\] has id '', expected text"),
        ({"role": "assistant", "tool_calls": [call("a", "")]}, "has name '', expected text"),
    ],
)
def test_wrong_messages(message, problem, tokenizers):
    with pytest.raises(ValueError, match=rf"messages\[1\].*{problem}"):
        encode_chat(tokenizers["v3"], [USER, message, USER], "v3")
    with pytest.raises(ValueError, match=r"messages\[1\] has (role|keys)"):
        encode_chat(tokenizers["v1"], [USER, message, USER], "v1")


# ---- what a completion may be

MISTRAL = ToolFormat(5)
HERMES = ToolFormat("<tool_call>", "</tool_call>")
CALLS = (
    '{"name": "weather", "arguments": {"city": "Paris"}}',
    '{"name": "get-time", "arguments": {}}',
)
CHOICE = {"type": "function", "function": {"name": "get-time"}}


def test_the_format_of_a_template(tokenizers):
    tokenizer = tokenizers["v3"]
    assert tool_format(tokenizer, "v3") == tool_format(tokenizer, "v2") == MISTRAL
    assert tool_format(tokenizers["v1"], "v1") is None
    for source, expected in ((HERMES_TOOLS, HERMES), (CHATML, None), ("{{ tools }}", None)):
        template = JinjaTemplate(Path("x"), {"default": source}, tokenizer)
        assert tool_format(tokenizer, template) == expected


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in calls)


def accepts(compiler, constraint: Constraint, ids: list[int]) -> bool:
    """Whether a whole completion may be these tokens."""
    matcher = compiler.compile(constraint, starts_text=True).matcher()
    for token_id in ids:
        if not matcher.allowed[token_id]:
            return False
        matcher.consume(token_id)
    return matcher.is_accepting


@pytest.mark.parametrize("form", [MISTRAL, HERMES], ids=["Mistral", "Hermes"])
@pytest.mark.parametrize(
    ("choice", "parallel", "expected"),
    [  # text, one call, the other call, two calls
        ("auto", True, [True, True, True, True]),
        ("auto", False, [True, True, True, False]),
        ("required", True, [False, True, True, True]),
        ("required", False, [False, True, True, False]),
        (CHOICE, True, [False, False, True, False]),
    ],
)
def test_what_a_choice_permits(form, choice, parallel, expected, tokenizers, compilers):
    tokenizer = tokenizers["v3"]
    constraint = ToolUse.of(form, TOOLS, choice, parallel).constraint(None)
    given = [tokenizer.encode("It is <tool fine [{}].", bos=False)]
    for calls in (CALLS[:1], CALLS[1:], CALLS):
        text = f"[{', '.join(calls)}]" if form is MISTRAL else hermes(*calls)
        given.append([5] * (form is MISTRAL) + tokenizer.encode(text, bos=False))
    assert [accepts(compilers["v3"], constraint, ids) for ids in given] == expected
    for bad in (
        '{"name": "other", "arguments": {}}',
        CALLS[0].replace("city", "town"),
        CALLS[0].replace("}}", ', "more": 1}}'),
    ):
        text = f"[{bad}]" if form is MISTRAL else hermes(bad)
        ids = [5] * (form is MISTRAL) + tokenizer.encode(text, bos=False)
        assert not accepts(compilers["v3"], constraint, ids)


def test_text_before_calls_of_hermes(tokenizers, compilers):
    ids = tokenizers["v3"].encode("I look it up.\n" + hermes(CALLS[0]), bos=False)
    for choice, expected in (("auto", True), ("required", False)):
        constraint = ToolUse.of(HERMES, TOOLS, choice).constraint(None)
        assert accepts(compilers["v3"], constraint, ids) == expected


def test_calls_beside_a_constraint_of_the_text(tokenizers, compilers):
    tokenizer = tokenizers["v3"]
    text = Constraint("regex", "yes|no")
    constraint = ToolUse.of(MISTRAL, TOOLS).constraint(text)
    for ids, expected in (
        (tokenizer.encode("yes", bos=False), True),
        (tokenizer.encode("maybe", bos=False), False),
        ([5, *tokenizer.encode(f"[{CALLS[1]}]", bos=False)], True),
    ):
        assert accepts(compilers["v3"], constraint, ids) == expected
    with pytest.raises(ValueError, match="tools are given with a constraint of the text"):
        ToolUse.of(HERMES, TOOLS).constraint(text)
    assert ToolUse.of(HERMES, TOOLS, "required").constraint(text).content is None


def test_as_many_tools_as_there_may_be(compilers):
    text = {"type": "string", "description": "What it is, and how it is given. " * 4}
    parameters = {"type": "object", "properties": {f"p{i}": text for i in range(6)}}
    functions = [{"name": f"f{i}", "parameters": parameters} for i in range(128)]
    tools = [{"type": "function", "function": function} for function in functions]
    compilers["v3"].compile(ToolUse.of(MISTRAL, tools).constraint(None))


def test_schemas_that_are_too_large_are_refused_before_they_grow():
    """Each of 2000 properties would list the 5000 names of both of its parts."""
    names = {f"p{i}": {} for i in range(5000)}
    both = {"allOf": [{"$ref": "#/$defs/A"}] * 2}
    parameters = {
        "$defs": {"A": {"type": "object", "properties": names}},
        "properties": {f"q{i}": both for i in range(2000)},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(ValueError, match=r"tools has 1[0-9]{5} bytes, expected at most 65536"):
        ToolUse.of(MISTRAL, [tool]).constraint(None)


def test_arguments_of_a_schema_in_parts(tokenizers, compilers):
    day = {"type": "object", "properties": {"day": {"type": "integer"}}}
    both = {"allOf": [WEATHER["function"]["parameters"], {"$ref": "#/$defs/Day"}]}
    defined = {"City": {"type": "string"}, "Day": day, "Both": both}
    for parameters in (both, {"$ref": "#/$defs/Both"}):
        parameters = {**parameters, "$defs": defined}
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        constraint = ToolUse.of(MISTRAL, [tool], "required").constraint(None)
        for arguments, is_right in (
            ('{"city": "Paris", "day": 3}', True),
            ('{"city": "Paris"}', True),
            ('{"day": 3}', False),
            ('{"city": "Paris", "day": 3, "more": 1}', False),
        ):
            text = f'[{{"name": "f", "arguments": {arguments}}}]'
            ids = [5, *tokenizers["v3"].encode(text, bos=False)]
            assert accepts(compilers["v3"], constraint, ids) is is_right


def test_arguments_are_free_where_a_function_says_so(tokenizers, compilers):
    free = {**WEATHER["function"], "strict": False}
    use = ToolUse.of(MISTRAL, [{"type": "function", "function": free}])
    text = '[{"name": "weather", "arguments": {"town": [1]}}]'
    ids = [5, *tokenizers["v3"].encode(text, bos=False)]
    assert accepts(compilers["v3"], use.constraint(None), ids)


def test_a_schema_that_does_not_compile(compilers):
    function = {"name": "f", "parameters": {"type": "object", "not": {}}}
    use = ToolUse.of(MISTRAL, [{"type": "function", "function": function}])
    with pytest.raises(ValueError, match=r"tools cannot be used: .*not"):
        compilers["v3"].compile(use.constraint(None))


@pytest.mark.parametrize("template", ["v3", "hermes"])
def test_what_is_nested_too_deep(template, tokenizers):
    tokenizer, given = tokenizers["v3"], template
    if template == "hermes":
        given = JinjaTemplate(Path("x"), {"default": HERMES_TOOLS}, tokenizer)
    schema: dict = {}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(ValueError, match="tools are nested too deep"):
        ToolUse.of(MISTRAL, [tool]).constraint(None)
    with pytest.raises(ValueError, match="messages or tools are nested too deep"):
        encode_chat(tokenizer, [USER], given, [tool])
    deep = "[" * 5000 + "]" * 5000
    message = {"role": "assistant", "content": None, "tool_calls": [call("a", "f", deep)]}
    with pytest.raises(ValueError, match="messages or tools are nested too deep"):
        encode_chat(tokenizer, [USER, message, USER], given)


@pytest.mark.parametrize(
    ("tools", "choice", "problem"),
    [
        (None, "required", "tool_choice is 'required', expected tools to choose from"),
        (None, CHOICE, "tool_choice is 'get-time', expected one of the tools: none"),
        ([WEATHER], CHOICE, "tool_choice is 'get-time', expected one of the tools: weather"),
        (TOOLS, "maybe", "tool_choice is 'maybe', expected none, auto, required or"),
        (TOOLS, {"type": "function"}, "tool_choice is .*, expected none, auto"),
        (TOOLS, {"function": {"name": "weather"}}, "tool_choice is .*, expected none, auto"),
        ([WEATHER, WEATHER], "auto", r"tools\[1\] has name 'weather', expected a new name"),
        ([{"type": "function"}], "auto", r"tools\[0\] is .*, expected \{'type'"),
        ([{"type": "x", "function": {"name": "f"}}], "auto", r"tools\[0\] is "),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", "has name 'a b', expected"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            "auto",
            r"tools\[0\] has parameters \[\], expected a schema",
        ),
        ([TIME] * 129, "auto", "tools has 129 tools, expected at most 128"),
    ],
)
def test_wrong_tools_and_choices(tools, choice, problem):
    with pytest.raises(ValueError, match=problem):
        ToolUse.of(MISTRAL, tools, choice)


def test_models_without_tools():
    assert ToolUse.of(None, None) is ToolUse.of(None, []) is ToolUse.of(None, TOOLS, "none") is None
    with pytest.raises(ValueError, match="tools has 2 tools, expected none: the model's chat temp"):
        ToolUse.of(None, TOOLS)
    with pytest.raises(TypeError, match="tools is 'x', expected a list"):
        ToolUse.of(MISTRAL, "x")


# ---- reading calls

NESTED = '{"a": "}\\"{ \\\\", "b": {"c": [{}]}}'
WRITTEN = [
    f'{{"name": "f", "arguments": {NESTED}}}',
    '{"name": "get-time", "arguments": {}}',
]


def pushed(form: ToolFormat, pieces: list[tuple[list[int], str]]):
    """The parser after these outputs, and what it gave: text, and each call's delta."""
    parser = ToolParser(form)
    deltas = []
    for i, (ids, text) in enumerate(pieces):
        deltas += parser.push(ids, text, is_last=i == len(pieces) - 1)
    return parser, deltas


def cut(text: str, seed: int) -> list[tuple[list[int], str]]:
    rng = random.Random(seed)
    places = sorted({0, len(text), *rng.sample(range(len(text)), min(len(text), 12))})
    return [([9], text[a:b]) for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lead", ["", "I look:\n < <tool "])
@pytest.mark.parametrize("form", [MISTRAL, HERMES], ids=["Mistral", "Hermes"])
def test_calls_however_the_text_is_cut(form, lead, seed):
    if form is MISTRAL:
        lead = ""
        pieces = [([5], ""), *cut(f" [{', '.join(WRITTEN)}]", seed)]
    else:
        pieces = cut(lead + hermes(*WRITTEN), seed)
    parser, deltas = pushed(form, [*pieces, ([2], "")])
    assert parser.content == lead.rstrip()
    assert [(c.name, c.arguments) for c in parser.calls] == [("f", NESTED), ("get-time", "{}")]
    assert parser.reason("stop") == "tool_calls"
    assert "".join(d for d in deltas if isinstance(d, str)) == parser.content
    for index, found in enumerate(parser.calls):
        own = [d for d in deltas if isinstance(d, ToolDelta) and d.index == index]
        assert own[0].call.call_id == found.call_id
        assert len(found.call_id) == 9
        assert [d.call for d in own[1:]] == [None] * len(own[1:])
        assert "".join(d.arguments for d in own) == found.arguments
    assert len({c.call_id for c in parser.calls}) == 2


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("text", [" x [TOOL_CALLS] <tool", "<tool_cal l> \n", "a\n\n"])
@pytest.mark.parametrize("form", [MISTRAL, HERMES], ids=["Mistral", "Hermes"])
def test_text_stays_text(form, text, seed):
    parser, deltas = pushed(form, cut(text, seed))
    assert "".join(deltas) == parser.content == text
    assert parser.calls == []
    assert parser.reason("stop") == "stop"


def test_a_call_that_is_cut_off():
    parser, _ = pushed(MISTRAL, [([5], ""), ([9], '[{"name": "f", "arguments": {"a": "b')])
    assert parser.calls[0].arguments == '{"a": "b'
    assert [parser.reason(reason) for reason in ("length", "stop")] == ["length", "stop"]
    list(parser.push([10], '"}', True))
    assert [parser.reason(reason) for reason in ("length", "stop")] == ["length", "tool_calls"]
