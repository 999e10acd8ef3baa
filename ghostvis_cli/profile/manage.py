"""What `ghostvis profile` does to files: find every fault, begin a new profile without harming an old one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ghostvis_cli import files
from ghostvis_cli.errors import UsageError
from ghostvis_cli.profile.document import Fault
from ghostvis_cli.profile.files import (
    NAME,
    PROJECT_FILE,
    SUFFIXES,
    Library,
    Stored,
    UnreadableError,
    is_project,
    on_disk,
    single_profile,
)
from ghostvis_cli.profile.resolve import ancestry, build, choose, merge
from ghostvis_cli.profile.schema import as_text
from ghostvis_cli.profile.show import SCHEMA_FILE, starter
from ghostvis_cli.profile.values import shown


@dataclass(frozen=True)
class Validation:
    """What was looked at, and everything wrong with it."""

    profiles: tuple[Stored, ...]
    faults: tuple[Fault, ...]
    notices: tuple[str, ...]


def validate(
    file: Path | None = None, *, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> Validation:
    """One file, or every profile that this directory and environment see. Variables don't count."""
    try:
        library, profiles = _all(env, cwd) if file is None else _of_file(file, env, cwd)
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from error
    faults: list[Fault] = []
    try:
        faults += library.project_faults()
    except UnreadableError as error:
        faults.append(Fault("", "", error.message))
    for stored in profiles:
        faults += _faults(library, stored)
    return Validation(tuple(profiles), tuple(dict.fromkeys(faults)), tuple(dict.fromkeys(library.notices)))


def _all(env: Mapping[str, str], cwd: Path | None) -> tuple[Library, list[Stored]]:
    library = Library(env, cwd)
    return library, list(library.all())


def _of_file(file: Path, env: Mapping[str, str], cwd: Path | None) -> tuple[Library, list[Stored]]:
    """A project's file brings the profiles that its own may extend; any other stands where a user's would."""
    if is_project(file):
        library = Library(env, cwd, project=file)
        return library, [stored for stored in library.all() if stored.place == "project"]
    library = Library(env, cwd)
    return library, [single_profile(file, file.stem, "user", library.shown(file))]


def _faults(library: Library, stored: Stored) -> list[Fault]:
    faults: list[Fault] = []
    chain = ancestry(library, stored, faults)
    if not faults:
        try:
            build(stored, merge([each.values for each in reversed(chain)]))
        except UsageError as error:
            faults.append(Fault("", "", error.message))
    return faults


def begin(
    name: str,
    *,
    project: bool = False,
    extends: str | None = None,
    force: bool = False,
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
) -> Path:
    """Write a commented profile and return its path. Nothing is overwritten unless `force` says so.

    A user's file is readable by its owner alone (0600) and gets the JSON Schema beside it, for editors.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"{shown(name)} can't be a profile's name", hint="letters, digits and . _ - only")
    library = Library(env, cwd)
    if extends is not None:
        choose(library, extends)
    try:
        if project:
            return _begin_project(library, name, extends, force=force)
        return _begin_user(library, name, extends, force=force)
    except FileExistsError as error:
        hint = "add the profile to it by hand, or --force to replace it" if project else "--force replaces it"
        raise UsageError(f"{error.filename} is there already", hint=hint) from error
    except OSError as error:
        raise UsageError(
            f"{error.filename} can't be written: {error.strerror}", hint="export GHOSTVIS_CONFIG_DIR=DIR"
        ) from error


def _begin_project(library: Library, name: str, extends: str | None, *, force: bool) -> Path:
    if library.cwd is None:
        raise UsageError("the current directory is gone")
    path = on_disk(library.cwd / PROJECT_FILE)
    files.write(path, starter(name, extends=extends, project=True).encode(), over=force)
    return path


def _begin_user(library: Library, name: str, extends: str | None, *, force: bool) -> Path:
    if library.user_dir is None:
        raise UsageError(
            "there is no home directory to write to", hint="export GHOSTVIS_CONFIG_DIR=DIR, or --project"
        )
    library.user_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = on_disk(library.user_dir / f"{name}{SUFFIXES[0]}")
    text = starter(name, extends=extends, schema=f"../{SCHEMA_FILE}")
    files.write(path, text.encode(), mode=0o600, over=force)
    files.write(library.user_dir.parent / SCHEMA_FILE, as_text().encode())
    return path
