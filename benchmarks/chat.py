"""What a chat on a terminal costs beside its model.

    python -m benchmarks.chat [--repeats 15]

Enter to first token: a real `ghostvis chat` in a pseudo-terminal, answered over the local server by an engine
without a model. From the moment Enter is written to the moment the first word is read back, less what the engine
itself took. Target: 15 ms. The editor, the saved message, both ends of HTTP and the renderer are in it.

Rendering: CPU of this process for a Markdown reply of 2,000 tokens and of 8,000, fed a token at a time, and the
ratio of the two per token. Targets: under 1 ms a token, and at most 1.25 times as much for four times the length.

A long conversation: CPU of this process per message of a saved conversation, over the engine without a model, once
100 turns and once 1,600 were said. What it costs to count, send and save must not grow with them; only the bytes
of the file do. Target: at most 4 times as much.

To the prompt: from the start of the process to its prompt, with --base-url and a server that is there, and the CPU
that it took by then, which a busy machine disturbs less. Target: 0.5 s.
"""

import asyncio
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path

import pexpect

from benchmarks.report import Spread, machine, parser_of
from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.chat.render import Markdown
from ghostvis_cli.chat.session import Reply
from ghostvis_cli.chat.store import SessionStore
from ghostvis_cli.engines.base import Chunk, GenerateRequest, Usage
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.profile import resolve
from ghostvis_cli.serve.local_server import serve
from ghostvis_cli.serve.settings import Served, ServerSettings

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
FIRST_TOKEN_MS, RENDER_MS, LINEAR, LONG, PROMPT_S = 15.0, 1.0, 1.25, 4.0, 0.5
PROMPT, LINE_ENDS = "\x1b[?2004h", "\x1b[?2004l"  # the line editor turns bracketed paste on and off
WHERE, HERE = "\x1b[6n", "\x1b[1;1R"


# Rendering


def reply(tokens: int, seed: int = 3) -> list[str]:
    """Paragraphs, lists, tables and code in pieces of about four characters, as models send them."""
    draw, text = random.Random(seed), ""
    while len(text) < 4 * tokens:
        words = " ".join(
            draw.choice(("the", "a **red** circle", "of `code`", "above", "*it*")) for _ in range(60)
        )
        rows = "".join(f"| row {n} | {draw.random():.3f} |\n" for n in range(12))
        code = "".join(f"    value_{n} = f({draw.randrange(99)})  # a note\n" for n in range(8))
        text += f"## Part\n\n{words}.\n\n- one {words[:90]}\n- two\n\n| a | b |\n|--|--:|\n{rows}\n"
        text += f"```python\ndef f(x):\n{code}```\n\n"
    return [text[n : n + 4] for n in range(0, 4 * tokens, 4)]


def rendering_ms(tokens: int) -> float:
    """CPU per token."""
    pieces, renderer = reply(tokens), Markdown(lambda: 100)
    started = time.process_time()
    for piece in pieces:
        renderer.feed(piece)
    renderer.finish()
    return 1000 * (time.process_time() - started) / tokens


# A conversation


class Terse(FakeEngine):
    """Answers without reading: what is measured is ours."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk("yes", (1,), finish_reason="stop", usage=Usage(9, 1))


async def message_ms(turns: int, messages: int = 20) -> float:
    """CPU per message after `turns` of them."""
    with tempfile.TemporaryDirectory() as place:
        file = SessionStore(Path(place)).open("long")
        conversation = Conversation(resolve(None, flags={}), file=file)
        conversation.engine = Terse(context_tokens=10**6)
        for number in range(turns):
            conversation.session.begin(f"message {number} of so many words")
            conversation.session.answer(Reply("an answer of so many words", "stop", Usage(9, 6), 6))
        await _said(conversation)
        started = time.process_time()
        for _ in range(messages):
            await _said(conversation)
        return 1000 * (time.process_time() - started) / messages


async def _said(conversation: Conversation) -> None:
    async with aclosing(conversation.send("one more message")) as chunks:
        async for _ in chunks:
            pass


# A server whose engine says when it was asked and when it answered


class Clocked(FakeEngine):
    """Answers in one word. `asked_s` to `answered_s` is its own time to the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_s = self.answered_s = 0.0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.asked_s = time.monotonic()
        async for chunk in super().generate(request):
            self.answered_s = time.monotonic()
            yield chunk

    @property
    def ttft_ms(self) -> float:
        return 1000 * (self.answered_s - self.asked_s)


