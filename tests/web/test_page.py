"""The page in a real browser. What every test here holds: no error on the console, no request to another host."""

import base64
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.commands.processes import at, environment, hanging, run, saying, scripted, until
from tests.engines.scripted import Reply, ScriptedServer
from tests.web.pages import DEMO, Page, page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, expect
    from playwright.sync_api import Page as Tab
else:
    expect = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed here (make web)"
    ).expect

SHAPES = Path("ghostvis_cli/demo/three-shapes.jpg")
CIRCLE = Path("ghostvis_cli/demo/red-circle.png")
PATIENCE_MS = 60_000
CUT_OFF = re.compile("AbortError|errored out")  # what a page says when it is loaded again while a reply comes


class Shown:
    """A tab with the page in it, and what a person does there."""

    def __init__(self, tab: "Tab") -> None:
        self.tab, self.box = tab, tab.locator("#box textarea")
        self.replies = tab.locator("#chat .bot").filter(has_not=tab.locator("small"))
        self.asked = tab.locator("#chat .user").filter(has_not=tab.locator("small, img"))
        self.captions = tab.locator("#chat .user small")
        self.statistics = tab.locator("#chat .bot small")
        self.notices = tab.locator("#notices")

    def ask(self, text: str) -> None:
        """Send it and wait for the end of the reply."""
        before = self.statistics.count()
        self.type(text)
        self.statistics.nth(before).wait_for()

    def type(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def texts(self) -> list[str]:
        return self.tab.locator("#chat .message").all_inner_texts()

    def menu(self) -> None:
        if not self.tab.locator(".sidebar.open").count():
            self.tab.locator(".sidebar .toggle-button").click()
            self.tab.locator(".sidebar.open").wait_for()

    def renew(self) -> None:
        self.menu()
        self.tab.get_by_role("button", name="New", exact=True).click()
        expect(self.statistics).to_have_count(0)

    def edit_first(self, text: str) -> None:
        self.tab.locator("#chat [aria-label=Edit]").first.click()
        self.tab.locator("#chat textarea").fill(text)
        self.press("Submit")

    def press(self, name: str) -> None:
        self.tab.locator(f"#chat [aria-label='{name}']").last.click()

    def bring(self, event: str, path: Path) -> None:
        """An image from outside, dropped on the box or pasted into it."""
        self.box.evaluate(
            """(box, [kind, name, data]) => {
                const bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0))
                const moved = new DataTransfer()
                const type = name.endsWith("png") ? "image/png" : "image/jpeg"
                moved.items.add(new File([bytes], name, {type}))
                box.dispatchEvent(kind == "paste"
                    ? new ClipboardEvent("paste", {clipboardData: moved, bubbles: true, cancelable: true})
                    : new DragEvent("drop", {dataTransfer: moved, bubbles: true, cancelable: true}))
            }""",
            [event, path.name, base64.b64encode(path.read_bytes()).decode()],
        )
        self.tab.locator("#box img").last.wait_for()


Open = Callable[..., "Shown"]


@pytest.fixture
def open_(browser: "Browser") -> Iterator[Open]:
    """Show a page in a tab of its own."""
    expect.set_options(timeout=PATIENCE_MS)
    problems: list[str] = []
    contexts = []

    def show(page: Page, width: int = 1280, height: int = 800) -> Shown:
        context = browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        host = urlsplit(page.url).netloc
        tab.on(
            "request",
            lambda asked: problems.append(asked.url) if _host(asked.url) not in (host, "") else None,
        )
        tab.goto(page.address)
        tab.locator("#box .submit-button").wait_for()
        tab.wait_for_timeout(300)
        return Shown(tab)

    yield show
    for context in contexts:
        context.close()
    assert [problem for problem in problems if not CUT_OFF.search(problem)] == []


def _host(url: str) -> str:
    return "" if url.startswith(("data:", "blob:")) else urlsplit(url).netloc


# --- with the built-in model


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with page(tmp_path_factory.mktemp("demo"), *DEMO, "--session", "trip") as started:
        yield started


def test_a_conversation_of_six_turns_goes_on_after_a_reload_and_at_a_terminal(demo: Page, open_: Open):
    shown = open_(demo)
    shown.ask("What can you do?")
    shown.bring("drop", SHAPES)
    shown.ask("What is in this picture?")
    assert "blue square" in shown.replies.last.inner_text()
    assert shown.captions.all_inner_texts() == ["three-shapes.jpg 400x400 · all of it · 64 tokens"]
    shown.ask("Which shapes are there?")
    shown.bring("paste", CIRCLE)
    shown.ask("What is in this picture?")
    assert "red circle" in shown.replies.last.inner_text()
    shown.ask("What color is it?")
    shown.ask("Who are you?")
    said = r"ttft \d+ ms · (\d+ tok/s · )?\d+ \+ \d+ tokens · 128 image · \d+ cached"
    assert re.fullmatch(said, shown.statistics.last.inner_text())
    assert "of 10,240 tokens" in shown.tab.locator("#status").inner_text()
    before = shown.texts()
    shown.tab.reload()
    shown.statistics.nth(5).wait_for()
    assert shown.texts() == before

    terminal = {"env": environment(GHOSTVIS_STATE_DIR=str(demo.state)), "input": b"Which shapes are there?\n"}
    assert run("chat", "--session", "trip", *DEMO, **terminal).returncode == 10  # the page has it
    shown.renew()
    assert run("chat", "--session", "trip", *DEMO, **terminal).returncode == 0
    shown.tab.get_by_label("Session").click()
    shown.tab.get_by_role("option", name="trip").click()
    expect(shown.statistics).to_have_count(7)
    assert shown.texts()[: len(before)] == before


def test_sampling_says_where_it_comes_from_and_refuses_what_is_out_of_range(demo: Page, open_: Open):
    shown = open_(demo)
    shown.menu()
    field = shown.tab.get_by_label("temperature")
    expect(field).to_have_value("0")
    expect(shown.tab.get_by_text("flag --temperature")).to_be_visible()
    field.fill("0.5")
    field.press("Enter")
    expect(shown.tab.get_by_text("set in this chat")).to_be_visible()
    field.fill("-1")
    field.press("Enter")
    expect(shown.notices).to_contain_text("temperature")
    expect(field).to_have_value("0.5")


def test_a_session_is_renamed_and_deleted(demo: Page, open_: Open):
    shown = open_(demo)
    shown.renew()
    shown.ask("What can you do?")
    shown.menu()
    name = shown.tab.get_by_label("Name")
    before = name.input_value()
    name.fill("../up")
    name.press("Enter")
    expect(shown.notices).to_contain_text("is no name of a session")
    expect(name).to_have_value(before)
    name.fill("walk-2")
    name.press("Enter")
    expect(name).to_have_value("walk-2")
    until(lambda: (demo.state / "chats" / "walk-2" / "session.jsonl").exists())
    shown.tab.get_by_role("button", name="Delete", exact=True).click()
    shown.tab.get_by_role("button", name="Delete it").click()
    expect(shown.statistics).to_have_count(0)
    assert not (demo.state / "chats" / "walk-2").exists()


def test_on_a_phone_nothing_is_wider_than_the_window_with_twenty_images(demo: Page, open_: Open):
    shown = open_(demo, 390, 844)
    shown.renew()
    shown.tab.set_input_files("#box input[type=file]", [SHAPES, CIRCLE] * 10)
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(20)
    shown.ask("What is in this picture?")
    assert shown.captions.count() == 20
    assert shown.tab.evaluate("document.documentElement.scrollWidth") <= 390


# --- with a server that says what the test wants


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A page on a server with these replies."""
    with ExitStack() as stack:

        def begin(*replies: Reply) -> tuple[Page, ScriptedServer]:
            server = stack.enter_context(scripted(*replies))
            return stack.enter_context(page(tmp_path, *at(server))), server

        yield begin


def test_stop_regenerate_edit_and_undo_do_what_they_do_at_a_terminal(talk: Any, open_: Open):
    served, server = talk(
        saying("one"), hanging("two", " and"), saying("three"), saying("four"), saying("five")
    )
    shown = open_(served)
    shown.ask("first <b>")
    shown.type("second")
    expect(shown.replies.last).to_have_text("two and")
    shown.tab.locator("#box .stop-button").click()
    expect(shown.statistics.last).to_contain_text("stopped")
    shown.press("Retry")
    expect(shown.replies.last).to_have_text("three")
    shown.ask("third")
    shown.press("Undo")
    expect(shown.asked).to_have_count(2)
    shown.edit_first("first &lt;i> changed")
    expect(shown.replies).to_have_text(["five"])
    assert server.posts[-1].json["messages"] == [{"role": "user", "content": "first <i> changed"}]


def test_a_tab_that_shows_what_is_past_changes_nothing_and_catches_up(talk: Any, open_: Open):
    served, server = talk(saying("one"), saying("two"), saying("three"))
    behind, ahead = open_(served), open_(served)
    behind.ask("first")
    ahead.tab.reload()
    ahead.statistics.wait_for()
    ahead.renew()
    ahead.ask("another subject")
    behind.box.fill("half a")
    behind.edit_first("first, changed")
    expect(behind.notices).to_contain_text("went on in another tab")
    expect(behind.asked).to_have_text(["another subject"])
    expect(behind.box).to_have_value("first, changed\n\nhalf a")  # nothing typed is lost
    assert len(server.posts) == 2
    behind.ask("and now")
    assert [each["content"] for each in server.posts[-1].json["messages"]][::2] == [
        "another subject",
        "and now",
    ]
    ahead.press("Undo")
    expect(ahead.notices).to_contain_text("went on in another tab")
    expect(ahead.statistics).to_have_count(2)


def test_a_message_that_a_dead_server_did_not_answer_stands_in_the_box_again(talk: Any, open_: Open):
    served, server = talk(saying("one"), Reply((), end="reset"), saying("two"))
    shown = open_(served)
    shown.ask("first")
    shown.bring("drop", SHAPES)
    shown.type("second")
    expect(shown.notices).to_contain_text("closed the connection")
    expect(shown.box).to_have_value("second")
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(1)
    shown.type("")  # loses nothing
    expect(shown.notices).to_contain_text("the message is empty")
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(1)
    shown.type("second")
    expect(shown.replies.last).to_have_text("two")
    assert len(server.posts[-1].json["messages"][-1]["content"]) == 2


def test_a_page_that_is_loaded_again_shows_the_reply_that_is_coming(talk: Any, open_: Open):
    served, _ = talk(hanging("once", " upon"))
    shown = open_(served)
    shown.type("Tell")
    expect(shown.replies.last).to_have_text("once upon")
    shown.tab.reload()
    expect(shown.replies.last).to_have_text("once upon")
    shown.tab.locator("#box .stop-button").click()
    expect(shown.statistics.last).to_contain_text("stopped")


# The last three are code to our reading of Markdown, and none to Gradio's.
HOSTILE = r"""<script>alert(1)</script> <img src=x onerror=alert(2)> <svg onload=alert(3)><circle r=9 /></svg>
[link](javascript:alert(4)) ![far](http://192.0.2.1/far.png) <iframe src=http://192.0.2.1></iframe>
<a href="http://192.0.2.1" onclick=alert(5)>go</a> <form action=http://192.0.2.1><button>send</button></form>
<style>body { display: none }</style> <details open ontoggle=alert(6)> $$\href{javascript:alert(7)}{x}$$

```mermaid
graph TD; A["<img src=http://192.0.2.1/a onerror=alert(8)>"] --> B; click A "javascript:alert(9)"
```

\`<img src=http://192.0.2.1/b onerror=alert(10)>\`

`
` <video src=http://192.0.2.1/c onerror=alert(11)> `

- list
  ```
<img src=http://192.0.2.1/d onerror=alert(12)>
"""
ELEMENTS = (
    "script, img, iframe, form, style, details, video, [onclick], [onload], [onerror], a[href^=javascript]"
)


def test_what_a_model_writes_never_becomes_html(talk: Any, open_: Open):
    served, _ = talk(saying(HOSTILE + "\x1b[31mred \u202eback"))
    shown = open_(served)
    shown.ask("Show me")
    reply = shown.replies.last
    expect(reply).to_contain_text("<script>alert(1)</script>")
    expect(reply).to_contain_text("graph TD")
    expect(reply.locator(ELEMENTS)).to_have_count(0)
    assert not {"\x1b", "\u202e"} & set(reply.inner_text())


def test_a_long_reply_in_markdown_is_shown_as_it_comes(talk: Any, open_: Open):
    words = [f"* **point {n}** with `code {n}`\n" for n in range(400)]
    served, _ = talk(saying(*words))
    shown = open_(served)
    shown.ask("List")
    expect(shown.replies.last.locator("li")).to_have_count(400)
    expect(shown.replies.last.locator("strong").last).to_have_text("point 399")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Page]:
    with page(tmp_path, *DEMO, "--max-tokens", "10210") as started:
        yield started


def test_what_does_not_fit_is_said_and_sent_without_the_oldest_turns(full: Page, open_: Open):
    shown = open_(full)
    shown.ask("What can you do?")
    shown.type("Which shapes are there?")
    expect(shown.notices).to_contain_text("does not fit")
    shown.tab.get_by_role("button", name="Leave out the oldest turns").click()
    expect(shown.statistics).to_have_count(2)
