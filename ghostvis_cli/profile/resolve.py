"""flag > GHOSTVIS_* environment > profile > default: one value for every setting, and where it came from.

Layers are merged key by key; a profile's ancestors are layers below it. Every fault of every layer is
reported at once.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ghostvis_cli.addresses import is_this_machine
from ghostvis_cli.errors import UsageError
from ghostvis_cli.profile.document import Fault, refuse
from ghostvis_cli.profile.files import PLACES, Library, Origin, Stored, UnreadableError, Value, unknown
from ghostvis_cli.profile.secrets import DEFAULT_VARIABLE
from ghostvis_cli.profile.settings import ENVIRONMENT, SECTIONS, Key, Profile, keys, section_class
from ghostvis_cli.profile.values import from_python, from_text, nearest, shown

T = TypeVar("T")
DEFAULT = "default"
NOTHING: Mapping[str, object] = {}
# Variables that are no settings.
VARIABLES = (
    "GHOSTVIS_PROFILE",
    DEFAULT_VARIABLE,
    "GHOSTVIS_CONFIG_DIR",
    "GHOSTVIS_STATE_DIR",
    "GHOSTVIS_CACHE_DIR",
    # of `ghostvis chat --web`, `ghostvis serve` and the plug-in
    "GHOSTVIS_WEB_KEY",
    "GHOSTVIS_ADMIN_API_KEY",
    "GHOSTVIS_ALLOWED_IMAGE_HOSTS",
    "GHOSTVIS_NUMERICS",
    "GHOSTVIS_PICTURE_CACHE_MB",
    "GHOSTVIS_VISION_GRAPHS",
)

# A choice replaces what lower layers chose in its stead: `--source rl` must not lose to a profile's file.
REPLACES: Mapping[str, tuple[str, ...]] = {
    "model.checkpoint_path": ("model.hf", "model.source", "model.model_tag", "model.step"),
    "model.hf": ("model.checkpoint_path", "model.source", "model.model_tag", "model.step"),
    "model.base_dir": ("model.hf",),
    "model.source": ("model.checkpoint_path",),
    "model.model_tag": ("model.checkpoint_path",),
    "engine.api_key_env": ("engine.api_key_file",),
    "engine.api_key_file": ("engine.api_key_env",),
    "engine.base_url": ("engine.kind",),  # back to auto, which is remote then
}
# What answers is a server, or a checkpoint that is run here.
CHECKPOINT = (
    *("model.source", "model.model_tag", "model.step", "model.checkpoint_path", "model.base_dir", "model.hf"),
)

Layer = Mapping[str, Value]


@dataclass(frozen=True)
class Resolved:
    """What a run is set to. `origins` has every key; `files` were read, the chosen profile's first."""

    profile: Profile
    origins: Mapping[str, Origin]
    files: tuple[Path, ...] = ()
    notices: tuple[str, ...] = ()

    def chose(self, *paths: str) -> bool:
        """True if one of these settings was given anywhere, be it with the value of its default."""
        return any(self.origins[path].place != "default" for path in paths)


def resolve(
    name: str | None = None,
    *,
    flags: Mapping[str, object] = NOTHING,
    sets: Sequence[str] = (),
    defaults: Mapping[str, object] = NOTHING,
    several: bool = False,
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
) -> Resolved:
    """The settings of a run, or one UsageError with every fault.

    name      profile; None is GHOSTVIS_PROFILE, else `default`
    flags     dotted key -> value; None means the flag was not given
    sets      `sampling.temperature=0.2`, the last of a key counts; a flag of its own beats --set
    defaults  dotted key -> value: a command's own, such as chat's longer answers
    several   engines will be used: a checkpoint that is typed takes no server's place
    """
    library = Library(env, cwd)
    named = name or env.get("GHOSTVIS_PROFILE") or None
    faults: list[Fault] = []
    chain = ancestry(library, choose(library, named, from_variable=not name), faults)
    variables = _environment(env, faults)
    typed = {**_sets(sets, faults), **_flags(flags, faults)}
    refuse(faults)
    layers = [_defaults(defaults), *(stored.values for stored in reversed(chain)), variables, typed]
    decided: list[str] = []
    merged = merge(layers if several else _decided(layers, decided))
    resolved = Resolved(
        build(chain[0], merged),
        {path: value.origin for path, value in merged.items()},
        tuple(dict.fromkeys(stored.path for stored in chain if stored.place != "built-in")),
    )
    notices = [*library.notices, *decided, *_unknown_variables(env, resolved), *_key_leaves(env, resolved)]
    return replace(resolved, notices=tuple(dict.fromkeys(notices)))


