"""Where profiles lie, and one profile as its file says it: checked key by key, nothing inherited yet.

A project's file comes before the user's, the user's before the built-in one. A place that can't be looked
into is passed over with a notice: HOME may be unset or unreadable under cron and systemd.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ghostvis_cli.errors import UsageError
from ghostvis_cli.paths import config_dir
from ghostvis_cli.profile.document import YAML_TAG, Document, Entry, Fault, read, what
from ghostvis_cli.profile.secrets import USE_INSTEAD, is_secret_name
from ghostvis_cli.profile.settings import SECTIONS, keys
from ghostvis_cli.profile.values import from_node, nearest, shown

if TYPE_CHECKING:
    from yaml.nodes import Node

Place = Literal["project", "user", "built-in"]
PLACES: tuple[Place, ...] = ("project", "user", "built-in")
PROJECT_FILE = "ghostvis.yaml"
SUFFIXES = (".yaml", ".yml")  # the first is what we write
REPOSITORY = (".git", ".hg", ".jj", ".svn")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Origin(NamedTuple):
    """Where a value came from, as people read it: `ghostvis.yaml:12 (profile lab)`."""

    place: Literal["flag", "environment", "project", "user", "built-in", "default"]
    text: str

    def __str__(self) -> str:
        return self.text


class Value(NamedTuple):
    value: object
    origin: Origin


@dataclass(frozen=True)
class Stored:
    """One profile as written. `faults` are its own; the rest of its file may have more."""

    name: str
    place: Place
    path: Path
    shown: str
    prefix: str = ""  # of its keys in messages: `profiles.lab.` in a project's file
    description: str = ""
    extends: str | None = None
    extends_line: int = 0
    values: Mapping[str, Value] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()


class UnreadableError(UsageError):
    """A profile's file is there and can't be read."""


def project_file(cwd: Path) -> Path | None:
    """ghostvis.yaml (or .yml) here or above, up to the repository's root. Outside a repository only here.

    Never further: else a file in /tmp, which anyone can write, would set the model of all who work below it.
    """
    above = [cwd, *cwd.parents]
    root = next((each for each in above if any((each / mark).exists() for mark in REPOSITORY)), cwd)
    for directory in above[: above.index(root) + 1]:
        for path in spellings(directory / PROJECT_FILE):
            if path.is_file():
                return path
    return None


def spellings(path: Path) -> list[Path]:
    """The file under each suffix that YAML goes by."""
    return [path.with_name(path.name.removesuffix(SUFFIXES[0]) + suffix) for suffix in SUFFIXES]


def on_disk(path: Path) -> Path:
    """The spelling that is there, else the one asked for."""
    return next((each for each in spellings(path) if each.exists()), path)


def _refuse_both(document: Document, path: Path) -> None:
    """Refuse a profile that has two files of different endings."""
    there = [each.name for each in spellings(path.with_suffix(SUFFIXES[0])) if each.exists()]
    if path.suffix in SUFFIXES and len(there) > 1:
        document.fault(1, "", f"{' and '.join(there)} are both there: keep one of them")


class Library:
    """The profiles that one directory and one environment see. Files are read when first asked for, once."""

    def __init__(self, env: Mapping[str, str], cwd: Path | None = None, project: Path | None = None) -> None:
        self.notices: list[str] = []
        self.cwd = cwd or self._current_directory()
        self.project = project or self._find_project()
        directory = config_dir(env)
        self.user_dir = directory / "profiles" if directory else None

    def _current_directory(self) -> Path | None:
        try:
            return Path.cwd()
        except OSError:  # removed under us
            self.notices.append("the current directory is gone, so no project file was looked for")
            return None

    def _find_project(self) -> Path | None:
        try:
            return project_file(self.cwd) if self.cwd else None
        except OSError as error:
            self.notices.append(f"the project's settings are passed over: {error}")
            return None

    def directory(self, place: Place) -> Path | None:
        """The directory of one profile a file; None for the project, which has them all in one."""
        return {"project": None, "user": self.user_dir, "built-in": _built_in_dir()}[place]

    def find(self, name: str, places: tuple[Place, ...] = PLACES) -> Stored | None:
        """The first place's profile of that name. UnreadableError if its file is there and can't be read."""
        if not NAME.fullmatch(name):  # a path is none
            return None
        for place in places:
            in_project = place == "project"
            found = self._project_profiles.get(name) if in_project else self._in_directory(place, name)
            if found is not None:
                return found
        return None

    def all(self) -> Iterator[Stored]:
        """Every profile, the built-in ones last. Where a name comes twice, the first hides the other."""
        for place in PLACES:
            for name in self.names((place,)):
                try:
                    found = self.find(name, (place,))
                except UnreadableError as error:
                    path = on_disk((self.directory(place) or Path()) / f"{name}{SUFFIXES[0]}")
                    yield Stored(name, place, path, self.shown(path), faults=(Fault("", "", error.message),))
                    continue
                if found is not None:
                    yield found

    def names(self, places: tuple[Place, ...] = PLACES) -> list[str]:
        found: dict[str, None] = {}
        for place in places:
            if place == "project":
                try:
                    found.update(dict.fromkeys(self._project_profiles))
                except UnreadableError as error:
                    self.notices.append(error.message)
            else:
                found.update(dict.fromkeys(self._listed(place)))
        return list(found)

    def project_faults(self) -> list[Fault]:
        """What is wrong with the project's file besides the faults of its profiles."""
        _ = self._project_profiles
        return self._project_document.faults if self._project_document else []

    @cached_property
    def _project_document(self) -> Document | None:
        return Document(self.shown(self.project)) if self.project else None

    @cached_property
    def _project_profiles(self) -> dict[str, Stored]:
        if self.project is None or self._project_document is None:
            return {}
        return project_profiles(self.project, self._project_document)

    def _in_directory(self, place: Place, name: str) -> Stored | None:
        directory = self.directory(place)
        path = directory / f"{name}{SUFFIXES[0]}" if directory else None
        try:
            if path is None or not (path := on_disk(path)).exists():
                return None
        except OSError as error:  # the directory, not the profile: it may be elsewhere
            self.notices.append(f"{directory} is passed over: {error.strerror}")
            return None
        return single_profile(path, name, place, self.shown(path))

    def _listed(self, place: Place) -> list[str]:
        directory = self.directory(place)
        if directory is None:
            return []
        try:
            return sorted({path.stem for path in directory.iterdir() if path.suffix in SUFFIXES})
        except FileNotFoundError:
            return []
        except OSError as error:
            self.notices.append(f"{directory} is passed over: {error.strerror}")
            return []

    def shown(self, path: Path) -> str:
        """As short as it stays clear: relative below the current directory."""
        if self.cwd is not None and path.is_relative_to(self.cwd):
            return str(path.relative_to(self.cwd))
        return str(path)


