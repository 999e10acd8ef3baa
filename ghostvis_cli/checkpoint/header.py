"""Names, shapes and types of a torch file's tensors, read without torch and without running anything in it.

A torch file is a zip: `data.pkl` says how tensors are cut from the storages beside it. The unpickler here
admits the half dozen names that such a file needs and turns each tensor into a `TensorInfo`.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from ghostvis_cli.checkpoint import pickles
from ghostvis_cli.checkpoint.formats import begins_as_zip, foreign, foreign_zip
from ghostvis_cli.errors import ModelError, limit_reached, one_line, printable

# torch's storage class -> the dtype's name and its bytes an element
STORAGES = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
T = TypeVar("T")
HEADER_LIMIT_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header of a file describes it."""

    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ModelError(
            f"it holds a {module}.{name}, which is not a tensor: loading it could run code",
            hint="save plain weights: torch.save(model.state_dict(), PATH)",
        )

    def persistent_load(self, pid: Any) -> tuple[str, int]:
        kind, storage, *_ = pid
        if kind != "storage" or storage not in STORAGES.values():
            raise ModelError("its storages are of a kind this version does not know")
        name, itemsize = storage
        return name, itemsize


def _tensor(storage: tuple[str, int], _offset: int, shape: tuple[int, ...], *_: Any) -> TensorInfo:
    if not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ModelError(f"it holds a tensor of shape {printable(str(shape))}")
    return TensorInfo(shape, *storage)


def _parameter(tensor: TensorInfo, *_: Any) -> TensorInfo:
    return tensor


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> TensorInfo of a flat state dict, or of one under `model` or `state_dict`."""
    try:
        if not path.is_file():
            raise ModelError("it is not a file" if path.exists() else "it does not exist")
        if not begins_as_zip(path):  # zipfile also finds one behind something else, such as in a tar
            raise zipfile.BadZipFile
        with zipfile.ZipFile(path) as archive:
            if (stranger := foreign_zip(archive.namelist(), path)) is not None:
                raise stranger
            entry = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if entry.file_size > HEADER_LIMIT_BYTES:
                raise ModelError("its header is larger than any checkpoint's")
            content = pickles.load(archive.read(entry), _Unpickler)
        return unwrap(content, TensorInfo)
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from None
    except zipfile.BadZipFile:
        raise foreign(path) from None
    except OSError as error:
        raise limit_reached(error) or ModelError(f"{path} can't be read: {one_line(error)}") from error
    except Exception as error:  # a hostile pickle can fail in any way at all
        damaged = ModelError(f"{path} is damaged: its header can't be read ({type(error).__name__})")
        raise limit_reached(error) or damaged from error


def unwrap(content: object, tensor_type: type[T]) -> dict[str, T]:
    """The name -> tensor mapping itself, taken out of a {'model': …} or {'state_dict': …} around it."""
    if isinstance(content, Mapping):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise ModelError("it holds no state dict")
    strays = [str(name) for name, value in content.items() if not isinstance(value, tensor_type)]
    if strays:
        raise ModelError(f"it holds things that are not tensors: {', '.join(strays[:5])}")
    return {str(name): value for name, value in content.items()}
