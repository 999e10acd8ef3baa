"""The machine and what is installed on it: Python, packages, torch and its devices, memory, directories."""

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ghostvis_cli import sizes
from ghostvis_cli.doctor.finding import Finding, Status
from ghostvis_cli.machine import GIB, read_memory
from ghostvis_cli.paths import PLACES, Kind, cache_dir, directory, variable
from ghostvis_cli.version import __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from ghostvis_cli.profile import EngineSettings

DISTRIBUTION = "ghostvis-cli"
INSTALL_LOCAL = "pip install 'ghostvis-cli[local]'"
EXTRAS = {"local": "the local engine", "serve": "ghostvis serve", "sglang": "SGLang in this process"}


def python() -> Iterator[Finding]:
    where = "a virtual environment" if sys.prefix != sys.base_prefix else sys.prefix
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "version", "ok", f"{platform.python_version()} on {system}, in {where}")
    yield Finding("python", "ghostvis", "ok", __version__)


# --- packages


def packages(needed: str | None) -> Iterator[Finding]:
    """Ours by our own metadata, without importing any. `needed` is the extra that the profile's engine wants."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        fix = f"pip install {DISTRIBUTION}"
        yield Finding("packages", "core", "note", "ghostvis runs from a folder that is not installed", fix)
        return
    yield from of_extra(lines, "", "error", DISTRIBUTION, "every command")
    for extra, purpose in EXTRAS.items():
        status: Status = "error" if extra == needed else "note"
        yield from of_extra(lines, extra, status, f"'{DISTRIBUTION}[{extra}]'", purpose)


def of_extra(
    lines: Sequence[str], extra: str, status: Status, install: str, purpose: str
) -> Iterator[Finding]:
    """What an extra of ours brings ("" is the core): whether it is here, and is for this machine at all."""
    from packaging.requirements import Requirement

    group = [each for each in map(Requirement, lines) if _extra(each) == extra]
    here = [each for each in group if each.marker is None or each.marker.evaluate({"extra": extra})]
    if here:
        yield _group(extra or "core", here, status, install, purpose)
    for each in group:
        if each not in here:
            message = f"{each.name} is not for {platform.system()} on {platform.machine()} (for {purpose})"
            fix = "--base-url URL of a machine it is for"
            yield Finding("packages", extra or "core", status, message, fix)


def _extra(requirement: "Requirement") -> str:
    """The extra that it belongs to, read from its marker; "" where it is of the core."""
    found = re.search(r'extra == "([\w.-]+)"', str(requirement.marker or ""))
    return found[1] if found else ""


def admits(requirement: "Requirement", version: str) -> bool:
    """2.6.0rc1, 2.6.0a0+nv24 and 2.6.0+cpu count as the release 2.6.0, which builds of vendors are."""
    from packaging.version import InvalidVersion, Version

    try:
        return requirement.specifier.contains(Version(version).base_version, prereleases=True)
    except InvalidVersion:
        return False


def _group(name: str, group: "list[Requirement]", status: Status, install: str, purpose: str) -> Finding:
    installed = {each.name: installed_version(each.name) for each in group}
    lacking = [_wanted(each) for each in group if installed[each.name] is None]
    wrong = [
        f"{each.name} {version}, not {_wanted(each)}"
        for each in group
        if (version := installed[each.name]) is not None and not admits(each, version)
    ]
    if not lacking and not wrong:
        shown = ", ".join(f"{package} {version}" for package, version in installed.items())
        return Finding("packages", name, "ok", shown)
    faults = ([f"missing: {', '.join(lacking)}"] if lacking else []) + wrong
    if wrong and status == "note":
        status = "warning"  # not installed is a choice, the wrong version is a trap
    return Finding("packages", name, status, f"{'; '.join(faults)} (for {purpose})", f"pip install {install}")


def _wanted(requirement: "Requirement") -> str:
    return f"{requirement.name}{requirement.specifier}"


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- torch


def torch_and_devices(engine: "EngineSettings | None") -> Iterator[Finding]:
    """Imported, which takes a second or more, only where this profile's engine will do so too."""
    wanted = engine is not None and engine.chosen_kind == "local"
    try:
        version = metadata.version("torch")
        if wanted:
            import_module("torch")
    except (metadata.PackageNotFoundError, ModuleNotFoundError):
        lacks = ", and the local engine needs it" if wanted else ": no local engine here"
        status: Status = "error" if wanted else "note"
        yield Finding("torch", "version", status, f"not installed{lacks}", INSTALL_LOCAL)
        return
    except (ImportError, OSError) as error:  # a library of another CUDA, a broken download
        fix = f"pip install --force-reinstall torch=={version}"
        yield Finding("torch", "version", "error", f"{version} can't be imported: {error}", fix)
        return
    yield Finding("torch", "version", "ok", version)
    if engine is not None and wanted:
        yield from _devices()
        yield _chosen_device(engine.device)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("torch", "cpu", "ok", f"{torch.get_num_threads()} threads on {os.cpu_count()} cores")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        room = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield Finding("torch", f"cuda:{index}", "ok", f"{torch.cuda.get_device_name(index)}, {room}")
    if torch.version.cuda and not torch.cuda.is_available():
        message = f"torch is built for CUDA {torch.version.cuda}, and there is no usable GPU"
        yield Finding("torch", "cuda", "note", message, "nvidia-smi, to see driver and GPU")
    if torch.backends.mps.is_available():
        yield Finding("torch", "mps", "ok", "Apple's GPU")


def _chosen_device(wanted: str) -> Finding:
    from ghostvis_cli.engines.local.engine import choose_device
    from ghostvis_cli.errors import GhostvisError

    try:
        device = choose_device(wanted)
    except GhostvisError as error:
        return Finding("torch", "device", "error", error.message, error.hint or "--device auto")
    return Finding("torch", "device", "ok", f"{wanted} is {device}" if wanted == "auto" else str(device))


# --- memory


def memory() -> Iterator[Finding]:
    found = read_memory()
    if found is None:
        yield Finding("memory", "ram", "note", "this system does not tell how much memory there is")
        return
    free, total = found.available_bytes / GIB, found.total_bytes / GIB
    yield Finding("memory", "ram", "ok", f"{free:.1f} of {total:.1f} GiB available")


# --- directories


def directories(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    if not env.get("HOME"):
        yield Finding("directories", "home", "note", "HOME is not set", "export HOME=DIR")
    for kind in PLACES:
        yield _directory(kind, directory(kind, env))
    if cache_dir(env) is not None:
        yield from _converted()


def _converted() -> Iterator[Finding]:
    """The cache's size: nothing in it is removed automatically."""
    from ghostvis_cli.convert import cache

    if size_bytes := cache.size_bytes():
        base = cache.default_base()
        message = f"{sizes.shown(size_bytes)} of models converted for SGLang in {base}"
        yield Finding("directories", "converted", "note", message, f"rm -r {base}, to have it back")


def _directory(name: Kind, place: Path | None) -> Finding:
    fix = f"export {variable(name)}=DIR"
    if place is None:
        return Finding("directories", name, "note", "there is none without a home directory", fix)
    try:
        nearest = next(parent for parent in (place, *place.parents) if parent.exists())
        if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
            made = "" if nearest == place else " (made when needed)"
            return Finding("directories", name, "ok", f"{place}{made}")
        fault = f"{place} can't be written" if nearest.is_dir() else f"{nearest} is not a directory"
    except OSError as error:
        fault = f"{place} can't be reached: {error.strerror}"
    return Finding("directories", name, "warning", fault, fix)
