"""How far along we are, on stderr: a bar where rich is installed and someone watches, else lines."""

import sys
import time
from types import TracebackType
from typing import Any

LINE_EVERY_S = 10.0


class Progress:
    def __init__(self, title: str) -> None:
        self.title, self.started, self.shown = title, time.monotonic(), float("-inf")
        self.bar: Any = None
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(title, total=1.0)

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, share: float, note: str = "") -> None:
        """`share` of the work is done."""
        if self.bar:
            self.bar.update(self.task, completed=share, description=f"{self.title} {note}".strip())
            return
        now = time.monotonic()
        if now - self.shown >= LINE_EVERY_S or share >= 1:
            self.shown = now
            print(
                f"{self.title} {share:4.0%} {now - self.started:5.0f} s {note}", file=sys.stderr, flush=True
            )
