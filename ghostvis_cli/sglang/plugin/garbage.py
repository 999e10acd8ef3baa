"""Keeps what SGLang has imported out of collections of garbage.

Each of its processes holds a million objects by the time it serves. A full collection goes through all of them with
the interpreter's lock held, some 0.6 s in which nothing is answered; frozen, they are passed over.

SGLang has a route for it, which reaches the scheduler, the detokenizer and the one process that is asked
(`Probe.freeze`). Others that take requests in do it here, once they are ready.
"""

import gc
from typing import Any


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.entrypoints.http_server._wait_and_warmup", freeze, HookType.AFTER)


def freeze(*_: Any, **__: Any) -> None:
    gc.collect()
    gc.freeze()
