"""Secrets: which names are refused in a profile, where a key is read from, what is never shown."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ghostvis_cli.encoding import decode
from ghostvis_cli.errors import InputError, UsageError
from ghostvis_cli.profile.settings import EngineSettings

DEFAULT_VARIABLE = "GHOSTVIS_API_KEY"
LARGEST_KEY_BYTES = 16_384
USE_INSTEAD = "a secret may not stand here; name its place with engine.api_key_env or engine.api_key_file"

_NAMES = re.compile(r"api_?key|passw|passphrase|secret|credential|authorization|bearer|(?<!max_)token$")
_SHOWN = (
    (re.compile(r"//[^/\s@]*@"), "//***@"),
    (re.compile(r"\b(bearer|basic)\s+\S+", re.IGNORECASE), r"\1 ***"),
    (re.compile(r"\b(api_?key|access_token|token|password|secret)=[^&\s]+", re.IGNORECASE), r"\1=***"),
    (re.compile(r"\b(sk|pk|hf|gsk|ghp|xai)[-_][A-Za-z0-9_-]{8,}"), r"\1-***"),
)


def is_secret_name(name: str) -> bool:
    """True for `api_key`, `hf_token`, `Password`; false for `max_token`, which is a slip of max_tokens."""
    return _NAMES.search(name.lower().replace("-", "_")) is not None


def redact(text: str) -> str:
    """The text with what looks like a secret taken out: for messages, logs and `profile show`."""
    for pattern, shown in _SHOWN:
        text = pattern.sub(shown, text)
    return text


def read_api_key(engine: EngineSettings, env: Mapping[str, str] = os.environ) -> str | None:
    """The server's key from where the profile says, else from GHOSTVIS_API_KEY, else None."""
    if engine.api_key_file is not None:
        return _checked(_read(Path(engine.api_key_file)), f"the file {engine.api_key_file}")
    variable = engine.api_key_env or DEFAULT_VARIABLE
    found = env.get(variable, "")
    if engine.api_key_env is None and not found:
        return None
    return _checked(found, f"the environment variable {variable}")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return decode(file.read(LARGEST_KEY_BYTES), f"the key file {path}")
    except InputError as error:
        raise UsageError(error.message) from None
    except OSError as error:
        raise UsageError(f"the key file {path} can't be read: {error.strerror}") from error


def _checked(key: str, where: str) -> str:
    key = key.strip()
    if not key:
        raise UsageError(f"{where} holds no key", hint="set it, or take api_key_env and api_key_file out")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UsageError(f"{where} holds more than one key: spaces or characters no header may carry")
    return key
