"""One request run to its end, and its record: when each piece came, and of how many tokens."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import compress

from ghostvis_cli.bench.schema import Record
from ghostvis_cli.engines.base import Chunk, Engine, GenerateRequest
from ghostvis_cli.errors import EngineError, GhostvisError, RequestError


def now() -> float:
    """The event loop's clock: what timers and measurements go by is one and the same."""
    return asyncio.get_running_loop().time()


@dataclass
class _Heard:
    """The chunks of one answer with generated tokens: when each came, and the last one."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # 0: the engine does not say
    thought: list[bool] = field(default_factory=list)
    last: Chunk | None = None

    def add(self, chunk: Chunk, at_s: float) -> None:
        if chunk.finish_reason is not None:
            self.last = chunk
            if not chunk.text and self.times and not any(self.tokens):
                return  # all token ids once more, from a server that streams text alone
        if chunk.generated:
            self.times.append(at_s)
            self.tokens.append(len(chunk.token_ids))
            self.thought.append(bool(chunk.reasoning))

    def reasoning_tokens(self, completion_tokens: int | None) -> int | None:
        """As the server counts, else as the chunks show; None where tokens can't be told from chunks."""
        if (reported := self._reported) or not any(self.thought):
            return reported
        if any(self.tokens):
            return sum(compress(self.tokens, self.thought))
        return sum(self.thought) if len(self.times) == completion_tokens else None

    def hidden_tokens(self, completion_tokens: int | None) -> int:
        """Reasoning that the server counted and did not send."""
        sent = sum(self.tokens) or len(self.times)
        hides = not any(self.thought) and sent + self._reported <= (completion_tokens or 0)
        return self._reported if hides else 0

    @property
    def _reported(self) -> int:
        return (self.last.reasoning_tokens if self.last else None) or 0


async def timed(
    engine: Engine, request: GenerateRequest, due_s: float, start_s: float
) -> tuple[Record, GhostvisError | None]:
    """One request to its end. `due_s` and `start_s` are times of `now`; the record counts from `start_s`."""
    heard = _Heard()
    error: GhostvisError | None = None
    sent_s = now()
    try:
        async with aclosing(engine.generate(request)) as stream:
            async for chunk in stream:
                heard.add(chunk, now() - start_s)
        if heard.last is None:
            error = RequestError("the answer ended without a reason")
    except GhostvisError as raised:
        error = raised
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
        error = EngineError("the engine cancelled the request, which nobody had asked for")
    finished_s = now() - start_s
    last = heard.last
    usage = None if last is None else last.usage
    counted = usage is not None and usage.prompt_tokens > 0  # a server that does not count says 0
    completion_tokens = usage.completion_tokens if usage and counted else None
    aborted = last is not None and last.finish_reason == "abort"
    record = Record(
        id="",
        scheduled_s=due_s - start_s,
        sent_s=sent_s - start_s,
        first_token_s=heard.times[0] if heard.times else None,
        finished_s=finished_s,
        chunk_s=tuple(heard.times),
        chunk_tokens=tuple(heard.tokens),
        prompt_tokens=usage.prompt_tokens if usage and counted else None,
        completion_tokens=completion_tokens,
        cached_tokens=usage.cached_tokens if usage else None,
        reasoning_tokens=heard.reasoning_tokens(completion_tokens),
        hidden_tokens=heard.hidden_tokens(completion_tokens),
        image_tokens=usage.image_tokens if usage else 0,
        finish_reason=last.finish_reason if last else None,
        error=error.kind if error else "abort" if aborted else None,
        error_message=error.message if error else None,
    )
    return record, error


def _is_cancelled() -> bool:
    """Whether this task itself is cancelled, not just what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
