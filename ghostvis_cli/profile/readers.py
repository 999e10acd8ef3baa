"""Which setting is read by what: an option that the chosen engine would drop is refused instead.

Typed or in the environment and not read is a UsageError; a profile, which may serve several engines, gets a notice.
A value that is the default anyway asks for nothing and is let through.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Literal, TypeAlias

from ghostvis_cli.errors import UsageError
from ghostvis_cli.profile.resolve import Resolved, spelled
from ghostvis_cli.profile.settings import Key, ModelSettings, keys
from ghostvis_cli.profile.show import value_of

Reader: TypeAlias = Literal["local", "sglang", "remote", "local server", "sglang server"]
NAMES: Mapping[Reader, str] = {
    "local": "the local engine",
    "sglang": "SGLang",
    "remote": "a remote engine",
    "local server": "serve with the local engine",
    "sglang server": "serve with SGLang",
}
LOCAL: tuple[Reader, ...] = ("local", "local server")
SGLANG: tuple[Reader, ...] = ("sglang", "sglang server")
REMOTE: tuple[Reader, ...] = ("remote",)
SERVERS: tuple[Reader, ...] = ("local server", "sglang server")
HERE = (*LOCAL, *SGLANG)
ENGINES: tuple[Reader, ...] = ("local", "sglang", "remote")
ALL: tuple[Reader, ...] = (*HERE, *REMOTE)
NOT_SGLANGS_SERVER: tuple[Reader, ...] = (*ENGINES, "local server")

# The settings of each section by who reads them.
_READERS: Mapping[str, Mapping[tuple[Reader, ...], str]] = {
    "engine": {
        ALL: "kind",
        REMOTE: "base_url ca_file model connect_timeout_s timeout_s retries",
        (*REMOTE, *SERVERS): "api_key_env api_key_file",
        HERE: "device dtype",
        LOCAL: "max_batch prefill_tokens prefix_cache_mb graphs compile threads",
        SGLANG: "tensor_parallel_size gpu_memory_utilization data_parallel_size context_length schedule_policy"
        " attention_backend",
    },
    "model": {HERE: " ".join(each.name for each in fields(ModelSettings))},
    "sampling": {
        ALL: "max_tokens temperature top_p top_k min_p repetition_penalty seed",
        # SGLang's server takes these from each request, and has no place for a default.
        NOT_SGLANGS_SERVER: "presence_penalty frequency_penalty json_schema regex stop ignore_eos",
        ENGINES: "logprobs",
    },
    "images": {
        NOT_SGLANGS_SERVER: "max_bytes max_pixels max_aspect timeout_s background allow_private",
        ENGINES: "max_redirects",
    },
}
READ_BY: Mapping[str, tuple[Reader, ...]] = {"system": ENGINES} | {
    f"{section}.{name}": readers
    for section, by_readers in _READERS.items()
    for readers, names in by_readers.items()
    for name in names.split()
}


def heeded(resolved: Resolved, readers: Iterable[Reader], *, option: str = "--engine") -> Resolved:
    """With a notice of what a profile sets in vain; UsageError where that was typed or is in the environment.

    readers  what runs the model: several where several are measured, and one that reads a setting is enough
    option   the one that chooses another engine
    """
    readers = tuple(readers)
    unread = [
        key for key in keys().values() if not set(READ_BY[key.path]) & set(readers) and _asks(resolved, key)
    ]
    by_place = {key.path: resolved.origins[key.path].place for key in unread}
    insisted = [key for key in unread if by_place[key.path] in ("flag", "environment")]
    who = " and ".join(NAMES[reader] for reader in readers)
    verb = "does not read" if len(readers) == 1 else "do not read"
    if insisted:
        named = ", ".join(_named(resolved, insisted))
        raise UsageError(f"{who} {verb} {named}", hint=_hint(resolved, insisted, readers, option))
    if not unread:
        return resolved
    told = f"{who} {verb} {', '.join(_named(resolved, unread))}"
    return replace(resolved, notices=(*resolved.notices, told))


def _named(resolved: Resolved, settings: list[Key]) -> list[str]:
    return [spelled(key.path, resolved.origins[key.path]) for key in settings]


def _asks(resolved: Resolved, key: Key) -> bool:
    """Whether it was set anywhere, and to other than the engine's default."""
    return resolved.chose(key.path) and value_of(resolved.profile, key) != key.default


def _hint(resolved: Resolved, insisted: list[Key], readers: tuple[Reader, ...], option: str) -> str:
    """Another engine that reads all of it, where one choice makes the difference; else what to leave out."""
    named = _named(resolved, insisted)
    flags = [name for name in named if name.startswith("-")]
    variables = [name for name in named if name not in flags]
    ways = [f"leave out {', '.join(flags)}"] if flags else []
    ways += [f"unset {' '.join(variables)}"] if variables else []
    is_server_typed = resolved.origins["engine.base_url"].place == "flag"
    others = [kind for kind in ("local", "sglang") if _would_read(kind, insisted, readers)]
    other = f"; or {option} {others[0]}" if others and not is_server_typed else ""
    return " and ".join(ways) + other


def _would_read(kind: str, insisted: list[Key], readers: tuple[Reader, ...]) -> bool:
    reader = f"{kind} server" if set(readers) & set(SERVERS) else kind
    return all(reader in READ_BY[key.path] for key in insisted)
