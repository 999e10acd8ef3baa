"""Faults of profiles: errors in the profile of this run, warnings in the others."""

import os
from collections.abc import Iterator, Mapping

from ghostvis_cli.doctor.finding import Finding, from_error
from ghostvis_cli.errors import UsageError
from ghostvis_cli.profile import EngineSettings, Resolved

VALIDATE = "ghostvis profile validate"


def profiles(chosen: Resolved | UsageError, env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    from ghostvis_cli.profile.manage import validate

    if isinstance(chosen, UsageError):
        yield from _broken(chosen)
    else:
        yield _chosen(chosen)
        for line in chosen.notices:
            yield Finding("profile", "notice", "warning", line)
    report = validate(env=env)
    told = chosen.message if isinstance(chosen, UsageError) else ""
    for fault in report.faults:
        if str(fault) not in told:
            yield Finding("profile", "others", "warning", str(fault), VALIDATE)
    yield Finding("profile", "found", "ok", f"{len(report.profiles)} profiles read")


def _chosen(chosen: Resolved) -> Finding:
    profile = chosen.profile
    where = f" from {', '.join(map(str, chosen.files))}" if chosen.files else ""
    engine = profile.engine
    target = f" at {engine.base_url}" if engine.chosen_kind == "remote" else ""
    return Finding("profile", "chosen", "ok", f"{profile.name}{where}: engine {engine.chosen_kind}{target}")


def _broken(error: UsageError) -> Iterator[Finding]:
    """One line for each fault; the first of several only counts them."""
    first, *rest = error.message.splitlines()
    for line in map(str.strip, rest or [first]):
        elsewhere = line.startswith(("flag ", "environment "))  # than in a file
        yield Finding("profile", "chosen", "error", line, error.hint or (None if elsewhere else VALIDATE))
    message = "what follows is checked with the defaults, and no model is run"
    yield Finding("profile", "chosen", "note", message)


def key(engine: EngineSettings) -> Finding:
    """Where the server's key comes from, never the key."""
    from ghostvis_cli.profile.secrets import DEFAULT_VARIABLE, read_api_key

    try:
        if read_api_key(engine) is None:
            return Finding("server", "key", "ok", "none is sent")
    except UsageError as error:
        return from_error("server", "key", error)
    place = engine.api_key_file or f"the environment variable {engine.api_key_env or DEFAULT_VARIABLE}"
    return Finding("server", "key", "ok", f"read from {place}")
