"""One request run to its end, timed by the caller's clock, and the record that scripts read."""

import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any

from ghostvis_cli.engines.base import Chunk, Completion, Engine, EngineInfo, GenerateRequest, Usage, gather
from ghostvis_cli.version import SCHEMA_VERSION

SHORTEST_TIMED_S = 0.002  # engines hand tokens over in groups: less than this is the grouping, not the speed


@dataclass(frozen=True)
class TimedAnswer:
    """`ttft_s` runs from the request to its first token, shown or not; None where there was no token."""

    completion: Completion
    ttft_s: float | None
    total_s: float

    @property
    def text(self) -> str:
        return self.completion.text

    @property
    def tokens_per_s(self) -> float | None:
        return decoding_speed(self.completion.usage.completion_tokens, self.ttft_s, self.total_s)

    def statistics(self) -> str:
        """The one line of --stats: "ttft 41 ms · 312 tok/s · 128 + 57 tokens · 96 cached"."""
        return statistics(
            self.ttft_s, self.tokens_per_s, counts(replace(self.completion.usage, image_tokens=0))
        )

    def record(self, info: EngineInfo) -> dict[str, Any]:
        """The JSON object of `generate --json`."""
        completion, usage = self.completion, self.completion.usage
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "id": f"gen-{uuid.uuid4().hex}",
            "text": completion.text,
            **completion.beside.record(),
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "usage": asdict(usage),
            "timing": {"ttft_s": self.ttft_s, "total_s": self.total_s, "tokens_per_s": self.tokens_per_s},
            **of_record(info),
        }
        if completion.logprobs:
            record["logprobs"] = [asdict(entry) for entry in completion.logprobs]
        return record


def decoding_speed(tokens: int, ttft_s: float | None, total_s: float) -> float | None:
    """Tokens a second after the first one; None where too few tokens or too short a time tell nothing."""
    after_s = total_s - ttft_s if ttft_s is not None else 0.0
    return (tokens - 1) / after_s if tokens > 1 and after_s >= SHORTEST_TIMED_S else None


def counts(usage: Usage) -> list[str]:
    """Tokens as a line of statistics has them: "128 + 57 tokens", "64 image", "96 cached"."""
    cached = "cached not reported" if usage.cached_tokens is None else f"{usage.cached_tokens} cached"
    images = [f"{usage.image_tokens} image"] if usage.image_tokens else []
    return [f"{usage.prompt_tokens} + {usage.completion_tokens} tokens", *images, cached]


def statistics(ttft_s: float | None, tokens_per_s: float | None, counted: list[str]) -> str:
    """The line of --stats: times as far as they are known, then what was counted."""
    parts = [f"ttft {ttft_s * 1000:.0f} ms"] if ttft_s is not None else []
    parts += [f"{tokens_per_s:.0f} tok/s"] if tokens_per_s else []
    return " · ".join([*parts, *counted])


def of_record(info: EngineInfo) -> dict[str, Any]:
    """What a record says of the model and the engine that answered."""
    return {
        "model": {
            "path": info.model,
            "source": info.source,
            "tag": info.tag,
            "step": info.step,
            "layout": info.layout,
        },
        "engine": {"kind": info.kind, "device": info.device, "dtype": info.dtype},
    }


async def ask(
    engine: Engine, request: GenerateRequest, on_text: Callable[[str], None] | None = None
) -> TimedAnswer:
    """Run one request; `on_text` is called with each piece of text as it comes."""
    started = time.perf_counter()
    first: float | None = None
    chunks: list[Chunk] = []
    async with aclosing(engine.generate(request)) as stream:
        async for chunk in stream:
            if first is None and chunk.generated:
                first = time.perf_counter() - started
            chunks.append(chunk)
            if on_text and chunk.text:
                on_text(chunk.text)
    return TimedAnswer(gather(chunks), first, time.perf_counter() - started)