def _built_in_dir() -> Path:
    """By name: type checkers can't see where packaging maps it from."""
    return Path(next(iter(import_module("ghostvis_cli.profiles").__path__)))


def is_project(path: Path) -> bool:
    """By its name, or by its `profiles:`. OSError where it can't be opened."""
    document = Document(str(path))
    root = read(path, document)
    top = document.mapping(root, "") if root is not None else None
    return path in spellings(path.with_name(PROJECT_FILE)) or (
        top is not None and "profiles" in document.entries(top)
    )


def single_profile(path: Path, name: str, place: Place, shown_as: str) -> Stored:
    """A file that is one profile."""
    document = Document(shown_as)
    _refuse_both(document, path)
    root = _opened(path, document)
    if root is None:
        return Stored(name, place, path, shown_as, faults=tuple(document.faults))
    return _profile(document, Entry(name, 1, root), "", place, path, path.parent)


def project_profiles(path: Path, document: Document) -> dict[str, Stored]:
    """The profiles of a project's file. Faults outside them stay in the document."""
    _refuse_both(document, path)
    root = _opened(path, document)
    top = document.mapping(root, "") if root is not None else None
    if top is None:
        return {}
    entries = document.entries(top)
    for entry in entries.values():
        if entry.name != "profiles":
            inside = entry.name in (*SECTIONS, "system", "description", "extends")
            reason = "stands under profiles: NAME: in this file" if inside else "only `profiles` stands here"
            document.fault(entry.line, entry.name, reason)
    if "profiles" not in entries:
        document.fault(1, "profiles", "is missing")
        return {}
    profiles = document.mapping(entries["profiles"].node, "profiles.")
    found: dict[str, Stored] = {}
    for entry in document.entries(profiles, "profiles.").values() if profiles is not None else ():
        own = Document(document.shown)
        found[entry.name] = _profile(own, entry, f"profiles.{entry.name}.", "project", path, path.parent)
    return found


