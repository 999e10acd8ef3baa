"""The converted directory of a checkpoint: made on first use, found again by the contents it was made of.

`$XDG_CACHE_HOME/ghostvis/converted/TAG-KEY`, TAG-KEY naming everything that decides the result: hashes of weights,
meta file and tokenizer, dtype, layout, and the code that makes a directory. Entries are whole or absent (see
staging); nothing is ever removed by itself: `rm -r` of the folder is always safe while no server runs.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostvis_cli import sizes
from ghostvis_cli.checkpoint import load
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.convert import sources, staging
from ghostvis_cli.convert.directory import CERTIFICATE, certificate_of, changed_files, is_converted
from ghostvis_cli.convert.hashes import KnownHashes
from ghostvis_cli.errors import ModelError, OutputError, installed, one_line
from ghostvis_cli.model.config import Layout
from ghostvis_cli.paths import cache_dir, expanded

if TYPE_CHECKING:
    from ghostvis_cli.convert.plan import Plan, WeightsDtype
    from ghostvis_cli.profile import ModelSettings

KEY_CHARS = 16
VERIFIED_PARAMETERS = 50_000_000  # up to here verification takes seconds, and a start waits for it
REPORT_S = 5.0


def default_base() -> Path:
    """The folder of all converted directories. OutputError without a home directory."""
    if (place := cache_dir()) is None:
        message = "there is no home directory for what is converted"
        raise OutputError(message, hint="export GHOSTVIS_CACHE_DIR=DIR")
    return place / "converted"


def for_model(model: "ModelSettings", dtype: "WeightsDtype", *, report: Callable[[str], None]) -> Path:
    """The directory to serve for what a profile names: a checkpoint, or what `ghostvis convert` made of one."""
    from ghostvis_cli.checkpoint.choose import choose_checkpoint

    if model.checkpoint_path is not None and is_converted(expanded(model.checkpoint_path)):
        return as_it_is(expanded(model.checkpoint_path), model, report=report)
    checkpoint, notices = choose_checkpoint(model, report=report)
    for line in notices:
        report(line)
    if checkpoint.hf:
        return as_it_is(checkpoint.path, model, report=report)
    layout = None if model.layout == "auto" else model.layout
    return converted(checkpoint, dtype, layout, report=report)


def as_it_is(directory: Path, model: "ModelSettings", *, report: Callable[[str], None]) -> Path:
    """A directory that the user converted, used unchanged. Differences from its certificate are reported."""
    from ghostvis_cli.checkpoint.choose import constants

    certificate = certificate_of(directory)
    if certificate is None:
        raise ModelError(
            f"{directory / CERTIFICATE} is no certificate of ghostvis convert",
            hint="ghostvis convert CHECKPOINT --out DIR",
        )
    if chosen := constants(model).chosen:
        raise ModelError(
            f"{directory} has its constants in it: {', '.join(chosen)} can't be set any more",
            hint=f"ghostvis convert CHECKPOINT --set model.{min(chosen)}=... --out DIR",
        )
    if model.layout not in ("auto", certificate.get("layout")):
        raise ModelError(
            f"{directory} was converted for the layout {certificate.get('layout')}, not {model.layout}",
            hint=f"ghostvis convert CHECKPOINT --layout {model.layout} --out DIR",
        )
    known = KnownHashes(default_base() / "hashes.json", report)
    _tell_changes(directory, certificate, known, report)
    known.save()
    _tell_verification(directory, certificate, report)
    return directory


def converted(
    checkpoint: Checkpoint,
    dtype: "WeightsDtype",
    layout: Layout | None,
    *,
    report: Callable[[str], None],
    base: Path | None = None,
) -> Path:
    """The cached directory of a checkpoint. Made here, by one run at a time, if it isn't there whole."""
    base = default_base() if base is None else base
    _make(base)
    staging.clear_unfinished(base)
    known = KnownHashes(base / "hashes.json", report)
    place = base / _name(checkpoint, dtype, layout, known)
    with _alone(place, report):
        certificate = certificate_of(place)
        if certificate is not None and (changed := changed_files(place, certificate, known)):
            report(f"{place} was changed since it was converted ({', '.join(changed)}): converting again")
            certificate = None
        if certificate is None:
            certificate = _convert(checkpoint, dtype, layout, place, report)
            for name, digest in certificate["outputs"].items():
                known.note(place / name, digest)
        known.save()
    _tell_verification(place, certificate, report)
    return place


