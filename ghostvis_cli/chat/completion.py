"""What Tab offers on a line that begins a slash command: names, paths with images first, profiles, settings."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from prompt_toolkit.completion import CompleteEvent, Completer
from prompt_toolkit.completion import Completion as Offer
from prompt_toolkit.document import Document

from ghostvis_cli.chat import slash
from ghostvis_cli.paths import expanded

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
MOST = 500  # entries of one directory that are looked at
WHOLE = re.compile(r"""\s+|"(?:[^"\\]|\\.)*"(?=\s)|'[^']*'(?=\s)|(?:[^\s"'\\]|\\.)+(?=\s)""")
PLAIN = re.compile(r"[\w@%+=:,./~-]+\Z")

Names = Callable[[], Iterable[str]]


class Completions(Completer):
    """`names` gives what each kind of argument may be called: "profile", "setting", "session"."""

    def __init__(self, names: Mapping[str, Names]) -> None:
        self._names = names

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Offer]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        name, blank, rest = line[1:].partition(" ")
        if not blank:
            yield from _commands(name)
        elif name in slash.BY_NAME:
            yield from self._arguments(slash.BY_NAME[name].completes, rest)

    def _arguments(self, kind: slash.Completion, rest: str) -> Iterator[Offer]:
        first = not re.search(r"\s", rest.lstrip())
        if kind == "command":
            yield from _words(slash.BY_NAME, rest.lstrip()) if first else ()
        elif kind == "format" and first:
            yield from _words(slash.FORMATS, rest.lstrip())
        elif kind in self._names and (first or kind == "setting"):
            yield from _words(self._names[kind](), rest.split(" ")[-1])
        if kind in ("image", "file", "session") or (kind == "format" and not first):
            yield from _paths(rest, images=kind == "image")


def _commands(typed: str) -> Iterator[Offer]:
    for command in slash.TABLE:
        if command.name.startswith(typed):
            yield Offer(f"/{command.name}", -len(typed) - 1, display_meta=command.summary)


def _words(names: Iterable[str], typed: str) -> Iterator[Offer]:
    return (Offer(name, -len(typed)) for name in names if name.startswith(typed))


def _paths(rest: str, *, images: bool) -> Iterator[Offer]:
    typed = _last_argument(rest)
    path = unquoted(typed)
    folder, slash_, begun = path.rpartition("/")
    for name, is_folder in _entries(f"{folder}{slash_}", begun, images=images):
        shown = f"{name}/" if is_folder else name
        yield Offer(quoted(f"{folder}{slash_}{name}", is_open=is_folder), -len(typed), shown)


def _last_argument(rest: str) -> str:
    """What stands under the cursor, once every argument that has ended is skipped."""
    at = 0
    while ended := WHOLE.match(rest, at):
        at = ended.end()
    return rest[at:]


def _entries(folder: str, begun: str, *, images: bool) -> list[tuple[str, bool]]:
    """Names in a folder and whether each is a folder: images first, then folders, then the rest."""
    found = []
    try:
        with os.scandir(expanded(folder or ".")) as entries:
            for _, entry in zip(range(MOST), entries, strict=False):
                if entry.name.startswith(begun) and (begun.startswith(".") or not entry.name.startswith(".")):
                    found.append((entry.name, entry.is_dir()))
    except OSError:
        return []

    def rank(entry: tuple[str, bool]) -> tuple[int, str]:
        name, is_folder = entry
        wanted = not is_folder and (not images or name.lower().endswith(IMAGES))
        return 0 if wanted else 1 if is_folder else 2, name.lower()

    return sorted(((name, is_folder) for name, is_folder in found if name.isprintable()), key=rank)


def quoted(path: str, *, is_open: bool = False) -> str:
    """A path as slash.words() takes it apart; `is_open` leaves room for the rest of it."""
    path += "/" if is_open else ""
    if PLAIN.match(path):
        return path
    if "'" not in path:
        return f"'{path}" + ("" if is_open else "'")
    inside = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{inside}' + ("" if is_open else '"')


def unquoted(typed: str) -> str:
    """What an argument that may not be finished means so far."""
    if typed.startswith("'"):
        return typed[1:]
    if typed.startswith('"'):
        return re.sub(r'\\(["\\])', r"\1", typed[1:])
    return re.sub(r"\\(.)", r"\1", typed)
