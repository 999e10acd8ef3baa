"""Writes tensors as safetensors files, hashing what it writes: no more is held than a few blocks."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from ghostvis_cli.convert.directory import WEIGHTS
from ghostvis_cli.convert.mapping import TargetTensor
from ghostvis_cli.convert.tensors import DTYPES, CheckpointTensors, blocks

BLOCKS_BEHIND = 8
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shard:
    name: str
    targets: tuple[TargetTensor, ...]


def split(targets: Sequence[TargetTensor], dtype: str, max_bytes: int) -> list[Shard]:
    """Fill shards in order; a tensor that is larger than `max_bytes` has one of its own."""
    groups: list[list[TargetTensor]] = [[]]
    size = 0
    for target in targets:
        nbytes = target.numel * ITEMSIZE[dtype_of(target, dtype)]
        if groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += nbytes
    if len(groups) == 1:
        return [Shard(WEIGHTS, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def dtype_of(target: TargetTensor, dtype: str) -> str:
    """The type that a tensor is written in: float32 where it must be exact."""
    return "float32" if target.exact else dtype


def index(shards: Sequence[Shard], dtype: str) -> str:
    """model.safetensors.index.json."""
    files = {target.name: shard.name for shard in shards for target in shard.targets}
    return json.dumps({"metadata": {"total_size": total_bytes(shards, dtype)}, "weight_map": files}, indent=2)


def total_bytes(shards: Iterable[Shard], dtype: str) -> int:
    targets = [target for shard in shards for target in shard.targets]
    return sum(target.numel * ITEMSIZE[dtype_of(target, dtype)] for target in targets)


def write(
    path: Path, shard: Shard, source: CheckpointTensors, dtype: str, wrote: Callable[[int], None]
) -> str:
    """Write a shard; its SHA-256. `wrote` is told the bytes of each block, and may raise to end it.

    Blocks are made in this thread, and hashed and written in another, which is a few blocks behind.
    """
    digest = sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:

        def keep(content: memoryview | bytes) -> None:
            digest.update(content)
            file.write(content)

        behind = deque([writer.submit(keep, _header(shard, dtype))])
        for target in shard.targets:
            for block in blocks(target, source, DTYPES[dtype_of(target, dtype)]):
                behind.append(writer.submit(keep, block.view(-1).view(torch.uint8).numpy().data))
                if len(behind) > BLOCKS_BEHIND:
                    behind.popleft().result()
                wrote(block.nbytes)
        for future in behind:
            future.result()
    return digest.hexdigest()


def _header(shard: Shard, dtype: str) -> bytes:
    """Eight bytes of length, then JSON padded to a multiple of eight."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for target in shard.targets:
        end = at + target.numel * ITEMSIZE[dtype_of(target, dtype)]
        content[target.name] = {
            "dtype": NAMES[dtype_of(target, dtype)],
            "shape": list(target.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
