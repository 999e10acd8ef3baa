"""A directory's safetensors files: which tensor lies in which, and their headers. Read without torch, not trusted.

A file is eight bytes of length, a JSON header, then the tensors' bytes, one after the other and to the file's end.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ghostvis_cli.checkpoint.formats import INDEX, WEIGHTS, instead
from ghostvis_cli.checkpoint.header import HEADER_LIMIT_BYTES, TensorInfo
from ghostvis_cli.errors import ModelError, limit_reached, one_line, printable

DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}


def files(directory: Path) -> list[Path]:
    """The files of weights: one, or those that the index names, which lie in the directory itself."""
    if (directory / INDEX).is_file() or not (directory / WEIGHTS).is_file():
        return [directory / name for name in sorted(set(_index(directory).values()))]
    return [directory / WEIGHTS]


def headers(directory: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Tensor name -> its file and its TensorInfo. With an index, exactly what that says."""
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for path in files(directory):
        for name, info in header(path).items():
            if name in found:
                raise ModelError(f"{printable(name)} is in {found[name][0].name} and in {path.name}")
            found[name] = path, info
    if (directory / INDEX).is_file():
        strays = [
            name
            for name, file in _index(directory).items()
            if name not in found or found[name][0].name != file
        ]
        if strays:
            raise ModelError(f"{directory / INDEX} names {printable(strays[0])}, which is not where it says")
    return found


def _index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name. A name that leads out of the directory is refused."""
    path = directory / INDEX
    content = read_json(path)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{path} has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{path} names {printable(str(name))!r}, which is no safetensors file beside it")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size; ModelError where it is none."""
    try:
        if path.stat().st_size > HEADER_LIMIT_BYTES:
            raise ModelError(f"{path} is larger than any model's")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing", hint="copy the whole directory again") from None
    except (OSError, ValueError, RecursionError) as error:
        unreadable = ModelError(f"{path} can't be read: {one_line(error)}")
        raise limit_reached(error) or instead(path, "{") or unreadable from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is no JSON object")
    return content


def header(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> TensorInfo of one file, whose bytes they fill without a gap."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
                raise instead(path) or ModelError(
                    "it is damaged or incomplete: its header does not fit into it"
                )
            content = json.loads(file.read(length))
        return dict(_tensors(content, size - 8 - length))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing", hint="copy the whole directory again") from None
    except OSError as error:
        raise limit_reached(error) or ModelError(f"{path} can't be read: {one_line(error)}") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: its header can't be read ({type(error).__name__})") from error


def _tensors(content: Mapping[str, Any], data_bytes: int) -> Iterator[tuple[str, TensorInfo]]:
    entries = [(name, entry) for name, entry in content.items() if name != "__metadata__"]
    at = 0
    for name, entry in sorted(entries, key=lambda each: each[1]["data_offsets"]):
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ModelError(
                f"{printable(name)} is {printable(str(entry['dtype']))}, and quantised weights are not supported"
            )
        dtype, itemsize = DTYPES[entry["dtype"]]
        if not all(type(axis) is int and axis > 0 for axis in shape):
            raise ModelError(f"it holds a tensor of shape {printable(str(list(shape)))}")
        if begin != at or end != begin + prod(shape) * itemsize:
            raise ModelError("it is damaged: its tensors overlap, or leave gaps")
        at = end
        yield name, TensorInfo(shape, dtype, itemsize)
    if at != data_bytes:
        raise ModelError(
            f"it is damaged or incomplete: its tensors take {at} bytes, it holds {data_bytes}",
            hint="copy it again and compare the sizes",
        )
