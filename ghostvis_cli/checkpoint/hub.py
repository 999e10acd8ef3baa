"""Models by name: what is wanted of a repository on a hub, fetched into huggingface_hub's own cache.

What to fetch is decided on the repository's list of files, by the same rules as on a disk. huggingface_hub begins a
file anew when its process ends; here large files go on where they stopped, and their SHA-256 is checked. No file is
trusted more than one that lay on the disk. Nothing is imported before a name is given.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from ghostvis_cli import scratch, sizes
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.errors import (
    EngineError,
    ModelError,
    OutputError,
    UsageError,
    limit_reached,
    one_line,
    printable,
)

if TYPE_CHECKING:
    from ghostvis_cli.profile import ModelSettings

SCHEME = "hf://"
NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@\s]+))?(:(?P<path>.+))?")
ETAG = re.compile(r"[\w.-]{1,200}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_FILES = 100_000
SMALL_BYTES = 10**6  # a file that is fetched anew rather than continued
PIECE_BYTES = 2**20
REPORT_S = 5.0
TRIES, PAUSE_S = 5, 1.0  # in a row that bring nothing
IN_DIRECTORY = re.compile(r"[^/]+\.(json|jinja)|model[^/]*\.safetensors|modeling_ghostvis\.py")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """OWNER/NAME[@REVISION][:PATH]; `path` is a file or a folder of the repository."""

    repo: str
    revision: str = "main"
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> "Reference":
        match = NAME.fullmatch(text.removeprefix(SCHEME))
        path = PurePosixPath(match["path"] or "") if match else PurePosixPath()
        if match is None or path.is_absolute() or ".." in path.parts:
            hint = "--hf OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME:PATH"
            raise UsageError(f"{printable(text)!r} names no model of a hub", hint=hint)
        return cls(match["repo"], match["revision"] or "main", "" if path == PurePosixPath() else str(path))

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}" + (f":{self.path}" if self.path else "")


@dataclass(frozen=True)
class Listing:
    """A revision's files and their sizes. `folder` has what the cache holds of it, where the hub was not asked."""

    commit: str
    sizes: Mapping[str, int]
    folder: Path | None = None


@dataclass(frozen=True)
class Wanted:
    """A checkpoint of a repository, `path` below its root, and the files that it needs."""

    checkpoint: Checkpoint
    path: str
    files: tuple[str, ...]
    weights_bytes: int


def reference(model: "ModelSettings") -> Reference | None:
    """The model of a hub that is meant, by name or by an hf:// path."""
    if model.hf is not None:
        return Reference.parse(model.hf)
    named = model.checkpoint_path
    return Reference.parse(named) if named is not None and named.startswith(SCHEME) else None


def fetch(
    named: Reference,
    source: str | None,
    tag: str | None,
    step: int | None,
    report: Report,
    *,
    online: bool = True,
) -> Checkpoint:
    """The checkpoint meant, on this machine. Not online: of what the cache holds."""
    listing = list_files(named, report) if online else _cached(named, "nothing is downloaded here", report)
    with _as_folder(listing, named) as place:
        wanted = _wanted(listing, place, _chosen(named, place, source, tag, step))
    root = listing.folder or _download(named, listing, wanted, report)
    path, name = root / wanted.path, named.repo.rpartition("/")[2]
    checkpoint = locate.from_path(path) if wanted.checkpoint.hf else replace(wanted.checkpoint, path=path)
    return replace(checkpoint, base_dir=root, tag=checkpoint.tag or name)


def scan(named: Reference, report: Report) -> list[Wanted]:
    """Every checkpoint of a repository. No weights are fetched."""
    listing = list_files(named, report)
    with _as_folder(listing, named) as place:
        root = place / named.path
        found = [*locate.scan(root), *locate.scan_loose(root)]
        there = [checkpoint for checkpoint in found if checkpoint.path.is_relative_to(place)]
        return [_wanted(listing, place, checkpoint) for checkpoint in there]


# --- what there is


def list_files(named: Reference, report: Report) -> Listing:
    """Asked of the hub; of the cache where that is not to be asked, or can't be."""
    with _refusals(named):
        import httpx2
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            found = HfApi().model_info(named.repo, revision=named.revision, files_metadata=True)
        except OfflineModeIsEnabled:
            return _cached(named, "HF_HUB_OFFLINE is set", report)
        except httpx2.TransportError as error:
            return _cached(named, f"the hub can't be reached ({one_line(error)})", report)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            return _cached(named, f"the hub answered {error.response.status_code}", report)
    files = {each.rfilename: each.size or 0 for each in found.siblings or ()}
    if len(files) > MOST_FILES:
        raise ModelError(f"{named.repo} has {len(files)} files, more than any model's repository")
    return Listing(str(found.sha), {name: size for name, size in files.items() if _is_plain(name)})


def _is_plain(name: str) -> bool:
    """A relative path that stays below its root, whatever the hub says."""
    parts = name.split("/")
    return bool(name) and "\0" not in name and "\\" not in name and not {"", ".", ".."} & set(parts)


