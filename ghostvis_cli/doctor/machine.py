"""The machine and what is installed on it: Python, packages, torch and its devices, memory, directories."""

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ghostvis_cli import __version__
from ghostvis_cli.doctor.finding import Finding, Status
from ghostvis_cli.paths import PLACES, Kind, cache_dir, directory, variable

if TYPE_CHECKING:
    from ghostvis_cli.profile import EngineSettings

DISTRIBUTION = "ghostvis-cli"
INSTALL_LOCAL = "pip install 'ghostvis-cli[local]'"
EXTRAS = {"local": "the local engine", "serve": "ghostvis serve", "sglang": "SGLang in this process"}
GIB = 2**30


def python() -> Iterator[Finding]:
    where = "a virtual environment" if sys.prefix != sys.base_prefix else sys.prefix
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "version", "ok", f"{platform.python_version()} on {system}, in {where}")
    yield Finding("python", "ghostvis", "ok", __version__)


# --- packages


@dataclass(frozen=True)
class Requirement:
    """One line of our own metadata: `torch>=2.6; extra == "local"`."""

    name: str
    bounds: tuple[tuple[str, str], ...]  # (">=", "2.6")
    extra: str | None

    @classmethod
    def parse(cls, line: str) -> "Requirement":
        wanted, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", wanted)
        extra = re.search(r"""extra\s*==\s*["'](\w+)["']""", marker)
        assert name is not None, f"{line!r} names no package"
        bounds = tuple(re.findall(r"(>=|<=|==|<|>)\s*([\w.]+)", wanted))
        return cls(name[0], bounds, extra[1] if extra else None)

    def admits(self, version: str) -> bool:
        """Compares release numbers only: 2.6.0rc1 and 2.6.0+cpu count as 2.6.0."""
        found = _release(version)
        compare = {
            ">=": found.__ge__, "<=": found.__le__, "==": found.__eq__, "<": found.__lt__, ">": found.__gt__
        }  # fmt: skip
        return all(compare[operator](_release(bound)) for operator, bound in self.bounds)

    def __str__(self) -> str:
        return self.name + ",".join(f"{operator}{bound}" for operator, bound in self.bounds)


def _release(version: str) -> tuple[int, ...]:
    """2.11.0+cpu -> (2, 11): zeros at the end mean nothing."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def packages(needed: str | None) -> Iterator[Finding]:
    """Ours by our own metadata, without importing any. `needed` is the extra that the profile's engine wants."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        fix = f"pip install {DISTRIBUTION}"
        yield Finding("packages", "core", "note", "ghostvis runs from a folder that is not installed", fix)
        return
    requirements = [Requirement.parse(line) for line in lines]
    yield _group("core", [each for each in requirements if each.extra is None], "error", DISTRIBUTION)
    for extra, purpose in EXTRAS.items():
        group = [each for each in requirements if each.extra == extra]
        if group:
            status: Status = "error" if extra == needed else "note"
            yield _group(extra, group, status, f"'{DISTRIBUTION}[{extra}]'", purpose)


def _group(
    name: str, group: list[Requirement], status: Status, install: str, purpose: str = "every command"
) -> Finding:
    installed = {each.name: installed_version(each.name) for each in group}
    lacking = [str(each) for each in group if installed[each.name] is None]
    wrong = [
        f"{each.name} {version}, not {each}"
        for each in group
        if (version := installed[each.name]) is not None and not each.admits(version)
    ]
    if not lacking and not wrong:
        shown = ", ".join(f"{package} {version}" for package, version in installed.items())
        return Finding("packages", name, "ok", shown)
    faults = ([f"missing: {', '.join(lacking)}"] if lacking else []) + wrong
    if wrong and status == "note":
        status = "warning"  # not installed is a choice, the wrong version is a trap
    return Finding("packages", name, status, f"{'; '.join(faults)} (for {purpose})", f"pip install {install}")


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
        message = "not installed" + (
            ", and the local engine needs it" if wanted else ": no local engine here"
        )
        yield Finding("torch", "version", "error" if wanted else "note", message, INSTALL_LOCAL)
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
        name = torch.cuda.get_device_name(index)
        message = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield Finding("torch", f"cuda:{index}", "ok", message)
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


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    available_bytes: int


def memory() -> Iterator[Finding]:
    found = read_memory()
    if found is None:
        yield Finding("memory", "ram", "note", "this system does not tell how much memory there is")
        return
    free, total = found.available_bytes / GIB, found.total_bytes / GIB
    yield Finding("memory", "ram", "ok", f"{free:.1f} of {total:.1f} GiB available")


def read_memory() -> Memory | None:
    """What this process may still take: the machine's, or its container's where that is less."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
        }
        machine = Memory(sizes["MemTotal"], sizes["MemAvailable"])
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # ValueError where it is "max"
        used = int((group / "memory.current").read_text()) - _reclaimable(group / "memory.stat")
    except (OSError, ValueError):
        return machine
    return Memory(min(machine.total_bytes, limit), max(0, min(machine.available_bytes, limit - used)))


def _reclaimable(stat: Path) -> int:
    """Files that the kernel keeps in memory while nobody else wants it: they count as used, and are not."""
    rows = (line.split() for line in stat.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == "inactive_file"), 0)


# --- directories


def directories(env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    if not env.get("HOME"):
        yield Finding("directories", "home", "note", "HOME is not set", "export HOME=DIR")
    for kind in PLACES:
        yield _directory(kind, directory(kind, env))
    if cache_dir(env) is not None:
        yield from _converted()


def _converted() -> Iterator[Finding]:
    """Nothing in the cache is removed by itself: its size must be seen somewhere."""
    from ghostvis_cli.convert import cache

    if size_bytes := cache.size_bytes():
        message = f"{size_bytes / 1e9:.2f} GB of models converted for SGLang in {cache.default_base()}"
        yield Finding(
            "directories", "converted", "note", message, f"rm -r {cache.default_base()}, to have it back"
        )


def _directory(name: Kind, place: Path | None) -> Finding:
    fix = f"export {variable(name)}=DIR"
    if place is None:
        return Finding("directories", name, "note", "there is none without a home directory", fix)
    try:
        nearest = next(parent for parent in (place, *place.parents) if parent.exists())
    except OSError as error:
        return Finding("directories", name, "warning", f"{place} can't be reached: {error.strerror}", fix)
    if not nearest.is_dir():
        return Finding("directories", name, "warning", f"{nearest} is not a directory", fix)
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Finding("directories", name, "warning", f"{place} can't be written", fix)
    return Finding(
        "directories", name, "ok", f"{place}" + ("" if nearest == place else " (made when needed)")
    )
