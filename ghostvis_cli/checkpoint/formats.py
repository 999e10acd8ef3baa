"""What a file is that is no checkpoint, told by its first bytes, and what the user can do about it.

Knows formats by their signatures and reads no more than the first block; loading is header's and load's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from ghostvis_cli.errors import ModelError, one_line, printable

HEAD_BYTES = 1024
LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # begins files of torch before 1.6
CERTIFICATE, CONFIG = "parity.json", "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "copy it again and compare the sizes"


class Format(NamedTuple):
    """`hint` may hold {path}, as a shell wants it."""

    is_called: str
    hint: str


PLAIN_WEIGHTS = "save plain weights: torch.save(model.state_dict(), PATH)"
UNTAR = "tar -xf {path}, and name the model_*.pt that was in it"
UNZIP = "unzip {path}, and name the model_*.pt that was in it"


def _packed(program: str, unpack: str) -> Format:
    """The format of a compressed file. Its hint covers a compressed tar as well."""
    return Format(
        f"compressed with {program}", f"{unpack} {{path}} > model_000000.pt; if it is a tar: {UNTAR}"
    )


TORCH_AGAIN = (
    "python -c 'import sys, torch; p = sys.argv[1];"
    ' torch.save(torch.load(p, map_location="cpu", weights_only=True), p)\' {path}'
)
FROM_SAFETENSORS = (
    "python -c 'import sys, torch, safetensors.torch as s;"
    " torch.save(s.load_file(sys.argv[1]), \"model_000000.pt\")' {path}, with the run's meta_000000.json beside it"
)
# Where a signature stands, what it is, and what it means.
SIGNATURES: tuple[tuple[int, bytes, Format], ...] = (
    (0, LEGACY_TORCH, Format("a torch file of the format before 1.6", TORCH_AGAIN)),
    (0, b"version https://git-lfs", Format("a Git LFS pointer, not the file it stands for", "git lfs pull")),
    (0, b"/annex/objects/", Format("a git-annex pointer, not the file it stands for", "git annex get {path}")),
    (0, b"GGUF", Format("a GGUF file, made for llama.cpp", "name the checkpoint that it was made from")),
    (0, b"\x1f\x8b", _packed("gzip", "gunzip -c")),
    (0, b"BZh", _packed("bzip2", "bunzip2 -c")),
    (0, b"\xfd7zXZ\x00", _packed("xz", "xz -dc")),
    (0, b"\x28\xb5\x2f\xfd", _packed("zstd", "zstd -dc")),
    (0, b"\x04\x22\x4d\x18", _packed("lz4", "lz4 -dc")),
    (0, b"7z\xbc\xaf\x27\x1c", Format("a 7z archive", "7z x {path}, and name the model_*.pt that was in it")),
    (0, b"Rar!", Format("a RAR archive", "unrar x {path}, and name the model_*.pt that was in it")),
    (257, b"ustar", Format("a tar archive", UNTAR)),
    (0, b"\x93NUMPY", Format("a NumPy array", PLAIN_WEIGHTS)),
    (0, b"\x89HDF\r\n\x1a\n", Format("an HDF5 file", PLAIN_WEIGHTS)),
)  # fmt: skip
ZIP = b"PK\x03\x04"
PICKLE = Format("a pickle, and none that torch.save wrote", PLAIN_WEIGHTS)
SAFETENSORS = Format("a safetensors file", FROM_SAFETENSORS)
PAGE = Format("a web page: the download got an error or a login instead", "download the file itself again")
TEXT = Format("a text, and no weights", "download the file itself again")
EMPTY = Format("empty", AGAIN)
ZEROS = Format("filled with zeros: whatever wrote it never finished", AGAIN)
TRUNCATED = Format("damaged or incomplete: not a file that torch.save finished writing", AGAIN)
UNKNOWN = Format("not a file that torch.save wrote, or damaged", AGAIN)


def foreign(path: Path) -> ModelError:
    """Why a file is no torch file."""
    found = _recognised(_head(path), path)
    return _error(path, found)


def instead(path: Path, *besides: str) -> ModelError | None:
    """What a file is that holds no format of ours, such as a pointer or a web page; None where it may hold one.

    besides  beginnings of what is a text all the same, such as JSON's
    """
    head = _head(path)
    found = _recognised(head, path)
    is_open = found in (PICKLE, TRUNCATED, UNKNOWN) or head.lstrip().startswith(
        tuple(map(str.encode, besides))
    )
    return None if is_open else _error(path, found)


def _error(path: Path, found: Format) -> ModelError:
    return ModelError(f"{path} is {found.is_called}", hint=found.hint.replace("{path}", quote(str(path))))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {one_line(error)}") from error


def _recognised(head: bytes, path: Path) -> Format:
    for offset, signature, found in SIGNATURES:
        if head.startswith(signature, offset):
            return found
    if not head.strip(b"\x00"):
        return ZEROS if head else EMPTY
    if head[: len(ZIP)] == ZIP[: len(head)]:
        return TRUNCATED
    if _is_safetensors(head):
        around = _in_directory(path.parent)
        return (
            around._replace(is_called=f"a safetensors file of {around.is_called}") if around else SAFETENSORS
        )
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    return _as_text(head)


def _is_safetensors(head: bytes) -> bool:
    """The length of a JSON header in eight bytes, then that header."""
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _as_text(head: bytes) -> Format:
    try:
        text = head.decode("utf-8-sig").lstrip().lower()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # else a character that the block cut
            return UNKNOWN
        text = head[: error.start].decode("utf-8").lstrip().lower()
    if not all(char.isprintable() or char.isspace() for char in text):
        return UNKNOWN
    if text.startswith(("<!doctype html", "<html", "<head", "<?xml", "<!--")):
        return PAGE
    first = printable(text.partition("\n")[0].strip())[:60]
    return TEXT._replace(is_called=f"a text that begins {first!r}, and no weights")


# --- zips and directories


def begins_as_zip(path: Path) -> bool:
    return _head(path).startswith(ZIP)


def foreign_zip(names: list[str], path: Path) -> ModelError | None:
    """Why a sound zip is no checkpoint; None where it is one that torch.save wrote."""
    if any(name.endswith("/constants.pkl") for name in names):
        return ModelError("it is a TorchScript program, not weights", hint=PLAIN_WEIGHTS)
    if any(name.endswith(".npy") for name in names):
        return ModelError("it is an archive of NumPy arrays", hint=PLAIN_WEIGHTS)
    if sum(name.endswith("/data.pkl") for name in names) == 1:
        return None
    packed = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))]
    if packed:
        hint = UNZIP.replace("{path}", quote(str(path)))
        return ModelError(f"it is a zip archive that holds {printable(packed[0])}", hint=hint)
    return ModelError("it is a zip, but not one that torch.save wrote", hint=PLAIN_WEIGHTS)


def foreign_directory(directory: Path) -> ModelError:
    """Why a directory without a model_<step>.pt is no checkpoint."""
    found = _in_directory(directory)
    if found is None:
        message = f"{directory} holds no model_<step>.pt"
        return ModelError(message, hint="name the file, or the directory it lies in")
    return _error(directory, found)


def _in_directory(directory: Path) -> Format | None:
    """What a directory's other files say of it."""
    if (directory / CONFIG).is_file():
        if is_hf(directory):
            hint = f"name the directory itself: --checkpoint-path {quote(str(directory))}"
            return Format("a model in Hugging Face's format", hint)
        hint = "save it with safetensors: model.save_pretrained(DIR), or copy the directory whole"
        return Format(f"a model in Hugging Face's format, without {WEIGHTS}", hint)
    if (directory / "data.pkl").is_file() or any(directory.glob("*/data.pkl")):
        return Format("an unpacked torch file", "download it again without unpacking it")
    if any(directory.glob("*.distcp")) or any(directory.glob("*/*.distcp")):
        hint = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} model_000000.pt"
        return Format("a checkpoint of torch.distributed, split over ranks", hint)
    return None


def is_hf(directory: Path) -> bool:
    """Whether it looks like a model in Hugging Face's format; `checkpoint.directory` reads it."""
    weights = (directory / WEIGHTS, directory / INDEX)
    return (directory / CONFIG).is_file() and any(path.is_file() for path in weights)


def made_of(directory: Path) -> Mapping[str, Any]:
    """What a directory's certificate says of the checkpoint that it was made of; empty where there is none."""
    try:
        found = json.loads((directory / CERTIFICATE).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