def merge(layers: Sequence[Layer]) -> dict[str, Value]:
    """One value for each key, the last layer's where several have one."""
    merged = {path: Value(key.default, Origin("default", "default")) for path, key in keys().items()}
    default = dict(merged)
    for layer in layers:
        for path, (value, origin) in layer.items():
            rivals = REPLACES.get(path, ()) if value is not None and origin.place != "default" else ()
            merged.update({rival: default[rival] for rival in rivals if rival not in layer})
            merged[path] = Value(value, origin)
    return merged


def _decided(layers: Sequence[Layer], notices: list[str]) -> list[Layer]:
    """The layers without what the last one, the typed, replaces: --source beats a server, --base-url a checkpoint.

    What it replaces is told. A variable replaces nothing so: it may be there for other commands.
    """
    rivals = _rivals(layers[-1])  # the path that loses -> what it loses to
    kept: list[Layer] = []
    for layer in layers[:-1]:
        lost = [path for path in layer if path in rivals and _counts(path, layer[path].value)]
        notices += [
            f"{spelled(path, layer[path].origin)} is not used: {rivals[path]} decides" for path in lost
        ]
        kept.append({path: value for path, value in layer.items() if path not in lost})
    return [*kept, layers[-1]]


def _counts(path: str, value: object) -> bool:
    """Of engine.kind only `remote` is a choice against a checkpoint that is run here."""
    return value == "remote" if path == "engine.kind" else value is not None


def _rivals(typed: Layer) -> dict[str, str]:
    """What lower layers can't choose any more, and why. Nothing where a server and a checkpoint are both typed."""
    chosen = [path for path, value in typed.items() if value.value not in (None, "auto")]
    kind = typed["engine.kind"].value if "engine.kind" in typed else None
    server = [
        path for path in chosen if path == "engine.base_url" or (path, kind) == ("engine.kind", "remote")
    ]
    here = [path for path in chosen if path in CHECKPOINT or (path == "engine.kind" and kind != "remote")]
    losers: tuple[str, ...] = ()
    if server and not here:
        losers = CHECKPOINT
    elif here and not server:
        losers = tuple(path for path in ("engine.base_url", "engine.kind") if path not in typed)
    return {path: spelled(each, typed[each].origin) for path in losers for each in (server or here)[:1]}


def spelled(path: str, origin: Origin) -> str:
    """A setting as its user knows it: --source, --set engine.threads, GHOSTVIS_STEP, system (ghostvis.yaml:3)."""
    match origin.place:
        case "flag":
            option = origin.text.removeprefix("flag ")
            return f"{option} {path}" if option == "--set" else option
        case "environment":
            return keys()[path].variable
        case _:
            return f"{path} ({origin})"


def choose(library: Library, named: str | None, *, from_variable: bool = False) -> Stored:
    """The profile of that name, or the default one. Only a profile asked for by name must be readable."""
    for place in PLACES:
        try:
            found = library.find(named or DEFAULT, (place,))
            if place == "project":
                refuse(library.project_faults())  # a file that can't be made out may hold any profile
        except UnreadableError as error:
            if named:
                raise
            library.notices.append(f"{error.message}, so it is passed over")
            continue
        if found is not None:
            return found
    known = library.names()
    reasons = [", which GHOSTVIS_PROFILE names"] if from_variable else []
    reasons += [f"; {notice}" for notice in dict.fromkeys(library.notices)]
    raise UsageError(
        f"there is no profile {shown(str(named))}{''.join(reasons)}{nearest(str(named), known)}",
        hint=f"there are: {', '.join(known)}",
    )


def ancestry(library: Library, first: Stored, faults: list[Fault]) -> list[Stored]:
    """The profile and what it extends, nearest first. Adds what is wrong with any to `faults`."""
    chain = [first]
    faults += first.faults
    while (parent := _parent(library, chain, faults)) is not None:
        chain.append(parent)
        faults += parent.faults
    return chain


