"""Makes the converted tensors block by block, so that memory does not grow with the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostvis_cli.checkpoint.load import open_tensors
from ghostvis_cli.convert.mapping import TargetTensor
from ghostvis_cli.errors import ModelError
from ghostvis_cli.model.decoder import rms

BLOCK_BYTES = 4 * 1024**2  # stays in the processor's cache from reading to writing
# A mapped file's pages stay in memory while it is mapped. Mapping it anew lets them go.
REMAP_BYTES = 512 * 1024**2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckpointTensors:
    """A checkpoint's tensors by clean name, with at most REMAP_BYTES of the file kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: Mapping[str, Tensor] | None = None
        self._read_bytes = 0

    def __getitem__(self, key: str) -> Tensor:
        if self._tensors is None or self._read_bytes > REMAP_BYTES:
            self._tensors, self._read_bytes = open_tensors(self.path), 0
        tensor = self._tensors[key]
        self._read_bytes += tensor.nbytes
        return tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """For operations too small to share: waiting for another core takes longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def blocks(target: TargetTensor, source: CheckpointTensors, dtype: torch.dtype) -> Iterator[Tensor]:
    """The target's rows in order, as contiguous blocks of `dtype` whose elements add up to the target's."""
    if target.change in ("ones", "zeros"):
        yield (torch.ones if target.change == "ones" else torch.zeros)(target.shape, dtype=dtype)
        return
    left = target.numel
    for key in target.sources:
        for rows in _row_blocks(source[key], target):
            block = _changed(rows, target)
            block = block[: left // max(1, block[0].numel())].to(dtype).contiguous()
            if block.numel() and not all(map(torch.isfinite, block.aminmax())):
                raise ModelError(
                    f"{source.path}: {key} holds values that are not finite as {str(dtype)[6:]}",
                    hint="use an earlier step, or --dtype float32",
                )
            left -= block.numel()
            if block.numel():
                yield block
    if left:
        assert target.change == "pad_rows", f"{target.name} lacks {left} elements"
        yield torch.zeros(left, dtype=dtype)


def _row_blocks(tensor: Tensor, target: TargetTensor) -> Iterator[Tensor]:
    step = max(1, BLOCK_BYTES // max(1, 4 * tensor[0].numel()) // target.head_dim) * target.head_dim
    for start in range(0, tensor.size(0), step):
        yield tensor[start : start + step]


def _changed(rows: Tensor, target: TargetTensor) -> Tensor:
    match target.change:
        case "rms":
            return rms(rows.float())
        case "swap_halves":
            return rows.view(-1, 2, target.head_dim // 2, *rows.shape[1:]).flip(1).view(rows.shape)
        case "pad_columns":
            return F.pad(rows, (0, target.shape[-1] - rows.size(-1)))
        case _:
            return rows
