"""A small hub of the tests' own: a real HTTP server on loopback with the routes that huggingface_hub asks."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests import sites

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 10**6  # from here on a file's tag is its SHA-256, as where Git LFS keeps it
PIECE_BYTES = 2**16


@dataclass
class Repository:
    """The files below `folder`. `status` and `error` are what every question is answered with, where set."""

    folder: Path
    revisions: tuple[str, ...] = ("main", COMMIT)
    token: str | None = None  # who does not send it is told that there is no such repository
    status: int | None = None
    error: str | None = None

    listed: tuple[str, ...] = ()  # what it says to have besides

    @property
    def names(self) -> list[str]:
        """Of its files but the hidden ones."""
        files = [path for path in self.folder.rglob("[!.]*") if path.is_file()]
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def sizes(self) -> dict[str, int]:
        known = {name: (self.folder / name).stat().st_size for name in self.names}
        return known | dict.fromkeys(self.listed, 10)

    def tag(self, name: str) -> str:
        path = self.folder / name
        kept = path.with_name(f".{path.name}.sha256")  # of a large file it is worked out once
        if kept.exists():
            return kept.read_text()
        with path.open("rb") as file:
            kind = "sha256" if path.stat().st_size > LARGE_BYTES else "sha1"
            return hashlib.file_digest(file, kind).hexdigest()


@dataclass
class Hub:
    """Where it is, what it holds, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    sent_bytes: int = 0
    cut_after: Callable[[], int | None] = lambda: None  # bytes of the next file, then the connection ends
    ranges: bool = True
    pause_after: int | None = None  # bytes that a large file is sent, then nothing until the client goes

    @contextmanager
    def pausing_after(self, nbytes: int) -> Iterator[None]:
        self.pause_after, before = nbytes, self.pause_after
        try:
            yield
        finally:
            self.pause_after = before

    def downloads(self) -> list[str]:
        return [
            path.rpartition("/")[2]
            for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        ]

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def running(hub: Hub | None = None) -> Iterator[Hub]:
    hub = hub or Hub()
    handler = type("Handler", (_Handler,), {"served": hub})
    with sites.serving(handler) as hub.url:
        yield hub


class _Handler(sites.Site):
    served: Hub

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.asked.append((self.command, path, self.headers.get("Range")))
        match = re.fullmatch(r"/(api/models/)?([^/]+/[^/]+)/(revision|tree|resolve)/(.+)", path)
        repository = self.served.repositories.get(match[2]) if match else None
        if match is None or repository is None or not self._may(repository):
            return self._refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        if repository.status is not None:
            return self._refuse(repository.status, repository.error)
        revision, _, name = match[4].partition("/")
        if revision not in repository.revisions:
            return self._refuse(404, "RevisionNotFound")
        if match[3] == "resolve":
            return self._file(repository, name)
        return self._json(_info(repository) if match[3] == "revision" else _tree(repository))

    def _may(self, repository: Repository) -> bool:
        return repository.token is None or self.headers.get("Authorization") == f"Bearer {repository.token}"

    def _refuse(self, status: int, error: str | None) -> None:
        self.answer(status, **({"X_Error_Code": error} if error else {}))

    def _json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _file(self, repository: Repository, name: str) -> None:
        path = repository.folder / name
        if name not in repository.names:
            return self._refuse(404, "EntryNotFound")
        size = path.stat().st_size
        begin = self._begin(size)
        if begin > size:
            return self._refuse(416, None)
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{repository.tag(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(size))
        self.send_header("Accept-Ranges", "bytes")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - begin))
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # of a client that was killed
                self._send(path, begin, is_large=size > LARGE_BYTES)
        return None

    def _begin(self, size: int) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        return int(match[1]) if match and self.served.ranges else 0

    def _send(self, path: Path, begin: int, *, is_large: bool) -> None:
        left = self.served.cut_after() if is_large else None
        pause = self.served.pause_after if is_large else None
        left = pause if pause is not None else left
        with path.open("rb") as file:
            file.seek(begin)
            while piece := file.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left)):
                self.wfile.write(piece)
                self.served.sent_bytes += len(piece)
                left = None if left is None else left - len(piece)
        if left == 0:
            if pause is not None:
                self.rfile.read(1)  # which ends when the client does
            self.close_connection = True


def _info(repository: Repository) -> dict[str, Any]:
    sizes = repository.sizes().items()
    siblings = [{"rfilename": name, "size": size, "blobId": "0" * 40} for name, size in sizes]
    return {"id": "o/n", "sha": COMMIT, "siblings": siblings}


def _tree(repository: Repository) -> list[dict[str, Any]]:
    sizes = repository.sizes().items()
    return [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes]
