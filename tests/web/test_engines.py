"""The page in a real browser, on servers that are killed and started again: our own, and the real SGLang."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from subprocess import Popen

import pytest

from tests.commands.processes import running
from tests.sglang.servers import free_port, serving_at
from tests.web.browsing import CIRCLE, SHAPES, Open, Shown, expect
from tests.web.pages import Page, page

SGLANG = Path(".venv-sglang/bin/python").absolute()
Start = Callable[[], AbstractContextManager["Popen[bytes]"]]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def served(port: int, tmp_path: Path) -> Iterator[Page]:
    """A page on a server that is not there yet."""
    options = ("--base-url", f"http://127.0.0.1:{port}", "--temperature", "0", "--set", "engine.retries=0")
    with page(tmp_path, *options) as started:
        yield started


def kill_it_while_it_answers(server: "Popen[bytes]", shown: Shown) -> None:
    """With one message on its way and another one begun: both have to be in the box then."""
    shown.bring("drop", SHAPES)
    shown.ask("What is in this picture?")
    assert "blue square" in shown.replies.last.inner_text()
    os.killpg(server.pid, signal.SIGSTOP)  # so that it has the message and says nothing
    shown.bring("paste", CIRCLE)
    shown.type("Now what is in this picture?")
    expect(shown.asked).to_have_count(2)
    shown.box.fill("half a thought")
    os.killpg(server.pid, signal.SIGKILL)
    expect(shown.notices).to_contain_text("http://127.0.0.1")
    expect(shown.box).to_have_value("Now what is in this picture?\n\nhalf a thought")
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(1)
    expect(shown.asked).to_have_count(1)


def ask_while_there_is_none(shown: Shown) -> None:
    """Refused this time, not cut off; it stays as well."""
    shown.type("Now what is in this picture?")
    expect(shown.notices).to_contain_text("ghostvis serve")
    expect(shown.box).to_have_value("Now what is in this picture?")
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(1)


def go_on(shown: Shown) -> None:
    shown.ask("What is in this picture?")
    assert "red circle" in shown.replies.last.inner_text()
    expect(shown.captions).to_have_count(2)
    shown.press("Retry")
    expect(shown.statistics).to_have_count(2)
    expect(shown.replies).to_have_count(2)


def check_that_nothing_is_lost(start: Start, served: Page, open_: Open) -> None:
    with start() as server:
        shown = open_(served)
        kill_it_while_it_answers(server, shown)
    ask_while_there_is_none(shown)
    with start():
        go_on(shown)


def test_a_server_that_is_killed_and_started_again_costs_no_message(port: int, served: Page, open_: Open):
    @contextmanager
    def start() -> Iterator["Popen[bytes]"]:
        with running("serve", "--engine", "local", "--source", "demo", "--port", str(port)) as server:
            server.line()
            yield server.process

    check_that_nothing_is_lost(start, served, open_)


@pytest.mark.slow
@pytest.mark.skipif(not SGLANG.exists(), reason="SGLang is not set up here (make sglang)")
def test_sglang_that_is_killed_and_started_again_costs_no_message(
    port: int, tmp_path: Path, served: Page, open_: Open
):
    from tests.sglang.asking import DEMO, directory

    model = directory(DEMO, tmp_path)

    @contextmanager
    def start() -> Iterator["Popen[bytes]"]:
        with serving_at(port, str(SGLANG), model) as server:
            yield server.process

    check_that_nothing_is_lost(start, served, open_)
