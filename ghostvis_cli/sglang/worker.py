"""The process that SGLang runs in: python -m ghostvis_cli.sglang.worker FD, started by sglang/engine.py.

A separate process, because SGLang kills all children of the process it runs in, handles its signals, and starts
children that import its main module. Messages go over the socket FD; what it prints is its log.
"""

import asyncio
import socket
import sys
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from ghostvis_cli.errors import GhostvisError, one_line
from ghostvis_cli.sglang import channel

if TYPE_CHECKING:
    from ghostvis_cli.sglang.channel import Frame

ROOM_FOR_END = 5  # positions after a prompt that SGLang keeps free, besides the last two of a context


def main(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as link:
        link.set_inheritable(False)  # its end means that this process has ended, so no child may hold it
        try:
            engine = _started(link)
        except GhostvisError as error:
            link.sendall(channel.packed({"error": failure(error)}))
            return
        if engine is not None:
            engine.loop.run_until_complete(Worker(engine).serve(link))
            engine.shutdown()  # in case the parent did not end us


def failure(error: BaseException) -> dict[str, str | None]:
    """An error, for the other end to recreate by the name of its class."""
    if isinstance(error, GhostvisError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    return {"kind": "RequestError", "message": f"SGLang: {one_line(error)}", "hint": None}


def _started(link: socket.socket) -> Any:
    """SGLang with the converted model loaded; None where the parent ended meanwhile."""
    frame = channel.read_waiting(link)
    if frame is None:
        return None
    directory = _converted(frame.message, lambda line: link.sendall(channel.packed({"notice": line})))
    link.sendall(channel.packed({"directory": directory}))
    frame = channel.read_waiting(link)
    if frame is None:
        return None

    from ghostvis_cli.sglang import plugin

    plugin.check()
    import sglang

    engine = sglang.Engine(**frame.message["arguments"])
    engine.freeze_gc()  # a million objects, which every full collection would scan
    longest_prompt = engine.tokenizer_manager.max_req_input_len
    link.sendall(channel.packed({"context": longest_prompt + ROOM_FOR_END - 1}))
    return engine


def _converted(message: dict[str, Any], report: Callable[[str], None]) -> str:
    from ghostvis_cli.convert import cache
    from ghostvis_cli.profile import ModelSettings

    return str(cache.for_model(ModelSettings(**message["model"]), message["dtype"], report=report))


class Worker:
    """Runs requests of one channel on SGLang's own loop."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._running: dict[int, asyncio.Task[None]] = {}
        self._writer: asyncio.StreamWriter

    async def serve(self, link: socket.socket) -> None:
        """Serve until the parent is gone."""
        reader, self._writer = await asyncio.open_connection(sock=link)
        while (frame := await channel.read(reader)) is not None:
            match frame.message["do"]:
                case "generate":
                    self._begin(frame)
                case "abort":
                    self._abort(frame.message["id"])
                case "load":
                    self._tell(frame.message["id"], load=await self._load(), end=True)
        self._writer.close()

    def _begin(self, frame: "Frame") -> None:
        id_ = frame.message["id"]
        self._running[id_] = asyncio.create_task(self._answer(id_, frame))
        self._running[id_].add_done_callback(lambda _: self._running.pop(id_, None))

    def _abort(self, id_: int) -> None:
        task = self._running.get(id_)
        if task is not None:
            # Before the task is dropped: SGLang 0.5.17 tells its scheduler only while it knows the request.
            self._engine.tokenizer_manager.abort_request(_name(id_))
            task.cancel()

    async def _answer(self, id_: int, frame: "Frame") -> None:
        message = frame.message
        with_logprobs = message["logprobs"] is not None
        sent = 0
        try:
            stream = await self._engine.async_generate(
                input_ids=message["ids"],
                image_data=list(frame.images) or None,
                sampling_params=message["sampling"],
                return_logprob=with_logprobs,
                top_logprobs_num=message["logprobs"] or 0,
                rid=_name(id_),
                stream=True,
            )
            async with aclosing(stream):
                async for out in stream:
                    ids, about = out["output_ids"][sent:], out["meta_info"]
                    logprobs = _logprobs(about, sent) if with_logprobs else None
                    sent += len(ids)
                    self._tell(
                        id_,
                        ids=ids,
                        logprobs=logprobs,
                        cached=about.get("cached_tokens"),
                        end=about.get("finish_reason"),
                    )
        except Exception as error:
            self._tell(id_, error=failure(error))

    async def _load(self) -> dict[str, int]:
        """Requests running and waiting, and positions in use or cached."""
        found = await self._engine.tokenizer_manager.get_loads()
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        return {name: sum(getattr(rank, name) for rank in found) for name in names}

    def _tell(self, id_: int, **message: Any) -> None:
        with suppress(ConnectionError):
            self._writer.write(channel.packed({"id": id_, **message}))


def _name(id_: int) -> str:
    return f"ghostvis-{id_}-"  # the last dash matters: SGLang aborts every id with this prefix


def _logprobs(about: dict[str, Any], start: int) -> list[tuple[float, list[tuple[float, int]]]]:
    """(log probability, [(log probability, id), ...]) of the tokens from `start` on."""
    chosen = about["output_token_logprobs"][start:]
    tops = (about.get("output_top_logprobs") or [])[start:] or [()] * len(chosen)
    return [
        (one[0], [(other[0], other[1]) for other in top or ()]) for one, top in zip(chosen, tops, strict=True)
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]))
