"""Why the local engine's cache has rows: what pages would cost a decoding step, and what they would save.

    python -m benchmarks.cache_pages [--repeats 15] [--device cpu]

One layer's attention for one new position of 8 sequences: over rows as the engine has them, views of one tensor,
and over pages of 64 positions that a table names, which `scaled_dot_product_attention` takes only once they are
gathered. Memory: a batch of 32 in rows of the longest one's length, over what its pages take.
"""

import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decode import SIZES
from benchmarks.gpu import D32
from benchmarks.report import Spread, machine, parser_of

BATCH, PAGE, TIMES = 8, 64, 100
LENGTHS = (256, 1024)


def took(work: Callable[[], Tensor], device: torch.device) -> float:
    started = time.perf_counter()
    for _ in range(TIMES):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / TIMES


def ratio(heads: int, kv_heads: int, size: int, length: int, device: torch.device, repeats: int) -> Spread:
    """Time over pages to time over rows, in pairs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(shape, device=device, dtype=dtype)
        for shape in (
            (BATCH, kv_heads, heads // kv_heads, size),
            *[(BATCH, kv_heads, 2 * length, size)] * 2,
        )
    )
    rows = k[:, :, :length], v[:, :, :length]
    count = length // PAGE
    table = torch.randperm(BATCH * count, device=device).view(BATCH, count)
    pages = [torch.empty(BATCH * count, PAGE, kv_heads, size, device=device, dtype=dtype) for _ in rows]
    for pool, row in zip(pages, rows, strict=True):
        pool[table] = row.transpose(1, 2).reshape(BATCH, count, PAGE, kv_heads, size)

    def gathered() -> Tensor:
        k, v = (pool[table].flatten(1, 2).transpose(1, 2) for pool in pages)
        return F.scaled_dot_product_attention(q, k, v)

    def in_rows() -> Tensor:
        return F.scaled_dot_product_attention(q, *rows)

    torch.testing.assert_close(gathered().flatten(), in_rows().flatten(), rtol=2e-2, atol=1e-3)
    return Spread.of([took(gathered, device) / took(in_rows, device) for _ in range(repeats)])


def memory(seed: int) -> float:
    """What 32 rows as long as the longest take, over pages: chats of some 50 to 2,000 tokens."""
    rng = random.Random(seed)
    lengths = [min(2048, max(32, int(rng.lognormvariate(6, 0.8)))) for _ in range(32)]
    return 32 * max(lengths) / sum(-(-length // PAGE) * PAGE for length in lengths)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    print(machine())
    sizes = {**SIZES, "d32": D32} if device.type == "cuda" else SIZES
    with torch.inference_mode():
        for name, config in sizes.items():
            for length in LENGTHS:
                heads = config.n_head, config.n_kv_head, config.head_dim
                spread = ratio(*heads, length, device, given.repeats)
                print(f"attention, {name}, {length} positions: pages take {spread.show()} times rows")
    more = Spread.of([memory(seed) for seed in range(given.repeats)])
    print(f"memory of 32 chats: rows take {more.show()} times pages")


if __name__ == "__main__":
    main()
