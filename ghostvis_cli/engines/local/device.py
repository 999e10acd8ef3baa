"""What differs between devices: which attention, how numbers travel, how many sequences fit."""

import torch
from torch import Tensor

from ghostvis_cli.model.config import DecoderConfig

USUAL_BATCH = 32
LARGEST_BATCH = 256  # that is chosen by itself: what a step gains beyond is little
CACHE_SHARE = 2  # of the memory that is free, this part may become keys and values


def has_varlen(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's flash attention over sequences of different lengths can serve."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    recent = torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and config.head_dim % 8 == 0 and config.head_dim <= 256


def without_cudnn_attention(device: torch.device) -> None:
    """cuDNN's attention, which PyTorch prefers on Hopper, plans 40 to 66 ms for each new cached length."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def fitting_batch(device: torch.device, row_bytes: int) -> int:
    """Sequences in one step where nobody chose; `row_bytes` is the cache of one of the trained length."""
    if device.type != "cuda":
        return USUAL_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    rows = free // CACHE_SHARE // row_bytes
    return max(1, min(LARGEST_BATCH, power_of_two(rows + 1) // 2))


def power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. From pinned memory: a copy from elsewhere waits for all the device has to do."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


class Fetched:
    """Numbers on their way back from the device. Reading them waits for them, not for what was begun later."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._ready = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def read(self) -> list[int]:
        if self._ready is not None:
            self._ready.synchronize()
        numbers: list[int] = self._numbers.tolist()
        return numbers