@contextmanager
def served(engine: FakeEngine) -> Iterator[str]:
    """The address of a local server of this engine, in a thread."""
    bound: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()
    ready = threading.Event()

    async def load() -> Served:
        return Served(engine, None)

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        await serve(
            ServerSettings(port=0),
            load,
            on_bound=lambda url: bound.set_result((url, loop, task)),
            on_ready=lambda *_: ready.set(),
        )

    def in_thread() -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(run())

    thread = threading.Thread(target=in_thread)
    thread.start()
    url, loop, task = bound.result()
    ready.wait()
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


# A chat in a pseudo-terminal


class Screen:
    """A terminal that says where its cursor is when it is asked: the line editor waits for that."""

    def __init__(self, child: "pexpect.spawn[str]") -> None:
        self.child, self.seen = child, ""

    def until(self, text: str) -> None:
        """Read up to and with this text."""
        while text not in self.seen:
            piece = self.child.read_nonblocking(65536, timeout=60)
            self.child.send(HERE * piece.count(WHERE))
            self.seen += piece
        self.seen = self.seen.partition(text)[2]


@contextmanager
def chatting(url: str) -> Iterator[Screen]:
    with tempfile.TemporaryDirectory() as state:
        env = {**os.environ, "TERM": "xterm-256color", "GHOSTVIS_STATE_DIR": state}
        child = pexpect.spawn(
            str(GHOSTVIS), ["chat", "--base-url", url], env=env, encoding="utf-8", dimensions=(40, 100)
        )
        child.delaybeforesend = None
        try:
            yield Screen(child)
        finally:
            child.close(force=True)


def first_token_ms(screen: Screen, engine: Clocked, word: str) -> float:
    """From Enter to the word on the screen, less the engine's own time."""
    screen.child.send(word)
    screen.until(word)
    time.sleep(0.2)  # a person's pause: the screen has settled before Enter
    started = time.monotonic()
    screen.child.send("\r")
    screen.until(LINE_ENDS)
    screen.until(word)
    took = 1000 * (time.monotonic() - started) - engine.ttft_ms
    screen.until(PROMPT)
    return took


def prompt_s(url: str) -> tuple[float, float]:
    """Seconds on the clock and of CPU until there is a line to type on."""
    started = time.monotonic()
    with chatting(url) as screen:
        screen.until(PROMPT)
        return time.monotonic() - started, cpu_s(screen.child.pid)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def verdict(value: float, target: float, unit: str) -> str:
    return f"target {target:g}{unit}" + ("" if value <= target else ", MISSED")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print(machine())
    rendering_ms(500)  # imports of Pygments and Rich
    pairs = [(rendering_ms(2000), rendering_ms(8000)) for _ in range(repeats)]
    short, ratio = Spread.of([a for a, _ in pairs]), Spread.of([b / a for a, b in pairs])
    print(
        f"rendering 2,000 tokens: CPU {short.show(4, ' ms')} a token; {verdict(short.median, RENDER_MS, ' ms')}"
    )
    print(f"8,000 tokens, per token: {ratio.show(2, 'x')}; {verdict(ratio.median, LINEAR, 'x')}", flush=True)
    few = [asyncio.run(message_ms(100)) for _ in range(repeats)]
    many = Spread.of([asyncio.run(message_ms(1600)) / each for each in few])
    print(f"a message after 100 turns: CPU {Spread.of(few).show(2, ' ms')}")
    print(f"after 1,600 turns: {many.show(2, 'x')}; {verdict(many.median, LONG, 'x')}", flush=True)
    engine = Clocked()
    with served(engine) as url:
        prompt_s(url)
        runs = [prompt_s(url) for _ in range(repeats)]
        starts, cpu = Spread.of([run[0] for run in runs]), Spread.of([run[1] for run in runs])
        print(f"start to prompt: {starts.show(2, ' s')}; {verdict(starts.median, PROMPT_S, ' s')}")
        print(f"of it CPU: {cpu.show(2, ' s')}", flush=True)
        with chatting(url) as screen:
            screen.until(PROMPT)
            first_token_ms(screen, engine, "warming")
            firsts = Spread.of([first_token_ms(screen, engine, f"word{n:03}") for n in range(repeats)])
        print(f"Enter to first token, less the engine's: {firsts.show(1, ' ms')}; ", end="")
        print(verdict(firsts.median, FIRST_TOKEN_MS, " ms"))


if __name__ == "__main__":
    main()
