"""What the chat's page costs beside its model: a real browser and page, and an engine without a model.

    .venv-web/bin/python -m benchmarks.web_chat [--repeats 15]

Enter to first word: by the browser's own clock, from the key to the word in the page, less what the engine took.
The page's queue, both ends of HTTP twice and the rendering are in it. Target: 150 ms.

Processor time: of the page's process for each token of a Markdown reply of 2,000, which come at 200 a second.
Target: 2 ms.
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.chat import Clocked, cpu_s, reply, served, verdict
from benchmarks.report import Spread, machine
from ghostvis_cli.engines.base import Chunk, GenerateRequest, Usage
from ghostvis_cli.engines.fake import FakeEngine

if TYPE_CHECKING:
    from playwright.sync_api import Page

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
FIRST_WORD_MS, TOKEN_MS, TOKENS, PACE_S = 150.0, 2.0, 2000, 0.005
ENTER_TO_WORD = """word => new Promise(found => {
    let pressed
    addEventListener("keydown", () => { pressed = performance.now() }, {once: true, capture: true})
    const look = () => {
        const replies = [...document.querySelectorAll("#chat .bot")]
        if (pressed && replies.some(reply => reply.innerText.includes(word))) found(performance.now() - pressed)
        else requestAnimationFrame(look)
    }
    look()
})"""


class Paced(FakeEngine):
    """A long reply in Markdown, as fast as a small model on a GPU."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        for number, piece in enumerate(reply(TOKENS)):
            await asyncio.sleep(PACE_S)
            yield Chunk(piece, (number,))
        yield Chunk("", (), finish_reason="stop", usage=Usage(9, TOKENS))


@contextmanager
def opened(url: str, tab: "Page") -> Iterator[int]:
    """The page on a server, in the tab; its process."""
    with tempfile.TemporaryDirectory() as state:
        command = [str(GHOSTVIS), "chat", "--web", "--port", "0", "--base-url", url]
        env = {**os.environ, "GHOSTVIS_STATE_DIR": state}
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            tab.goto(process.stdout.readline().strip())
            tab.locator("#box .submit-button").wait_for()
            yield process.pid
        finally:
            process.terminate()
            process.wait()


def said(tab: "Page", text: str) -> float:
    """From Enter to the word in the reply, in milliseconds; the engine repeats what it is asked."""
    before = tab.locator("#chat .bot small").count()
    tab.locator("#box textarea").fill(text)
    tab.evaluate(f"void (window.measured = ({ENTER_TO_WORD})({text!r}))")
    tab.locator("#box textarea").press("Enter")
    took = tab.evaluate("window.measured")
    tab.locator("#chat .bot small").nth(before).wait_for()
    return float(took)


def token_ms(tab: "Page", pid: int) -> float:
    started = cpu_s(pid)
    tab.locator("#box textarea").fill("go on")
    tab.locator("#box textarea").press("Enter")
    tab.locator("#chat .bot small").wait_for(timeout=600_000)
    return 1000 * (cpu_s(pid) - started) / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    from playwright.sync_api import sync_playwright

    print(machine())
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page()
        engine = Clocked()
        with served(engine) as url, opened(url, tab):
            said(tab, "warming")
            firsts = Spread.of([said(tab, f"word{n:03}") - engine.ttft_ms for n in range(repeats)])
        print(f"Enter to first word, less the engine's: {firsts.show(0, ' ms')}; ", end="")
        print(verdict(firsts.median, FIRST_WORD_MS, " ms"), flush=True)
        with served(Paced()) as url, opened(url, tab) as pid:
            cost = token_ms(tab, pid)
        print(f"a token of {TOKENS:,}: CPU {cost:.2f} ms; {verdict(cost, TOKEN_MS, ' ms')}")


if __name__ == "__main__":
    main()