def _cached(named: Reference, reason: str, report: Report) -> Listing:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(named.repo, revision=named.revision, local_files_only=True, allow_patterns=[])
        )
    except LocalEntryNotFoundError:
        raise EngineError(
            f"{reason}, and {named} is not in the cache {_cache()}",
            hint="connect to the hub once, without HF_HUB_OFFLINE",
        ) from None
    report(f"{reason}: taking {named} from the cache")
    there = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    return Listing(folder.name, there, folder)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@contextmanager
def _as_folder(listing: Listing, named: Reference) -> Iterator[Path]:
    """The files' names as empty files, so that what is true of folders on a disk is true of repositories."""
    with scratch.folder() as place:
        try:
            for name in listing.sizes:
                path = place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        except (OSError, ValueError) as error:  # a name too long, or a file that is a folder too
            stray = ModelError(f"{named.repo} lists a file that no folder can hold: {printable(name)[:80]}")
            raise limit_reached(error) or stray from error
        try:
            yield place
        except ModelError as error:
            message, hint = (
                text.replace(f"{place}/", f"{named.repo}:").replace(str(place), named.repo)
                for text in (error.message, error.hint or "")
            )
            raise ModelError(message, hint=hint or None) from None


def _chosen(
    named: Reference, place: Path, source: str | None, tag: str | None, step: int | None
) -> Checkpoint:
    """By source and tag in a base directory's layout, else the folder's own."""
    root = place / named.path

    def is_there(checkpoint: Checkpoint) -> bool:  # and not in a folder that a variable names
        return checkpoint.path.is_relative_to(place)

    if not root.exists():
        raise ModelError(f"{named.repo} has no {named.path}", hint=f"ghostvis models --hf {named.repo}")
    if source or tag or (root.is_dir() and any(map(is_there, locate.scan(root)))):
        found = locate.find(root, source or "sft", tag, step)
        if is_there(found):
            return found
        raise ModelError(f"{named} has no {source or 'sft'} checkpoint", hint=f"ghostvis models --hf {named}")
    try:
        return locate.from_path(root, step)
    except ModelError:
        loose = [*locate.scan_loose(root)] if root.is_dir() else []
        below = sorted({_folder(each, place) for each in loose} - {root.relative_to(place).as_posix()})
        if not below:
            raise
        there = ", ".join(f"--hf {replace(named, path=path)}" for path in below[:5])
        raise ModelError(f"{named} holds no model itself", hint=f"there is: {there}") from None


def _folder(checkpoint: Checkpoint, place: Path) -> str:
    folder = checkpoint.path if checkpoint.hf else checkpoint.path.parent
    return folder.relative_to(place).as_posix()


def _wanted(listing: Listing, place: Path, checkpoint: Checkpoint) -> Wanted:
    path = checkpoint.path.relative_to(place).as_posix()
    if checkpoint.hf:
        below = "" if path == "." else f"{path}/"
        inside = {name: name.removeprefix(below) for name in listing.sizes if name.startswith(below)}
        files = [name for name, inner in inside.items() if IN_DIRECTORY.fullmatch(inner)]
        weights = sum(listing.sizes[name] for name in files if name.endswith(".safetensors"))
        return Wanted(checkpoint, path, tuple(files), weights)
    checkpoint = replace(checkpoint, base_dir=place)
    beside = [checkpoint.meta_path, checkpoint.tokenizer_path]
    beside.append(checkpoint.tokenizer_path.with_name("token_bytes.pt"))
    beside += locate.metas_of_base(checkpoint.path)
    names = [each.relative_to(place).as_posix() for each in beside if each.is_file()]
    return Wanted(checkpoint, path, (path, *dict.fromkeys(names)), listing.sizes[path])


# --- fetching


def _download(named: Reference, listing: Listing, wanted: Wanted, report: Report) -> Path:
    """The snapshot's folder in the cache, with all that is wanted in it."""
    with _refusals(named):
        from huggingface_hub import snapshot_download, try_to_load_from_cache
        from huggingface_hub.utils import disable_progress_bars, logging

        disable_progress_bars()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call] # what it has to say comes as an exception too
        missing = [
            name
            for name in wanted.files
            if not isinstance(try_to_load_from_cache(named.repo, name, revision=listing.commit), str)
        ]
        progress = _Progress(named, sum(listing.sizes[name] for name in missing), report)
        if missing:
            _require_room(named, progress.total_bytes)
            progress.begin(len(missing))
        for name in missing:
            if listing.sizes[name] > SMALL_BYTES:
                _fetch_file(named, listing.commit, name, progress)
        patterns = [escape(name) for name in wanted.files]
        return Path(snapshot_download(named.repo, revision=named.revision, allow_patterns=patterns))


class _Progress:
    """A line when it begins, one every few seconds, and none where nothing is to be fetched."""

    def __init__(self, named: Reference, total_bytes: int, report: Report) -> None:
        self.named, self.total_bytes, self._report = named, total_bytes, report
        self.done_bytes, self._told_s = 0, time.monotonic()

    def begin(self, files: int) -> None:
        self._report(f"downloading {self.named}: {sizes.shown(self.total_bytes)} in {files} files")

    def add(self, nbytes: int) -> None:
        self.done_bytes += nbytes
        if time.monotonic() - self._told_s >= REPORT_S:
            self._told_s = time.monotonic()
            self._report(f"{sizes.shown(self.done_bytes)} of {sizes.shown(self.total_bytes)}")


