"""The chat page, in Chromium."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from servers import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def tab(browser, demo):
    """The page, in a browser that knows nothing yet. An error in it fails the test."""
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(100_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.goto(demo.url)
        yield page
        assert not errors


def say(tab, text: str) -> None:
    tab.get_by_label("Message", exact=True).fill(text)
    tab.keyboard.press("Enter")


def wait_for_replies(tab, count: int) -> list[str]:
    """The texts of the replies, once there are so many and the last has ended."""
    tab.wait_for_function(
        "n => document.querySelectorAll('.assistant .tools span').length === n", arg=count
    )
    return tab.locator(".assistant .body").all_inner_texts()


def wait_for_text(tab) -> None:
    """Until the reply has begun."""
    tab.wait_for_function("() => document.querySelector('.assistant .body').innerText.length > 20")


def set_option(tab, label: str, value: str) -> None:
    tab.get_by_role("button", name="Options").click()
    tab.get_by_label(label).fill(value)
    tab.get_by_role("button", name="Done").click()


def show_reply(tab, text: str) -> None:
    """Opens a conversation in which the model has said a text."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}]
    tab.evaluate(
        "c => localStorage.setItem('mistral_ext.conversations', JSON.stringify(c))",
        [{"id": "1", "messages": messages}],
    )
    tab.reload()


def test_a_conversation_is_kept(tab):
    set_option(tab, "Longest reply", "12")
    set_option(tab, "Seed", "1")
    say(tab, "Once upon a time there was")
    (first,) = wait_for_replies(tab, 1)
    assert first
    note = tab.locator(".assistant .tools span").inner_text()
    assert re.fullmatch(r"12 tokens, [\d.]+ tokens/s, cut at the limit", note)
    say(tab, "And then")
    replies = wait_for_replies(tab, 2)
    assert tab.title() == "demo"
    tab.reload()
    assert wait_for_replies(tab, 2) == replies
    assert tab.locator(".user .body").all_inner_texts() == [
        "Once upon a time there was",
        "And then",
    ]
    tab.get_by_role("button", name="New conversation").click()
    assert tab.locator("article").count() == 0
    say(tab, "The king")
    wait_for_replies(tab, 1)
    tab.get_by_role("button", name="Once upon a time there was", exact=True).click()
    assert wait_for_replies(tab, 2) == replies
    tab.get_by_role("button", name="Delete: Once upon a time there was").click()
    assert wait_for_replies(tab, 1) != replies[:1]
    tab.reload()
    assert tab.locator("#conversations li").count() == 1


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(tab, demo, how):
    set_option(tab, "Longest reply", "20000")
    set_option(tab, "Temperature", "0")  # else a reply may end before the test has done its part
    say(tab, "Once upon a time there was")
    tab.wait_for_function(
        "() => document.querySelector('.assistant .body').textContent.length > 20"
    )
    if how == "button":
        tab.get_by_role("button", name="Stop").click()
    else:
        tab.keyboard.press("Escape")
    (text,) = wait_for_replies(tab, 1)
    assert len(text) > 20
    assert "stopped" in tab.locator(".assistant .tools").inner_text()
    demo.wait_for_load(0)
    assert tab.get_by_role("button", name="Send").is_visible()


def test_a_reload_in_the_middle_keeps_what_is_there(tab, demo):
    set_option(tab, "Longest reply", "20000")
    set_option(tab, "Temperature", "0")  # else a reply may end before the test has done its part
    say(tab, "Once upon a time there was")
    tab.wait_for_function(
        "() => document.querySelector('.assistant .body').textContent.length > 20"
    )
    tab.reload()
    assert len(tab.locator(".assistant .body").inner_text()) > 20
    demo.wait_for_load(0)


def test_edit_and_retry(tab):
    set_option(tab, "Longest reply", "8")
    say(tab, "Once upon a time")
    wait_for_replies(tab, 1)
    say(tab, "And then")
    first, _ = wait_for_replies(tab, 2)
    tab.get_by_role("button", name="Retry").first.click()
    (again,) = wait_for_replies(tab, 1)
    assert again != first
    tab.get_by_role("button", name="Edit").click()
    tab.get_by_label("Edit the message").fill("The king said")
    tab.get_by_role("button", name="Send again").click()
    wait_for_replies(tab, 1)
    assert tab.locator(".user .body").all_inner_texts() == ["The king said"]


def test_system_prompt_and_errors(tab, demo):
    seen = len(demo.lines)

    def prompt_tokens() -> int:
        """Of the next request."""
        nonlocal seen
        line = demo.next_line(seen, "completion=4")
        seen = len(demo.lines)
        return int(line.partition("prompt=")[2].split()[0])

    set_option(tab, "System prompt", "Speak of kings.")
    set_option(tab, "Longest reply", "4")
    set_option(tab, "Temperature", "0")  # else a reply may end before its fourth token
    say(tab, "Once")
    wait_for_replies(tab, 1)
    with_system = prompt_tokens()
    set_option(tab, "System prompt", "")
    tab.get_by_role("button", name="Retry").click()
    wait_for_replies(tab, 1)
    assert prompt_tokens() < with_system
    tab.evaluate(
        'fetch = async () => new Response(\'{"error": {"message": "no"}}\', {status: 500})'
    )
    tab.get_by_role("button", name="Retry").click()
    assert tab.locator(".error").inner_text() == "no"


