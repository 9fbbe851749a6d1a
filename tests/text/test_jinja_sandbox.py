"""Templates by strangers: the text of transformers, and an end to whatever else they do."""

from __future__ import annotations

import threading
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mistral_ext.text import jinja_limits
from mistral_ext.text.jinja_sandbox import SandboxedTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <b> \n\nthere "},
    {"role": "assistant", "content": "Hello, {{ x }}"},
]

SIXTY_TIMES = "{% set n = namespace(s='x') %}{% for i in range(60) %}"


def render(source: str, **variables) -> str:
    return SandboxedTemplate(source, "file.jinja").render({"messages": MESSAGES, **variables})


@pytest.mark.parametrize(
    "source",
    [
        "a\n{% if true %}\n  b\n    {% endif %}\nc\n",  # line breaks after tags, spaces before them
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m.role }}\n{% endfor %}",
        "{% for m in messages if m.role != 'user' %}{{ m.role }}{{ loop.last }};{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}"
        "{% endfor %}",
        "{% for m in messages %}{{ loop.previtem.role if loop.previtem }}<{% endfor %}",
        "{% for m in messages %}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v }},{% else %}none{% endfor %}",
        "{% macro f(a, b=2) %}[{{ a }}{{ b }}{{ caller() if caller }}]{% endmacro %}"
        "{{ f(1) }}{% call f('x', b=none) %}c{% endcall %}",
        "{% set ns = namespace(n=0, t='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.t = ns.t ~ m.role[0] %}{% endfor %}{{ ns.n }}{{ ns.t }}",
        "{% set x %}<{{ messages[1].content | trim }}>{% endset %}{{ x * 2 }}{{ x | length }}",
        "{% filter upper %}shout {{ messages[0].role }}{% endfilter %}",
        "{% generation %}{% set y = 1 %}g{{ y }}{% endgeneration %}{{ y is defined }}",
        "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}{{ 'é<' | tojson }}"
        "{{ {'b': [1, 2.5, none, true], 'a': {}} | tojson(ensure_ascii=true, sort_keys=true) }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ ['b', 'a'] | sort | first }}",
        "{{ messages | rejectattr('role', 'in', ['user']) | list | length }}{{ (1, 2) | last }}",
        "{{ messages[1].content.strip().split(' ')[-1] }}{{ 'a-b'.replace('-', '+') }}",
        "{{ '%s is %05.1f' % ('x', 1.25) }}{{ '{}{{}}{:>4}'.format(1, 'b') }}",
        "{{ '{:.1f}. {x[role]}'.format(1.25, x=messages[0]) }}",
        "{{ '%d' | format(3) }}{{ '{a}' . format(a=2) }}{{ '%(b)s' % {'b': 1} }}",
        "{{ 'a' in 'abc' and not 'x' in messages[0] }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ 7 % 4 - 1 }}",
        "{{ messages[0].get('name', 'none') }}{{ messages[0].name is defined }}{{ nothing }}",
        "{{ 'x' | default('y') }}{{ nothing | default('y', true) }}{{ nothing is none }}",
        "{{ messages[0].content | replace('B', 'b') | capitalize | title | indent(2, true) }}",
        "{{ [1, 2, 3][1:] + [4] }}{{ range(3) | list }}{{ {'a': 1} | items | list }}",
        "{{ [3, 1] | sum }}{{ [3, 1] | max }}{{ [3, 3] | unique | list }}{{ 'ab' | reverse }}",
        "{{ '<&>' | e }}{{ '1' | int + 1 }}{{ '1.5' | float }}{{ 2 | string }}{{ -3 }}",
        "{{ 1.26 | round(1) }}{{ dict(a=1) }}{{ 'a' ~ 1 ~ none }}",
        "{{ strftime_now('%Y') }}{{ 'a' 'b' }}{{ 'a' if false }}{{ (messages | length) > 2 }}",
        "{% for a in range(3) %}{% for b in range(a) %}{{ a }}{{ b }} {% endfor %}{% endfor %}",
        "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
        "{% for m in messages %}{% set r = m.role.replace('e', 'E') %}{{ '{}{n}'.format(r, n=1) }}"
        "{% block b scoped %}{{ 'x'.replace('x', 'y') }}{% endblock %}{% endfor %}",
        "{% set a, b = 1, [2] %}{{ a }}{{ b }}{% with c = 3 %}{{ c }}{% endwith %}",
        "{{ 'x'.center(9) }}|{{ 'x'.ljust(4, '.') }}{{ 'x'.rjust(4) }}{{ '7'.zfill(3) }}",
        "{{ 'x' | center(9) }}|{{ 'x' | center }}|{{ 'xyz' | center(width=-5) }}",
        "{{ 'a\tb'.expandtabs() }}{{ 'a\tb'.expandtabs(tabsize=3) }}",
        "{{ '{a}'.format_map({'a': 1}) }}",
        "{% for row in messages | map(attribute='role') | batch(2, '-') %}{{ row }}{% endfor %}",
        "{% for row in range(7) | slice(3) %}{{ row }}{% endfor %}",
        "{{ 'abc' | slice(2, '-') | list }}",
        "{% for row in 'abcde' | batch(fill_with=0, linecount=2) %}{{ row | join }},{% endfor %}",
        "{{ '<' | forceescape }}{{ 12345678 | filesizeformat }}{{ 2048 | filesizeformat(true) }}",
    ],
)
def test_same_text_as_transformers(source):
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=source)
    assert render(source) == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        # loops
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        (
            "{% for i in range(99999) %}{{ range(99999) | map('upper') | list }}{% endfor %}",
            "steps",
        ),
        ("{% for i in range(99999) if false %}{% endfor %}" * 9, "steps"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "steps",
        ),
        ("{{ range(99999) | select('odd') | list | length }}" * 9, "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(1000000000) }}", "number above"),
        ("{{ range(999999) }}", "Range too big"),
        # text that doubles
        (
            SIXTY_TIMES + "{% set n.s = n.s + n.s %}{% endfor %}",
            "too much text",
        ),
        (
            SIXTY_TIMES + "{% set n.s = n.s ~ n.s %}{% endfor %}",
            "too much text",
        ),
        (
            SIXTY_TIMES + "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
            "too much text",
        ),
        (
            SIXTY_TIMES + "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
            "too much text",
        ),
        (
            SIXTY_TIMES + "{% set n.s = {1: n.s, 2: n.s} %}{% endfor %}{{ n.s == n.s }}",
            "too much text",
        ),
        (
            SIXTY_TIMES + "{% set n.s = (n.s, n.s) %}{% endfor %}",
            "too much text",
        ),
        (
            SIXTY_TIMES + "{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
            "too much text",
        ),
        (
            SIXTY_TIMES + "{% set n.s = '{0}{0}'.format(n.s) %}{% endfor %}",
            "too much text",
        ),
        (
            SIXTY_TIMES + "{% set n.s = [n.s, n.s] | join %}{% endfor %}",
            "too much text",
        ),
        # text made at once
        ("{{ 'x' * 9999999999 }}", "too much text"),
        ("{{ 9999999999 * 'x' }}", "too much text"),
        ("{{ [1] * 9999999999 }}", "too much text"),
        ("{{ ('a' * 999999).replace('', 'b' * 999999) }}", "too much text"),
        ("{{ ('a' * 999999) | replace('a', 'b' * 999999) }}", "too much text"),
        ("{{ ('a\n' * 999999) | indent(999999) }}", "too much text"),
        ("{{ ('a' * 2999999).join(range(9999) | map('string')) }}", "too much text"),
        ("{{ range(9999) | join('a' * 2999999) }}", "too much text"),
        ("{{ range(99999) | map('replace', '', 'b' * 999999) | list }}", "too much text"),
        ("{{ ('{0}' * 999999).format('b' * 2999999) }}", "too much text"),
        ("{{ [[[1] * 1000] * 1000] | tojson(indent=16) }}", "too much text"),
        (
            "{% set s = 'x' * 999999 %}{% set t %}" + "{{ s }}" * 999 + "{% endset %}",
            "too much text",
        ),
        (
            "{% macro f() %}"
            + "x" * 9999
            + "{% endmacro %}{% set t %}{% for i in range(9999) %}{{ f() }}"
            "{% endfor %}{% endset %}",
            "too much text",
        ),
        ("{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}", "too much text"),
        *(
            # a list of one text many times is short, its text is not
            ("{% set s = ['x' * 999999] * 99999 %}" + made, "too much text")
            for made in (
                "{{ s }}",
                "{{ s ~ '' }}",
                "{{ s | string }}",
                "{{ s | upper }}",
                "{{ s | join }}",
                "{{ ''.join(s) }}",
                "{{ s | tojson }}",
                "{{ '%s' % [s] }}",
                "{{ '%s' | format(s) }}",
                "{{ '{}'.format(s) }}",
                "{{ {'a': s} }}",
            )
        ),
        ("{% set n = namespace(s='x' * 999) %}{{ '{0.s}'.format(n) }}", "formats an attribute"),
        ("{{ '{a.s}'.format(a=namespace(s=1)) }}", "formats an attribute"),
        ("{{ '{0[:].s}'.format({':': namespace(s=1)}) }}", "formats an attribute"),
        ("{{ '{a.s}'.format_map({'a': namespace(s=1)}) }}", "formats an attribute"),
        ("{{ [1] | tojson(indent=999) }}", "indents JSON by more"),
        ("{{ '%99999999d' % 1 }}", "a width of four digits"),
        ("{{ '%*d' % (99999999, 1) }}", "a width of four digits"),
        ("{{ '%99999999d' | format(1) }}", "a width of four digits"),
        ("{{ '{:99999999}'.format(1) }}", "a width of four digits"),
        ("{{ '{:{}}'.format(1, 99999) }}", "a width of four digits"),
        ("{{ ('\t' * 999999).expandtabs(999999) }}", "too much text"),
        ("{{ ('\t' * 999999).expandtabs(tabsize=999999) }}", "too much text"),
        ("{{ 'x'.center(9999999) }}", "number above"),
        ("{{ 'x' | center(9999999) }}", "number above"),
        *(
            ("{% for i in range(99) %}{% set s = " + made + " %}{% endfor %}", "too much text")
            for made in (
                "'x'.center(999999)",
                "'x'.ljust(999999)",
                "'x'.rjust(999999)",
                "'7'.zfill(999999)",
                "'x' | center(999999)",
                "[1] | batch(99999, 'x')",
                "[1] | batch(fill_with=0, linecount=99999)",
                "[] | slice(99999)",
                "'{a}'.format_map({'a': 'x' * 199999})",
                "('&' * 199999) | forceescape",
            )
        ),
        ("{{ 'x'.encode('idna') }}", "unsafe"),
        ("{{ 'x'.translate({120: 'y' * 999}) }}", "unsafe"),
        ("{{ (1).to_bytes(99999, 'big') }}", "unsafe"),
        ("{{ lipsum(99) }}", "'lipsum' is undefined"),
        ("{{ [['a']] | sum(start=[]) }}", "sums what is no number"),
        # numbers
        ("{{ 9 ** 99999 }}", "power above 64"),
        ("{{ 2 ** 64 ** 64 }}", "too large a number"),
        (
            "{% set n = namespace(s=3) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}"
            "{% endfor %}",
            "too large a number",
        ),
        # beyond its variables
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__.__base__ }}", "unsafe"),
        ("{{ raise_exception.__globals__['sys'] }}", "unsafe"),
        ("{{ namespace.__init__.__globals__['sys'] }}", "unsafe"),
        ("{{ ''|attr('__class__') }}", "No filter named 'attr'"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "formats an attribute"),
        ("{{ [''] | map(attribute='__class__.__mro__') | list }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "begins with '_'"),
        ("{{ namespace(_Namespace__attrs=1) }}", "begins with '_'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% extends 'x' %}", "no loader"),
        # not templates
        ("{% for m in messages %}", "not valid Jinja: .*, line 1"),
        ("{{ 'x' | pprint }}", "not valid Jinja: No filter named 'pprint'"),
        ("{{" + "(" * 9999 + ")" * 9999 + "}}", "cannot be compiled"),
        ("{% if 1 %}" * 300 + "{% endif %}" * 300, "cannot be compiled"),
        ("{{ 1" + "0" * 9999 + " }}", "cannot be compiled"),
        ("{{ nothing.x }}", "'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "by zero"),
    ],
)
def test_what_templates_may_not_do(source, reason, monkeypatch):
    monkeypatch.setattr(jinja_limits, "MAX_STEPS", 100_000)
    with pytest.raises(ValueError, match=rf"^file\.jinja: .*{reason}"):
        render(source)