def _require_room(named: Reference, needed_bytes: int) -> None:
    place = _cache()
    existing = next(each for each in (place, *place.parents) if each.exists())
    left = shutil.disk_usage(existing).free
    if needed_bytes > left:
        raise _no_room(
            f"{named} takes {sizes.shown(needed_bytes)}, and {existing} has {sizes.shown(left)} left"
        )


def _no_room(message: str) -> OutputError:
    return OutputError(message, hint="make room, or export HF_HUB_CACHE=DIR with DIR on another disk")


def _fetch_file(named: Reference, commit: str, name: str, progress: _Progress) -> None:
    """Into the cache's blobs, where huggingface_hub finds it. What an earlier run left is continued."""
    from filelock import FileLock
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(named.repo, name, revision=commit)
    about = get_hf_file_metadata(url)
    if about.etag is None or not ETAG.fullmatch(about.etag) or about.size is None:
        return  # a hub that does not say: left to snapshot_download
    blob = _cache() / f"models--{named.repo.replace('/', '--')}" / "blobs" / about.etag
    part = blob.with_name(f"{about.etag}.ghostvis-part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{part}.lock"):
        if not blob.exists():
            _continue(url, part, about.size, progress)
            _check(part, about.etag, f"{named.repo}:{name}")
            part.replace(blob)
    Path(f"{part}.lock").unlink(missing_ok=True)


def _continue(url: str, part: Path, size: int, progress: _Progress) -> None:
    """Until the file is whole. A connection that ends is made again, as long as each brings something."""
    import httpx2

    with part.open("ab") as file:
        progress.add(file.tell())
        in_vain = 0
        while (before := file.tell()) < size or before > size:
            try:
                _receive(url, file, progress)
            except httpx2.TransportError:
                in_vain = 0 if file.tell() > before else in_vain + 1
                if in_vain >= TRIES:
                    raise
                time.sleep(PAUSE_S)
        file.flush()
        os.fsync(file.fileno())


def _receive(url: str, file: BinaryIO, progress: _Progress) -> None:
    """One response, from where the file ends."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    have = file.tell()
    headers = build_hf_headers() | {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        begins = response.headers.get("content-range", "").startswith(f"bytes {have}-")
        if response.status_code == 416 or not begins:
            hf_raise_for_status(response) if response.status_code != 416 else None
            file.truncate(0)  # the server does not continue: from the beginning
            file.seek(0)
            progress.done_bytes -= have
        if response.status_code != 416:
            for piece in response.iter_bytes(PIECE_BYTES):
                file.write(piece)
                progress.add(len(piece))


def _check(part: Path, etag: str, name: str) -> None:
    """Large files' tags are their SHA-256. A file that was put together wrongly must not be found again."""
    if not SHA256.fullmatch(etag):
        return
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != etag:
        part.unlink()
        raise EngineError(f"{name} arrived damaged: its SHA-256 is another", hint="run it again")


# --- refusals


@contextmanager
def _refusals(named: Reference) -> Iterator[None]:
    """What huggingface_hub raises, in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EngineError(
            f"a model by name needs {error.name}, which is not installed",
            hint="pip install 'ghostvis-cli[hub]'",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(f"{_cache()} is full: what arrived of {named} is kept") from error
        raise _explained(named, error) from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx2", "huggingface_hub")):
            raise
        raise _explained(named, error) from error


def _explained(named: Reference, error: Exception) -> Exception:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "export HF_TOKEN=hf_..., a token of an account that may read it"
    match error:
        case errors.GatedRepoError():
            hint = f"accept its conditions on the hub's page of {named.repo}, then export HF_TOKEN=hf_..."
            return ModelError(
                f"{named.repo} is gated: it is given to accounts that its owner let in", hint=hint
            )
        case errors.RevisionNotFoundError():
            return ModelError(f"{named.repo} has no revision {named.revision}", hint=f"--hf {named.repo}")
        case errors.RepositoryNotFoundError():
            return ModelError(f"there is no {named.repo} on the hub, or it is private", hint=token)
        case errors.HFValidationError():
            return UsageError(one_line(error), hint="--hf OWNER/NAME")
    if status in (401, 403):
        words = "takes no such token" if status == 401 else "may not be read with this token"
        return ModelError(f"{named.repo} {words} ({status})", hint=token)
    if status == 404:
        return ModelError(f"{named} is not on the hub (404)", hint=f"ghostvis models --hf {named.repo}")
    if isinstance(error, OSError) and error.errno is not None:
        return OutputError(
            f"the cache {_cache()} can't be used: {one_line(error)}", hint="export HF_HUB_CACHE=DIR"
        )
    said = f"answered {status}" if status else f"could not be reached ({one_line(error)})"
    return EngineError(f"the hub {said}", hint="run it again: what arrived is kept")
