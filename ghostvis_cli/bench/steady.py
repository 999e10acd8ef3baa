"""A piece of work that is always the same, timed around each repeat: how fast this machine was at that moment.

Processors change speed: other programs, another thread on the same physical core, heat. Nothing that a
process can ask tells of all of them, so it is measured. Comparing takes a change of the machine out of what it
may call a change of the engine.
"""

import time
import zlib
from random import Random

ROUNDS = 60_000  # some 8 ms, with the packing
TEXT = Random(0).randbytes(60_000) * 2


def fixed_work() -> float:
    """Seconds that it took, about 0.01: a loop of the interpreter, and compression, which reads memory."""
    started_s = time.perf_counter()
    total = 0
    for number in range(ROUNDS):
        total = (total * 31 + number) & 0xFFFF
    zlib.compress(TEXT, 6)
    return time.perf_counter() - started_s