def size_bytes(base: Path | None = None) -> int:
    """Bytes of all entries."""
    base = default_base() if base is None else base
    return sum(file.stat().st_size for file in base.glob("*/*") if file.is_file())


def entries(base: Path | None = None) -> list[Path]:
    """All directories in the cache that are whole."""
    base = default_base() if base is None else base
    return sorted(place for place in base.glob("[!.]*") if is_converted(place))


def _make(base: Path) -> None:
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {base} can't be made: {one_line(error)}", hint="export GHOSTVIS_CACHE_DIR=DIR"
        ) from error


def _name(checkpoint: Checkpoint, dtype: str, layout: Layout | None, known: KnownHashes) -> str:
    paths = (checkpoint.path, checkpoint.meta_path, checkpoint.tokenizer_path)
    try:
        inputs = [known.of(path) for path in paths]
    except OSError as error:
        _plan(checkpoint, "bfloat16", layout)  # says better what is missing
        raise ModelError(f"{checkpoint.path} can't be read: {one_line(error)}") from error
    constants = load.inspect(checkpoint).constants  # some are settings, one may be in another meta file
    key = sha256(json.dumps([*inputs, dtype, layout, constants, _converter()]).encode()).hexdigest()
    return f"{checkpoint.tag or checkpoint.path.stem}-{key[:KEY_CHARS]}"


@cache
def _converter() -> str:
    return sources.digest()


@contextmanager
def _alone(place: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the entry's lock, which ends with the process whatever happens to it."""
    from filelock import FileLock, Timeout

    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"another run is converting {place.name}: waiting for it")
        lock.acquire()
    except OSError as error:
        raise OutputError(
            f"{place.parent} can't be written: {one_line(error)}", hint="export GHOSTVIS_CACHE_DIR=DIR"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _tell_changes(
    directory: Path, certificate: Mapping[str, Any], known: KnownHashes, report: Callable[[str], None]
) -> None:
    changed = changed_files(directory, certificate, known)
    if gone := [name for name in changed if not (directory / name).exists()]:
        raise ModelError(f"{directory} lacks {', '.join(gone)}", hint="ghostvis convert --force --out DIR")
    if changed:
        report(f"{directory} was changed since it was converted: {', '.join(changed)}")


def _tell_verification(
    directory: Path, certificate: Mapping[str, Any], report: Callable[[str], None]
) -> None:
    verification = certificate.get("verification", {})
    if verification.get("skipped", True):
        report(f"{directory} is not verified; ghostvis convert --out DIR does that")
    elif not verification.get("passed", False):
        report(f"{directory} failed its verification; see {directory / CERTIFICATE}")


def _plan(
    checkpoint: Checkpoint, dtype: "WeightsDtype", layout: Layout | None, *, verify: bool = False
) -> "Plan":
    from ghostvis_cli.convert.plan import ConvertSettings, make_plan

    # force: what lies at the place by now is an entry that was found damaged
    return make_plan(checkpoint, ConvertSettings(dtype=dtype, layout=layout, force=True, verify=verify))


@installed("converting", "convert")
def _convert(
    checkpoint: Checkpoint,
    dtype: "WeightsDtype",
    layout: Layout | None,
    place: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Convert in a thread, so that progress is reported and a signal ends it soon."""
    from ghostvis_cli.convert import run

    try:
        plan = _plan(checkpoint, dtype, layout)
        if _is_soon_verified(plan):
            plan = _plan(checkpoint, dtype, layout, verify=True)
        for line in plan.notices:
            report(line)
        report(f"converting {checkpoint.path} to {place} ({sizes.shown(plan.weights_bytes)}), once")
        progress = run.Progress(plan.weights_bytes)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run.run, plan, place, progress)
            try:
                while not wait((running,), timeout=REPORT_S).done:
                    report(progress.line())
            finally:
                progress.cancelled.set()
            return running.result()
    except OutputError as error:
        raise OutputError(
            error.message, hint=f"make room: du -sh {place.parent}/*, or export GHOSTVIS_CACHE_DIR=DIR"
        ) from error


def _is_soon_verified(plan: "Plan") -> bool:
    return find_spec("transformers") is not None and plan.classified.parameters <= VERIFIED_PARAMETERS