MARKDOWN = """# Title

A *b* **c** `d` [e](https://e.org) https://f.org/g_h. snake_case_name 2*3*4 [j](javascript:alert(1))

1. one
   - inner
2. two

> quoted

| a | b |
| - | - |
| 1 | 2 |

```python
<script>alert(1)</script> **x**
```

<img src=x onerror=alert(1)> <b>i</b>
"""


def test_markdown(tab):
    show_reply(tab, MARKDOWN)
    html = re.sub(r' (rel|target|type|aria-label)="[^"]*"', "", tab.inner_html(".assistant .body"))
    assert html == (
        "<h3>Title</h3>"
        '<p>A <em>b</em> <strong>c</strong> <code>d</code> <a href="https://e.org">e</a> '
        '<a href="https://f.org/g_h">https://f.org/g_h</a>. snake_case_name 2*3*4 '
        "[j](javascript:alert(1))</p>"
        '<ol start="1"><li>one<ul><li>inner</li></ul></li><li>two</li></ol>'
        "<blockquote><p>quoted</p></blockquote>"
        "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td>2</td></tr></tbody></table>"
        '<div class="block"><pre><code>&lt;script&gt;alert(1)&lt;/script&gt; **x**</code></pre>'
        "<button>Copy</button></div>"
        "<p>&lt;img src=x onerror=alert(1)&gt; &lt;b&gt;i&lt;/b&gt;</p>"
    )


@pytest.mark.parametrize(
    "text", ["```", "- ", "1.", "|", "a | b\n- | -", "> ", "**", "[", "\\", "`"]
)
def test_half_of_markdown_is_shown_while_it_comes(tab, text):
    show_reply(tab, f"Before\n\n{text}")
    assert tab.locator(".assistant .body").inner_text().startswith("Before")


@pytest.mark.parametrize("mark", [">", "> ", "- > "])
def test_marks_without_end_are_shown(tab, mark):
    show_reply(tab, f"Before\n\n{mark * 10_000}")
    assert tab.locator(".assistant .body").inner_text().startswith("Before")
    assert tab.locator("blockquote").count() < 100


def test_all_by_keyboard(tab):
    assert tab.evaluate("document.activeElement.id") == "input"
    names = []
    for _ in range(5):
        tab.keyboard.press("Tab")
        names.append(
            tab.evaluate(
                "document.activeElement.getAttribute('aria-label') ?? "
                "document.activeElement.textContent"
            )
        )
    assert "Send" in names
    tab.get_by_role("button", name="Options").focus()
    tab.keyboard.press("Enter")
    assert tab.get_by_role("dialog", name="Options").is_visible()
    tab.keyboard.press("Escape")
    assert not tab.get_by_role("dialog", name="Options").is_visible()
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => "
        "!e.textContent.trim() && !e.getAttribute('aria-label') && !e.labels?.length).length"
    )
    assert unnamed == 0


def test_phone(browser, demo):
    with browser.new_context(viewport={"width": 360, "height": 640}, is_mobile=True) as context:
        tab = context.new_page()
        tab.goto(demo.url)
        show_reply(tab, MARKDOWN + "\n" + "a" * 500)
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        conversation = tab.get_by_role("button", name="Hello", exact=True)
        assert not conversation.is_visible()
        tab.get_by_role("button", name="Conversations").click()
        conversation.click()
        assert not conversation.is_visible()


def test_a_key_is_asked_for_and_kept_for_the_tab(browser):
    with serving("--api-key", "k") as server, browser.new_context() as context:
        tab = context.new_page()
        tab.goto(server.url)
        tab.get_by_text("the API key is missing or wrong").wait_for()
        set_option(tab, "API key", "k")
        tab.get_by_role("heading", name="demo").wait_for()
        assert "k" not in tab.evaluate("JSON.parse(localStorage['mistral_ext.options'])").values()


def test_a_reply_that_is_withheld(browser):
    """The judge takes every content with BAD in it for harmful."""
    judge = (sys.executable, str(Path(__file__).parent / "judging_server.py"))
    with serving("--moderate", "output", command=judge) as server, browser.new_context() as context:
        tab = context.new_page()
        tab.goto(server.url)
        say(tab, "BAD")
        assert wait_for_replies(tab, 1) == [""]
        assert "withheld as harmful" in tab.locator(".assistant .tools span").inner_text()


def test_files_and_policy(demo):
    page = demo.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    names = re.findall(r'"page/([\w.]+)"', page.text)
    assert {"main.js", "style.css"} <= {*names}
    for name in names:
        assert demo.http.get(f"/page/{name}").is_success
    for name in ("../server.py", "..%2fserver.py", "nothing.js"):
        assert demo.http.get(f"/page/{name}").status_code == 404
    for name in names:
        assert "innerHTML" not in demo.http.get(f"/page/{name}").text
        assert not re.search(r"https?://(?!www\.w3\.org)\w", demo.http.get(f"/page/{name}").text)
