"""A report's page as a picture: a browser that is here draws it, and is told how through a pair of pipes.

Not with `--screenshot`, which cuts a page at a height that has to be guessed, is dark on a dark desktop, and writes
a file where a browser from a snap may not. Through the pipes (DevTools) goes the page, back come its height and the
picture, and a browser whose pipes end, as when we are killed, ends too.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import IO, Any

from ghostvis_cli import scratch
from ghostvis_cli.endings import undone
from ghostvis_cli.errors import EngineError, OutputError, printable

LIMIT_S, TIDY_S = 60.0, 5.0  # it takes 2 s, and is asked when a machine may be busy
WIDTH, SCALE = 1200, 2.0  # of the page, in its own pixels; how many of the picture's each of them is
HIGHEST = 16_000  # pixels; Chromium draws no more than 16,384
VARIABLE = "GHOSTVIS_BROWSER"
BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)  # fmt: skip
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--hide-scrollbars", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-breakpad", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--disable-dev-shm-usage",  # in a container /dev/shm may be too small for a page
)  # fmt: skip
# DevTools reads descriptor 3 and writes 4; a shell moves our pipes there without a fork of our own code.
STARTS = 'exec "$@" 3<&0 4>&1 </dev/null >&2'
# What comes of reading an answer that some other program gave, in place of JSON with the fields we asked for.
NO_DEVTOOLS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
LOUDEST = ("FATAL", "error while loading")  # of a browser's many words those that say why it ended


def browser() -> str:
    """The program that draws. EngineError where there is none."""
    named = os.environ.get(VARIABLE, "")
    for name in (named,) if named else BROWSERS:
        if found := shutil.which(name):
            return found
    raise EngineError(
        f"{VARIABLE} names no program: {printable(named)}"
        if named
        else "a .png is drawn by Chromium, Chrome or Edge, and none of them is here",
        hint=f"--output report.html, or apt-get install chromium, or export {VARIABLE}=PROGRAM",
    )


def picture(html: str, *, limit_s: float = LIMIT_S) -> bytes:
    """The whole page as a PNG, in light colours. EngineError where the browser fails or takes too long."""
    program, began = browser(), monotonic()
    with _folder() as folder:
        log = folder / "log"
        try:
            with _running(program, log, limit_s) as talk:
                return talk.draw(html)
        except (OSError, *NO_DEVTOOLS) as error:
            why = f"drew no page: {_reason(log) or error}"
            if isinstance(error, NO_DEVTOOLS):
                why = "does not answer as Chromium does"
            if monotonic() - began > limit_s:
                why = f"did not draw the page within {limit_s:g} s"
            hint = f"--output report.html, or export {VARIABLE}=PROGRAM"
            raise EngineError(f"{printable(program)} {why}", hint=hint) from error


@contextmanager
def _folder() -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch.folder())
        except OSError as error:
            raise OutputError(
                f"no place for a browser's files: {error}", hint="export TMPDIR=FOLDER"
            ) from error
        yield folder


@contextmanager
def _running(program: str, log: Path, limit_s: float) -> "Iterator[_Talk]":
    """A browser that knows nobody and that nothing is left of, with all its processes."""
    flags = [*FLAGS, f"--user-data-dir={log.parent}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # else Chromium refuses to run for root
    # Nothing in anybody's home, which may not be writable either; HOME itself a snap's browser needs as it is.
    homes = dict.fromkeys(("XDG_CONFIG_HOME", "XDG_CACHE_HOME"), str(log.parent))
    with log.open("wb") as words:
        process = subprocess.Popen(
            ["/bin/sh", "-c", STARTS, "browser", program, *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, start_new_session=True,
            env=os.environ | homes,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def kill() -> None:
        if process.returncode is None:  # else the number may be somebody else's by now
            with suppress(ProcessLookupError, PermissionError):  # macOS: nothing but the dead is left
                os.killpg(process.pid, signal.SIGKILL)

    timer = Timer(limit_s, kill)
    timer.daemon = True
    timer.start()
    try:
        talk = _Talk(process.stdin, process.stdout)
        with undone(kill):
            yield talk
        timer.cancel()
        timer.join()
        with suppress(OSError, subprocess.TimeoutExpired):
            talk.leave()  # on its own, so that it clears its own files away
            process.wait(TIDY_S)
    finally:
        timer.cancel()
        timer.join()
        kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()


def _reason(log: Path) -> str:
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    loud = [line for line in said if any(word in line for word in LOUDEST)] or said[-1:]
    return printable(loud[-1].strip()) if loud else ""


class _Talk:
    """Questions and answers of DevTools: JSON that ends with a zero byte. OSError where the browser is gone."""

    def __init__(self, to: IO[bytes], answers: IO[bytes]) -> None:
        self._to, self._answers = to, answers
        self._asked, self._read = 0, b""
        self._page: dict[str, str] = {}

    def draw(self, html: str) -> bytes:
        page = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._page = {"sessionId": session}
        light = {"name": "prefers-color-scheme", "value": "light"}
        self._ask("Emulation.setEmulatedMedia", features=[light])
        self._window(100, 1.0)
        # Nobody unfolds a picture: all is open if that fits. What a report holds is escaped, so the tags are ours.
        for shown in (html.replace("<details>", "<details open>"), html):
            self._ask("Page.setDocumentContent", frameId=page, html=shown)
            height = self._ask("Page.getLayoutMetrics")["cssContentSize"]["height"]
            if height * SCALE <= HIGHEST:
                break
        self._window(height, min(SCALE, HIGHEST / height))
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])

    def leave(self) -> None:
        self._send("Browser.close")

    def _window(self, height: int, scale: float) -> None:
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **size)

    def _ask(self, method: str, **params: object) -> Any:
        self._send(method, **params)
        while (answer := self._next()).get("id") != self._asked:
            pass  # events
        if "error" in answer:
            raise OSError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _send(self, method: str, **params: object) -> None:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params, **self._page}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()

    def _next(self) -> dict[str, Any]:
        """The next message, which may be in any number of pieces."""
        pieces = [self._read]
        while b"\0" not in pieces[-1]:
            pieces.append(os.read(self._answers.fileno(), 1 << 20))
            if not pieces[-1]:
                raise OSError("it ended")
        message, _, self._read = b"".join(pieces).partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found
