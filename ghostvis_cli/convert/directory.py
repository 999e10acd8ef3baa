"""A converted directory: the names of its files, how one is recognised, what its certificate says of it.

Reads only. How one is written is convert/run.py, how it appears whole convert/staging.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghostvis_cli.checkpoint import safetensors
from ghostvis_cli.checkpoint.formats import CERTIFICATE as CERTIFICATE
from ghostvis_cli.checkpoint.formats import CONFIG as CONFIG
from ghostvis_cli.checkpoint.formats import INDEX as INDEX
from ghostvis_cli.checkpoint.formats import WEIGHTS as WEIGHTS
from ghostvis_cli.convert.hashes import KnownHashes
from ghostvis_cli.errors import ModelError

GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
MADE_BY = "ghostvis convert"


def is_converted(place: Path) -> bool:
    """Whether a directory looks like one that `convert` made."""
    return (place / CONFIG).is_file() and (place / CERTIFICATE).is_file()


def read_json(place: Path, name: str) -> dict[str, Any]:
    """One of the directory's JSON files. ModelError where it can't be read."""
    try:
        return safetensors.read_json(place / name)
    except ModelError as error:
        raise ModelError(error.message, hint="ghostvis convert CHECKPOINT --out DIR") from error


def certificate_of(place: Path) -> dict[str, Any] | None:
    """Source, files and their hashes, as `convert` wrote them; None where that is missing or damaged."""
    try:
        found = read_json(place, CERTIFICATE)
    except ModelError:
        return None
    return found if isinstance(found.get("outputs"), dict) else None


def is_ours(place: Path) -> bool:
    """Whether it is an empty directory, or one with our certificate in it."""
    if not place.is_dir():
        return False
    made_by = (certificate_of(place) or {}).get("made_by")
    return not any(place.iterdir()) or str(made_by).startswith(MADE_BY)


def foreign_names(place: Path) -> list[str]:
    """Names in a directory that `convert` did not write: its certificate lists what it did."""
    if not place.is_dir():
        return []
    ours = {CERTIFICATE, *(certificate_of(place) or {}).get("outputs", ())}
    return sorted(entry.name for entry in place.iterdir() if entry.name not in ours or entry.is_dir())


def changed_files(place: Path, certificate: Mapping[str, Any], known: KnownHashes) -> list[str]:
    """Files that are not what the certificate says, or not there."""
    return [name for name, digest in certificate["outputs"].items() if not _is(place / name, digest, known)]


def _is(path: Path, digest: str, known: KnownHashes) -> bool:
    try:
        return known.of(path) == digest
    except OSError:
        return False


def tag(place: Path) -> str:
    """What to call the model: the tag it was trained under, else the directory's name."""
    source = (certificate_of(place) or {}).get("source") or {}
    return str(source.get("tag") or place.name)


def files_of_tensors(place: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor."""
    return {name: path for name, (path, _) in safetensors.headers(place).items()}
