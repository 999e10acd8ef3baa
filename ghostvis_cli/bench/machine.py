"""Where a run was made: versions, processor, GPU, driver, and how calm the machine was. Imports no torch."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ghostvis_cli.bench.schema import EngineCard, Manifest

if TYPE_CHECKING:
    from ghostvis_cli.engines.base import Engine
    from ghostvis_cli.profile import Profile

PACKAGES = ("ghostvis-cli", "torch", "transformers", "sglang", "httpx2", "pillow")
GPU_PERIOD_MS = 200
MIB = 2**20


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Watch:
    """What the machine did between the first run and the last."""

    def __init__(self, command: str, seed: int) -> None:
        self._command, self._seed = command, seed
        self._started_at, self._load, self._ticks = utc_now(), _load_average(), _ticks()

    def manifest(self) -> Manifest:
        noise = {"load_before": self._load, "load_after": _load_average()}
        spent = {name: after - self._ticks.get(name, 0) for name, after in _ticks().items()}
        if total := sum(spent.values()):
            noise |= {"cpu_busy": 1 - spent["idle"] / total, "cpu_stolen": spent["steal"] / total}
        return Manifest(
            command=self._command,
            started_at=self._started_at,
            finished_at=utc_now(),
            seed=self._seed,
            versions=versions(),
            machine=machine(),
            noise={name: value for name, value in noise.items() if value is not None},
        )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> dict[str, str]:
    from ghostvis_cli.machine import GIB, read_memory

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"system": platform.platform(), "cpu": _processor(), "cores": str(usable)}
    if memory := read_memory():
        found["memory"] = f"{memory.total_bytes / GIB:.1f} GiB"
    gpus = _nvidia_smi("name,driver_version")
    if gpus:
        found |= {"gpu": ", ".join(row[0] for row in gpus), "driver": gpus[0][1]}
    return found


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _load_average() -> float | None:
    with suppress(OSError):
        return os.getloadavg()[0]
    return None


def _ticks() -> dict[str, int]:
    """Processor time of the whole machine since it started; nothing where there is no /proc."""
    with suppress(OSError, ValueError):
        values = [int(each) for each in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        user, nice, system, idle, iowait, irq, softirq, steal = values
        return {"idle": idle + iowait, "steal": steal, "busy": user + nice + system + irq + softirq}
    return {}


# --- engines


def card(name: str, engine: "Engine", profile: "Profile") -> EngineCard:
    """The engine's card, made after the run: an engine may learn about its server from the answers."""
    info = engine.info
    server = engine.server
    return EngineCard(
        name=name,
        kind=info.kind,
        model=info.model,
        device=info.device,
        dtype=info.dtype,
        layout=info.layout,
        image_tokens=info.image_tokens,
        context_tokens=info.context_tokens,
        server=" ".join(filter(None, (server.kind, server.version))) if server else None,
        address=profile.engine.base_url if info.kind == "remote" else None,
        model_hash=_model_hash(engine),
        profile_hash=_profile_hash(profile),
    )


def _model_hash(engine: "Engine") -> str | None:
    from ghostvis_cli.checkpoint.fingerprint import fingerprint
    from ghostvis_cli.errors import ModelError

    if engine.info.checkpoint is None:
        return None
    with suppress(ModelError):
        return fingerprint(engine.info.checkpoint).removeprefix("sha256:")
    return None


def _profile_hash(profile: "Profile") -> str:
    """A hash of every setting that can change a figure. A profile holds no secrets."""
    settings = asdict(profile)
    for about_the_file in ("name", "description"):
        settings.pop(about_the_file)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


# --- the GPU of this machine


class Gpu:
    """Peak memory and mean power of all GPUs here while it is open. Nothing without nvidia-smi.

    Memory is what the driver counts, other processes and SGLang's reserve included; the reading is every 0.2 s.
    """

    def __init__(self, is_here: bool = True) -> None:
        self._wanted = is_here
        self._process: subprocess.Popen[str] | None = None
        self._memory: dict[str, float] = {}
        self._power: dict[str, list[float]] = {}

    def __enter__(self) -> Self:
        program = shutil.which("nvidia-smi") if self._wanted else None
        if program is not None:
            query = "--query-gpu=index,memory.used,power.draw"
            command = [program, query, "--format=csv,noheader,nounits", f"--loop-ms={GPU_PERIOD_MS}"]
            with suppress(OSError):
                self._process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                self._reader = threading.Thread(target=self._read, name="ghostvis-gpu", daemon=True)
                self._reader.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def figures(self) -> dict[str, float | None]:
        power = [sum(values) / len(values) for values in self._power.values()]
        return {
            "peak_memory_bytes": sum(self._memory.values()) * MIB if self._memory else None,
            "mean_power_w": sum(power) if power else None,
        }

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self.take(line.split(","))

    def take(self, row: Sequence[str]) -> None:
        """One line of nvidia-smi: index, MiB, watts. A card that does not tell its power says [N/A]."""
        index, memory, power = (part.strip() for part in row)
        with suppress(ValueError):
            self._memory[index] = max(self._memory.get(index, 0.0), float(memory))
        with suppress(ValueError):
            self._power.setdefault(index, []).append(float(power))


def _nvidia_smi(fields: str) -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return []
