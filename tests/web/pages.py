"""`ghostvis chat --web` as a real process, for clients with and without a browser."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.commands.processes import Ended, Running, environment, running

DEMO = ("--source", "demo", "--temperature", "0")


class Page:
    """The process, its address, and a client that has come in."""

    def __init__(self, process: Running, state: Path, temporary: Path) -> None:
        self.process, self.state, self.temporary = process, state, temporary
        self.address = process.line()
        self.url = self.address.partition("/?")[0]
        self.token = self.address.partition("token=")[2]
        self.client = httpx2.Client(base_url=self.url, timeout=60)

    @property
    def folder(self) -> Path:
        """Where uploads lie."""
        (found,) = self.temporary.glob("ghostvis-scratch-*")
        return found

    def enter(self) -> None:
        assert self.client.get(self.address).status_code == 303

    def upload(self, name: str, data: bytes) -> httpx2.Response:
        return self.client.post("/gradio_api/upload", files={"files": (name, data)})

    def submit(self, text: str, *files: dict[str, Any]) -> list[dict[str, Any]]:
        """What the page's own script does when it is loaded and Enter is pressed: the messages that come back."""
        tab = os.urandom(4).hex()
        self.act(tab, "load", None)
        take = self._event("submit")
        body = {"data": [None, {"text": text, "files": files}], "fn_index": take, "session_hash": tab}
        answer = self.client.post("/gradio_api/run/predict", json=body)
        if answer.status_code != 200:
            return [answer.json()]
        return self._ask(
            tab, next(each["id"] for each in self._events() if each["trigger_after"] == take), None
        )

    def act(self, session: str, name: str, *data: Any, **more: Any) -> list[dict[str, Any]]:
        """What the page's script does in a tab when something happens there; until the reply is there."""
        return self._ask(session, self._event(name), *data, **more)

    def _events(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get("/config").json()["dependencies"]
        return found

    def _event(self, name: str) -> int:
        """The first that happens when `name` does."""
        return next(each["id"] for each in self._events() if [on for _, on in each["targets"]] == [name])

    def _ask(self, session: str, event: int, *data: Any, **more: Any) -> list[dict[str, Any]]:
        body = {"data": data, "fn_index": event, "session_hash": session, **more}
        assert self.client.post("/gradio_api/queue/join", json=body).status_code == 200
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def end(self, number: signal.Signals = signal.SIGTERM) -> Ended:
        return self.process.send(number)


@contextmanager
def page(place: Path, *options: str, **variables: str) -> Iterator[Page]:
    """A page on a free port; its sessions and temporary files lie in `place`."""
    state, temporary = place / "state", place / "tmp"
    temporary.mkdir(exist_ok=True)
    names = {"GHOSTVIS_STATE_DIR": str(state), "TMPDIR": str(temporary), **variables}
    with running("chat", "--web", "--port", "0", *options, env=environment(**names)) as process:
        yield Page(process, state, temporary)


def as_file(path: str, **more: Any) -> dict[str, Any]:
    """A file as the page's script names it in a message."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": Path(path).name, **more}
