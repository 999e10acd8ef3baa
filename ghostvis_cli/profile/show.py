"""A resolved profile as YAML and as a record, and the commented file that `profile init` begins with.

What is printed is a profile again: read back, it resolves to the same values.
"""

from typing import Any

from ghostvis_cli.profile.resolve import Resolved
from ghostvis_cli.profile.secrets import redact
from ghostvis_cli.profile.settings import SECTIONS, Key, Profile, keys

ORIGIN_COLUMN = 44
WIDE = 10**9  # never fold
SCHEMA_FILE = "profile.schema.json"


def as_yaml(resolved: Resolved, *, origin: bool = False) -> str:
    """Every setting in the order of the dataclasses, with `# where it came from` behind it if asked."""
    lines = [f"description: {scalar(resolved.profile.description)}"]
    for path, key in keys().items():
        section, dot, _ = path.rpartition(".")
        if dot and f"{section}:" not in lines:
            lines.append(f"{section}:")
        line = f"{'  ' * len(dot)}{key.name}: {scalar(value_of(resolved.profile, key))}"
        lines.append(f"{line.ljust(ORIGIN_COLUMN)}  # {resolved.origins[path]}" if origin else line)
    return "\n".join(lines) + "\n"


def as_record(resolved: Resolved) -> dict[str, Any]:
    """For --json: settings as nested objects, origins by dotted key."""
    settings: dict[str, Any] = {section: {} for section in SECTIONS}
    for path, key in keys().items():
        section, _, name = path.rpartition(".")
        (settings[section] if section else settings)[name] = _shown(value_of(resolved.profile, key))
    return {
        "name": resolved.profile.name,
        "description": redact(resolved.profile.description),
        "settings": settings,
        "origins": {path: str(resolved.origins[path]) for path in keys()},
        "files": [str(path) for path in resolved.files],
    }


def value_of(profile: Profile, key: Key) -> Any:
    section, _, name = key.path.rpartition(".")
    return getattr(getattr(profile, section) if section else profile, name)


def scalar(value: object) -> str:
    """The value on one line of YAML."""
    import yaml

    from ghostvis_cli.profile.yaml12 import Dumper

    if isinstance(value, tuple):
        return "[" + ", ".join(_quoted(redact(each)) for each in value) + "]"
    if isinstance(value, str) and value.splitlines() != [value]:
        return _quoted(redact(value))
    dumped: str = yaml.dump(_shown(value), Dumper=Dumper, allow_unicode=True, width=WIDE)
    return dumped.removesuffix("...\n").rstrip("\n")


def _quoted(text: str) -> str:
    import yaml

    from ghostvis_cli.profile.yaml12 import Dumper

    dumped: str = yaml.dump(text, Dumper=Dumper, default_style='"', allow_unicode=True, width=WIDE)
    return dumped.rstrip("\n")


def _shown(value: object) -> object:
    if isinstance(value, tuple):
        return [_shown(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def starter(
    name: str, *, extends: str | None = None, project: bool = False, schema: str | None = None
) -> str:
    """A profile with every setting in a comment, at its default. With `project`, a whole ghostvis.yaml."""
    lines = [f"# yaml-language-server: $schema={schema}"] if schema else []
    lines += [
        f"# Chosen with --profile {name}, or GHOSTVIS_PROFILE={name} in the environment.",
        f"# What it comes to, and where each value is from: ghostvis profile show {name} --origin",
        "# Take the # off what you want to change, and off its section; the values here are the defaults.",
    ]
    body = [
        f"extends: {extends}" if extends else "# extends: default  # inherit from another profile",
        *_commented(),
    ]
    own = [f"description: My settings, {name}", *body]
    if not project:
        return "\n".join([*lines, *own]) + "\n"
    return "\n".join([*lines, "profiles:", f"  {name}:", *(f"    {line}" for line in own)]) + "\n"


def _commented() -> list[str]:
    lines: list[str] = []
    for path, key in keys().items():
        section, dot, _ = path.rpartition(".")
        if dot and f"# {section}:" not in lines:
            lines.append(f"# {section}:")
        indent = "  " * len(dot)
        about = key.about + (f" ({', '.join(key.choices)})" if key.choices else "")
        lines.append(f"# {indent}{key.name}: {scalar(key.default)}  # {about}")
    return lines
