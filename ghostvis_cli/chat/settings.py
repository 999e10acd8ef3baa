"""/set and /show: the profile's sampling keys, read by the profile package's own rules."""

from dataclasses import fields
from typing import Any

from ghostvis_cli.errors import UsageError
from ghostvis_cli.sampling import Sampling

NOT_FOR_CHAT = ("logprobs",)  # there is nowhere to show them


def settable() -> list[str]:
    """The names that /set takes."""
    return [each.name for each in fields(Sampling) if each.name not in NOT_FOR_CHAT]


def changes(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Names with their new values; UsageError for the first that is unknown or out of range."""
    from ghostvis_cli.profile.settings import keys
    from ghostvis_cli.profile.values import from_text, nearest, shown

    found: dict[str, Any] = {}
    for typed, text in pairs:
        name = typed.removeprefix("sampling.").replace("-", "_")
        if name not in settable():
            raise UsageError(
                f"there is no setting {shown(typed)}{nearest(name, settable())}",
                hint=f"there are: {', '.join(settable())}",
            )
        try:
            found[name] = from_text(keys()[f"sampling.{name}"], text)
        except UsageError as error:
            raise UsageError(f"{name} {error.message}", hint=error.hint) from error
    return found


def plain(value: object) -> str:
    """A value as /set takes it back."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        from json import dumps

        return dumps(list(value), ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
