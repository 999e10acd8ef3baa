"""Excludes what SGLang has imported from garbage collection.

Each of its processes holds a million objects by the time it serves. A full collection scans them all with the
interpreter's lock held: some 0.6 s in which nothing is answered. Frozen objects are skipped.

SGLang has a route for it, which reaches the scheduler, the detokenizer and the process that handles the request
(`Probe.freeze`). Further processes that take requests do it here, once they are ready.
"""

import gc
from typing import Any


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.entrypoints.http_server._wait_and_warmup", freeze, HookType.AFTER)


def freeze(*_: Any, **__: Any) -> None:
    gc.collect()
    gc.freeze()
