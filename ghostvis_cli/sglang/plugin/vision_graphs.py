"""CUDA graphs for the vision part: one launch in place of some 350 small kernels for a batch of images.

There is a graph for each number of images up to GHOSTVIS_VISION_GRAPHS, of the same kernels as without graphs, so
the rows are equal bit for bit. Larger batches keep the GPU busy without.

B images, S image size in pixels, N rows an image, D decoder width.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostvis_cli.sglang.plugin import GRAPHS_VARIABLE

LARGEST = 16
WARM_UPS = 2  # first runs allocate workspaces and choose kernels, which must not happen during capture
Compute: TypeAlias = Callable[[Tensor], Tensor]
logger = logging.getLogger("ghostvis")


def largest_batch() -> int:
    """GHOSTVIS_VISION_GRAPHS, in images; 0 captures nothing."""
    chosen = os.environ.get(GRAPHS_VARIABLE, str(LARGEST))
    if not chosen.isdecimal():
        raise ValueError(f"{GRAPHS_VARIABLE} is {chosen!r}: a number of images, 0 for no graphs")
    return int(chosen)


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """PyTorch's attention kernels except cuDNN's, preferred on Hopper: it plans 40 to 66 ms for each new shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def uploaded(crops: Sequence[Any], device: torch.device) -> Tensor:
    """(1, S, S, 3) uint8 arrays -> one tensor (B, S, S, 3) on the device.

    In one piece from pinned memory: other copies first wait for all the device's work.
    """
    import numpy as np

    shape = (len(crops), *crops[0].shape[1:])
    pinned = device.type == "cuda"
    staged = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    np.concatenate(crops, out=staged.numpy())
    return staged.to(device, non_blocking=True)


class VisionGraphs:
    """CUDA graphs of `compute`, which maps crops (B, S, S, 3) uint8 to rows (B, N, D)."""

    def __init__(self, compute: Compute, size: int, largest: int, device: torch.device) -> None:
        self._crops = torch.zeros((largest, size, size, 3), dtype=torch.uint8, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for batch in range(largest, 0, -1):  # the smaller ones fit into the memory of the largest
                for _ in range(WARM_UPS):
                    compute(self._crops[:batch])
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    rows = compute(self._crops[:batch])
                self._graphs[batch] = graph, rows
        torch.cuda.current_stream(device).wait_stream(stream)

    def has(self, batch: int) -> bool:
        return batch in self._graphs

    def run(self, crops: Tensor) -> Tensor:
        """The rows of a batch that there is a graph for, in the caller's own memory."""
        batch = len(crops)
        graph, rows = self._graphs[batch]
        self._crops[:batch].copy_(crops)
        graph.replay()
        return rows.clone()


def captured(compute: Compute, size: int, device: torch.device) -> VisionGraphs | None:
    """The graphs that GHOSTVIS_VISION_GRAPHS asks for; None for none, and on devices other than CUDA."""
    largest = largest_batch()
    if device.type != "cuda":
        return None
    if largest == 0:
        logger.info(
            f"ghostvis: vision part without CUDA graphs ({GRAPHS_VARIABLE}=0); attention without cuDNN"
        )
        return None
    started_s, before = time.perf_counter(), torch.cuda.memory_reserved(device)
    graphs = VisionGraphs(compute, size, largest, device)
    torch.cuda.synchronize(device)
    taken, took_s = torch.cuda.memory_reserved(device) - before, time.perf_counter() - started_s
    logger.info(
        f"ghostvis: vision part has CUDA graphs of 1 to {largest} images, {taken / 2**30:.2f} GiB, "
        f"{took_s:.1f} s; attention without cuDNN"
    )
    return graphs
