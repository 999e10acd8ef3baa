"""What every row of a run depends on: settings and model. Kept beside the output, so that a resumed run can tell.

The file is for people too: when a run is refused, the message names the values that differ.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ghostvis_cli import files
from ghostvis_cli.batch.rows import RunSettings, plain_fields
from ghostvis_cli.checkpoint.fingerprint import fingerprint
from ghostvis_cli.engines.base import EngineInfo
from ghostvis_cli.errors import UsageError
from ghostvis_cli.version import SCHEMA_VERSION, __version__


@dataclass(frozen=True)
class Manifest:
    """`settings` and `model` must agree for a run to go on; `about` is for people."""

    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    about: Mapping[str, Any]

    @classmethod
    def of(cls, settings: RunSettings, info: EngineInfo) -> "Manifest":
        about = {"model_path": info.model, "device": info.device, "ghostvis": __version__}
        return cls(plain_settings(settings), model_identity(info), about)

    @cached_property
    def run_hash(self) -> bytes:
        return hashlib.sha256(_dump({"settings": self.settings, "model": self.model}).encode()).digest()

    def row_hash(self, digest: bytes) -> str:
        """One hash of row, model and sampling, from the row's own digest."""
        return hashlib.sha256(self.run_hash + digest).hexdigest()

    def write(self, path: Path) -> None:
        """OutputError where that can't be done."""
        content = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, ensure_ascii=False, indent=2)
        try:
            files.write(path, (content + "\n").encode())
        except OSError as error:
            raise files.cannot_write(path, error) from error

    @classmethod
    def read(cls, path: Path) -> "Manifest | None":
        """None where there is none."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("schema_version") != SCHEMA_VERSION:
                raise UsageError(f"{path} is of another version of ghostvis", hint="--output OTHER.jsonl")
            return cls(**found)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged", hint="--output OTHER.jsonl") from error


def plain_settings(settings: RunSettings) -> dict[str, Any]:
    """The settings as they come back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(plain_fields(settings), default=plain_fields))
    return plain


def differences(was: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """ "sampling.temperature was 0.7 and is 0", value by value."""
    for name in sorted({*was, *now}):
        before, after = was.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{path}{name}.")
        elif before != after:
            yield f"{path}{name} was {_dump(before)} and is {_dump(after)}"


def model_identity(info: EngineInfo) -> dict[str, Any]:
    """What decides a model's answers. For a local one its content, wherever it lies; for a server what it says."""
    same: dict[str, Any] = {"engine": info.kind, "layout": info.layout, "dtype": info.dtype}
    if info.checkpoint is not None:
        if chosen := info.checkpoint.constants.chosen:
            same["constants"] = dict(chosen)  # beside the hash, which can't say what differs
        return {**same, "checkpoint": fingerprint(info.checkpoint)}
    return {**same, "name": info.model, "source": info.source, "tag": info.tag, "step": info.step}


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
