"""Converted directories, the chosen one and the cached: whether each is what its certificate vouches for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from ghostvis_cli.convert import cache
from ghostvis_cli.convert.directory import CERTIFICATE, certificate_of, changed_files, is_converted
from ghostvis_cli.convert.hashes import KnownHashes
from ghostvis_cli.doctor.finding import Finding
from ghostvis_cli.paths import cache_dir, expanded
from ghostvis_cli.profile import Resolved


def converted(resolved: Resolved | None) -> Iterator[Finding]:
    """Files that were hashed before and have not been touched since are not read again."""
    if cache_dir() is None:
        return  # the check of directories says so
    base = cache.default_base()
    known = KnownHashes(base / "hashes.json", lambda line: None)
    chosen = chosen_directory(resolved)
    if chosen is not None:
        yield from _examined("chosen", chosen, known)
        known.save()
    for directory in cache.entries(base):
        if directory != chosen:
            yield from _examined("cached", directory, known)
            known.save()  # each at once: this check may be out of time before the next


def chosen_directory(resolved: Resolved | None) -> Path | None:
    """What the profile names, where that is a converted directory."""
    named = resolved.profile.model.checkpoint_path if resolved else None
    if named is None or not is_converted(expanded(named)):
        return None
    return expanded(named).resolve()


def _examined(name: str, directory: Path, known: KnownHashes) -> Iterator[Finding]:
    """A warning for each fault, or that there is none."""
    faults = list(_faults(directory, known))
    for message, fix in faults:
        yield Finding("converted", name, "warning", message, fix)
    if not faults:
        yield Finding("converted", name, "ok", f"{directory} is as it was converted and verified")


def _faults(directory: Path, known: KnownHashes) -> Iterator[tuple[str, str]]:
    """Each fault and its fix."""
    certificate = certificate_of(directory)
    if certificate is None:
        yield f"{directory / CERTIFICATE} can't be read as a certificate", _again(directory, {})
        return
    if changed := changed_files(directory, certificate, known):
        message = f"{directory} was changed since it was converted: {', '.join(changed)}"
        yield message, _again(directory, certificate)
    verification = _table(certificate, "verification")
    if verification.get("skipped", True):
        yield f"{directory} was never verified", _again(directory, certificate)
    elif not verification.get("passed", False):
        message = f"{directory} failed its verification: it does not answer as its checkpoint does"
        yield message, f"don't serve it; {directory / CERTIFICATE} says what differs"


def _again(directory: Path, certificate: Mapping[str, Any]) -> str:
    """The command that converts the same checkpoint again, and verifies it."""
    checkpoint = _table(certificate, "source").get("path")
    words = ["ghostvis", "convert", quote(str(checkpoint)) if checkpoint else "CHECKPOINT"]
    for option in ("dtype", "layout"):
        if value := certificate.get(option):
            words += [f"--{option}", quote(str(value))]
    for name, value in _table(certificate, "constants").items():
        words += ["--set", quote(f"model.{name}={value}")]
    return " ".join([*words, "--force", "--out", quote(str(directory))])


def _table(certificate: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of the certificate, empty where it is none: the file may have been edited."""
    found = certificate.get(name)
    return found if isinstance(found, dict) else {}