@pytest.mark.parametrize("source", ["x" * 300_000, "{# " + "x" * 300_000 + " #}"])
def test_a_template_that_is_too_long(source):
    with pytest.raises(ValueError, match=r"file\.jinja: the chat template has 3000.. characters"):
        SandboxedTemplate(source, "file.jinja")


def test_exception_of_the_template_itself():
    with pytest.raises(ValueError, match=r"^file\.jinja: Only users, not system$"):
        render("{{ raise_exception('Only users, not ' + messages[0].role) }}")


def test_a_deadline_holds_in_every_thread(monkeypatch):
    """Time is up before the first step; no signal is needed to say so."""
    monkeypatch.setattr(jinja_limits, "MAX_SECONDS", -1.0)
    template = SandboxedTemplate("{% for m in messages %}{{ m }}{% endfor %}", "file.jinja")
    errors = []

    def run() -> None:
        try:
            template.render({"messages": MESSAGES})
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert all("it takes longer than -1.0 seconds" in error for error in errors)


def test_renderings_do_not_share_what_they_have_left(monkeypatch):
    monkeypatch.setattr(jinja_limits, "MAX_STEPS", 100)
    for _ in range(3):
        assert render("{% for i in range(60) %}{{ i }}{% endfor %}").endswith("59")


def test_long_conversations_are_within_the_limits():
    """A million tokens' worth of text, and thousands of turns."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' or m.role != 'x' %}"
        "{{ '<' + m['role'] ~ '>' + m.content.strip() | trim + '\n' }}{% endif %}{% endfor %}"
    )
    for size, count in ((4_000_000, 2), (200, 5_000)):
        messages = [{"role": "user", "content": "x" * size}] * count
        assert render(source, messages=messages) == ("<user>" + "x" * size + "\n") * count
    assert str(datetime.now().year) in render("{{ strftime_now('%d %b %Y') }}")
