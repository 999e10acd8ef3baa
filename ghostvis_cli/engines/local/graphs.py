"""CUDA graphs: hundreds of small kernels as one launch, for every shape of input that comes twice.

The first run of a shape is a plain one, which warms it up; the second is captured. What is captured are the
kernels that would run without a graph, so that results are the same bit for bit. Where capturing fails, all goes on
without.
"""

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import TypeAlias

import torch
from torch import Tensor

MOST_GRAPHS = 96  # of each kind
MOST_BYTES = 4 * 1024**3  # that all graphs together may take for what is between their kernels
Key: TypeAlias = tuple[str, *tuple[Hashable, ...]]
Compute: TypeAlias = Callable[..., Tensor]
Capture: TypeAlias = Callable[[Compute, tuple[Tensor, ...]], Compute]
logger = logging.getLogger("ghostvis")


class CudaCapture:
    """One pool of memory for all: graphs run one after the other, and what one gives is used before the next."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, compute: Compute, inputs: tuple[Tensor, ...]) -> Compute:
        """`compute` for inputs of these shapes, as a graph. What it gives is overwritten by the next run."""
        static, graph, stream = [each.clone() for each in inputs], torch.cuda.CUDAGraph(), self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute(
                *static
            )  # a stream's first run allocates workspaces, which must not happen while capturing
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                result = compute(*static)
        torch.cuda.current_stream().wait_stream(stream)

        def replay(*given: Tensor) -> Tensor:
            for ours, theirs in zip(static, given, strict=True):
                ours.copy_(theirs)
            graph.replay()
            return result

        return replay


class Graphs:
    """Runs functions, replaying those whose key was met before. A key stands for shapes and all that is fixed.

    Its first part says what kind of function it is: what fails for one kind is left to the others.
    """

    def __init__(self, make_capture: Callable[[], Capture] = CudaCapture) -> None:
        self._make_capture = make_capture
        self._capture: Capture | None = None
        self.failed: set[str] = set()
        self._forget(())

    def __len__(self) -> int:
        return sum(replay is not None for replay in self._met.values())

    def _forget(self, memory: tuple[object, ...]) -> None:
        # Weak: what is given back must not live on here.
        self._memory = [weakref.ref(each) for each in memory]
        self._capture, self.nbytes = None, 0
        self._met: dict[Key, Compute | None] = {}

    def on(self, *memory: object) -> None:
        """Tensors that the functions read by address: where one is another than before, graphs are void."""
        same = len(memory) == len(self._memory)
        if not same or any(ref() is not each for ref, each in zip(self._memory, memory, strict=True)):
            self._forget(memory)

    def run(self, key: Key, compute: Compute, *inputs: Tensor) -> Tensor:
        """compute(*inputs), of whatever shapes the key stands for. Good until the next run."""
        replay = self._met.get(key)
        if replay is None and key in self._met:
            replay = self._met[key] = self._captured(key[0], compute, inputs)
        if replay is not None:
            return replay(*inputs)
        self._met[key] = None
        return compute(*inputs)

    def _captured(self, kind: str, compute: Compute, inputs: tuple[Tensor, ...]) -> Compute | None:
        alike = sum(replay is not None for (other, *_), replay in self._met.items() if other == kind)
        if kind in self.failed or alike >= MOST_GRAPHS or self.nbytes >= MOST_BYTES:
            return None
        before = _reserved()
        try:
            self._capture = self._capture or self._make_capture()
            replay = self._capture(compute, inputs)
        except Exception as error:
            self.failed.add(kind)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning("ghostvis: CUDA graphs of %s are off, all goes on without them: %s", kind, reason)
            return None
        self.nbytes += max(0, _reserved() - before)
        return replay


def _reserved() -> int:
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