def _opened(path: Path, document: Document) -> "Node | None":
    try:
        return read(path, document)
    except OSError as error:
        raise UnreadableError(f"{document.shown} can't be read: {error.strerror}") from error


def _profile(document: Document, entry: Entry, prefix: str, place: Place, path: Path, base: Path) -> Stored:
    name = entry.name
    if not NAME.fullmatch(name):
        document.fault(entry.line, prefix.rstrip("."), f"{shown(name)} can't be a profile's name")
    mapping = document.mapping(entry.node, prefix)
    entries = document.entries(mapping, prefix) if mapping is not None else {}
    description = _plain_text(document, entries.pop("description", None), prefix)
    extends_entry = entries.pop("extends", None)
    values: dict[str, Value] = {}
    for each in _dotted(document, entries, prefix):
        where = Origin(place, origin_text(place, document.shown, each.line, name))
        _setting(document, each, prefix, base, where, values)
    return Stored(
        name,
        place,
        path,
        document.shown,
        prefix,
        description=description or "",
        extends=_plain_text(document, extends_entry, prefix),
        extends_line=extends_entry.line if extends_entry is not None else 0,
        values=values,
        faults=tuple(sorted(document.faults, key=lambda fault: fault.line)),
    )


def _dotted(document: Document, entries: Mapping[str, Entry], prefix: str) -> Iterator[Entry]:
    """The settings under their full names: `top_p` of the section `sampling` is `sampling.top_p`."""
    for entry in entries.values():
        if entry.name not in SECTIONS:
            yield entry
            continue
        section = document.mapping(entry.node, prefix + entry.name)
        if section is not None:
            for each in document.entries(section, f"{prefix}{entry.name}.").values():
                yield each._replace(name=f"{entry.name}.{each.name}")


def origin_text(place: Place, shown_as: str, line: int, name: str) -> str:
    return f"built-in profile {name}" if place == "built-in" else f"{shown_as}:{line} (profile {name})"


def _setting(
    document: Document, entry: Entry, prefix: str, base: Path, origin: Origin, values: dict[str, Value]
) -> None:
    key = keys().get(entry.name)
    if key is None:
        besides = () if "." in entry.name else (*SECTIONS, "description", "extends")
        document.fault(entry.line, prefix + entry.name, unknown(entry.name, besides=besides))
        return
    try:
        values[key.path] = Value(from_node(key, entry.node, base), origin)
    except UsageError as error:
        document.fault(entry.line, prefix + entry.name, error.message)


def _plain_text(document: Document, entry: Entry | None, prefix: str) -> str | None:
    if entry is None:
        return None
    if entry.node.tag == YAML_TAG + "str":
        return str(entry.node.value)
    document.fault(entry.line, prefix + entry.name, f"takes text, not {what(entry.node)}")
    return None


def unknown(path: str, *, besides: tuple[str, ...] = ()) -> str:
    """Why a key is refused, and the nearest one there is. Never repeats its value."""
    section, _, name = path.rpartition(".")
    if is_secret_name(name):
        return USE_INSTEAD
    elsewhere = [known.path for known in keys().values() if known.name == name]
    if elsewhere:
        return f"unknown key (did you mean {elsewhere[0]}?)"
    here = [known.name for known in keys().values() if known.path == f"{section}.{known.name}".lstrip(".")]
    here += besides
    return "unknown key" + (nearest(name, here) or nearest(path, list(keys())))