def _parent(library: Library, chain: list[Stored], faults: list[Fault]) -> Stored | None:
    """From the child's own place or a lower one: a project's file can't change what a user's profile means.

    A profile may extend its own name, which is then the one it hides.
    """
    child = chain[-1]
    if child.extends is None:
        return None
    places = PLACES[PLACES.index(child.place) + (child.extends == child.name) :]
    key = f"{child.prefix}extends"
    try:
        parent = library.find(child.extends, places)
    except UnreadableError as error:
        faults.append(Fault(child.shown, key, error.message, child.extends_line))
        return None
    if parent is None:
        known = [name for name in library.names(places) if name != child.name]
        reason = f"no profile {shown(child.extends)}{nearest(child.extends, known)}"
        faults.append(Fault(child.shown, key, reason, child.extends_line))
    elif any((parent.place, parent.name) == (each.place, each.name) for each in chain):
        ring = " -> ".join([*(each.name for each in chain), parent.name])
        faults.append(Fault(child.shown, key, f"goes round in a circle: {ring}", child.extends_line))
        return None
    return parent


def build(stored: Stored, merged: Layer) -> Profile:
    """The profile of one value for each key; UsageError where values contradict each other."""
    values = {path: value.value for path, value in merged.items()}
    sections: dict[str, Any] = {}
    for section in SECTIONS:
        own = {key.name: values[path] for path, key in keys().items() if path.startswith(section + ".")}
        try:
            sections[section] = section_class(section)(**own)
        except UsageError as error:
            named = [merged[f"{section}.{name}"].origin.text for name in own if name in error.message.split()]
            raise UsageError(f"{' and '.join(dict.fromkeys(named))}: {section}: {error.message}") from error
    system = values["system"]
    return Profile(
        stored.name, stored.description, **sections, system=system if isinstance(system, str) else None
    )


def _defaults(defaults: Mapping[str, object]) -> Layer:
    origin = Origin("default", "default")
    return {path: Value(from_python(keys()[path], value), origin) for path, value in defaults.items()}


def _environment(env: Mapping[str, str], faults: list[Fault]) -> Layer:
    """An empty variable counts as not set."""
    layer: dict[str, Value] = {}
    for key in keys().values():
        if text := env.get(key.variable):
            _add(layer, key, from_text, text, Origin("environment", f"environment {key.variable}"), faults)
    return layer


def _sets(sets: Sequence[str], faults: list[Fault]) -> Layer:
    layer: dict[str, Value] = {}
    where = Origin("flag", "flag --set")
    for each in sets:
        path, equals, text = each.partition("=")
        path = path.strip()
        if not equals:
            faults.append(Fault(where.text, "", f"{shown(each)} is not KEY=VALUE"))
        elif path in SECTIONS:
            example = next(known for known in keys() if known.startswith(path + "."))
            faults.append(Fault(where.text, path, f"is a section; set one of its keys, such as {example}"))
        elif path not in keys():
            faults.append(Fault(where.text, path, unknown(path)))
        else:
            _add(layer, keys()[path], from_text, text, where, faults)
    return layer


def _flags(flags: Mapping[str, object], faults: list[Fault]) -> Layer:
    layer: dict[str, Value] = {}
    for path, value in flags.items():
        if value is not None:
            key = keys()[path]
            _add(layer, key, from_python, value, Origin("flag", f"flag {key.flag}"), faults)
    return layer


def _add(
    layer: dict[str, Value],
    key: Key,
    read: Callable[[Key, T], object],
    given: T,
    origin: Origin,
    faults: list[Fault],
) -> None:
    try:
        layer[key.path] = Value(read(key, given), origin)
    except UsageError as error:
        faults.append(Fault(origin.text, key.path, error.message))


def _unknown_variables(env: Mapping[str, str], resolved: Resolved) -> list[str]:
    known = [*(key.variable for key in keys().values()), *VARIABLES]
    named = resolved.profile.engine.api_key_env
    return [
        f"the environment variable {shown(name)} means nothing here{nearest(name, known)}"
        for name in env
        if name.startswith(ENVIRONMENT) and name not in known and name != named
    ]


def _key_leaves(env: Mapping[str, str], resolved: Resolved) -> list[str]:
    """A project's file comes with a repository that others wrote: say where it sends the user's key."""
    engine, origin = resolved.profile.engine, resolved.origins["engine.base_url"]
    has_key = engine.api_key_env or engine.api_key_file or env.get(DEFAULT_VARIABLE)
    if origin.place != "project" or engine.chosen_kind != "remote" or not has_key:
        return []
    host = urlsplit(engine.base_url or "").hostname or ""
    if is_this_machine(host):
        return []
    return [f"the server's key goes to {host}, as {origin} says"]
