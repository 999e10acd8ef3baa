"""Why the local engine's cache has rows: what pages would cost a decoding step, and what they would save.

    python -m benchmarks.cache_pages [--repeats 15]

One layer's attention for one new position of 8 sequences: over rows as the engine has them, views of one tensor,
and over pages of 64 positions that a table names, which `scaled_dot_product_attention` takes only once they are
gathered; on a CPU, where that is the engine's attention. Memory: a batch of 32 in rows of the longest one's length,
over what its pages take.
"""

import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decode import SIZES
from benchmarks.report import Spread, machine, parser_of

BATCH, PAGE, TIMES = 8, 64, 100
LENGTHS = (256, 1024)  # whole pages


def took(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    for _ in range(TIMES):
        work()
    return (time.perf_counter() - started) / TIMES


def ratio(heads: int, kv_heads: int, size: int, length: int, repeats: int) -> Spread:
    """Time over pages to time over rows, in pairs."""
    q = torch.randn(BATCH, kv_heads, heads // kv_heads, size)
    k, v = (torch.randn(BATCH, kv_heads, 2 * length, size) for _ in "kv")
    rows = k[:, :, :length], v[:, :, :length]
    count = length // PAGE
    table = torch.randperm(BATCH * count).view(BATCH, count)
    pages = [torch.empty(BATCH * count, PAGE, kv_heads, size) for _ in rows]
    for pool, row in zip(pages, rows, strict=True):
        pool[table] = row.transpose(1, 2).reshape(BATCH, count, PAGE, kv_heads, size)

    def gathered() -> Tensor:
        k, v = (pool[table].flatten(1, 2).transpose(1, 2) for pool in pages)
        return F.scaled_dot_product_attention(q, k, v)

    def in_rows() -> Tensor:
        return F.scaled_dot_product_attention(q, *rows)

    torch.testing.assert_close(gathered(), in_rows())
    return Spread.of([took(gathered) / took(in_rows) for _ in range(repeats)])


def memory(seed: int) -> float:
    """What 32 rows as long as the longest take, over pages: chats of some 50 to 2,000 tokens."""
    rng = random.Random(seed)
    lengths = [min(2048, max(32, int(rng.lognormvariate(6, 0.8)))) for _ in range(32)]
    return 32 * max(lengths) / sum(-(-length // PAGE) * PAGE for length in lengths)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    print(machine())
    torch.manual_seed(0)
    with torch.inference_mode():
        for name, config in SIZES.items():
            for length in LENGTHS:
                heads = config.n_head, config.n_kv_head, config.head_dim
                spread = ratio(*heads, length, given.repeats)
                print(f"attention, {name}, {length} positions: pages take {spread.show()} times rows")
    more = Spread.of([memory(seed) for seed in range(given.repeats)])
    print(f"memory of 32 chats: rows take {more.show()} times pages")


if __name__ == "__main__":
    main()
