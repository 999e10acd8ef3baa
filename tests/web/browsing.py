"""A tab with the page in it, and what a person does there. Every tab is held to no error and no other host."""

import base64
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.web.pages import Page

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab
    from playwright.sync_api import expect as expect
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

    def choose(self, field: str, option: str) -> None:
        """Take one of a list in the menu."""
        self.menu()
        self.tab.get_by_label(field, exact=True).click()
        self.tab.get_by_role("option", name=option, exact=True).click()

    def export(self, style: str) -> str:
        """The file that the menu's button saves."""
        self.menu()
        with self.tab.expect_download() as saved:
            self.tab.get_by_role("link", name=f"↓ {style}").click()
        assert saved.value.suggested_filename.endswith(f".{style}")
        return saved.value.path().read_text()


Open = Callable[..., Shown]


@contextmanager
def tabs(browser: "Browser") -> Iterator[Open]:
    """Show a page in a tab of its own. In the end, none of them may have had a problem."""
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
