"""Chunks -> OpenAI's response bodies: the whole answer, or the events of a stream. Sends nothing itself."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Literal, Protocol, TypeAlias
from uuid import uuid4

from ghostvis_cli.engines.base import Chunk, GenerateRequest, TokenLogprob, Usage

Group: TypeAlias = Sequence[tuple[int, Chunk]]  # choices and their chunks, in order of arrival

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity


class Vocabulary(Protocol):
    """What log-probabilities and /tokenize need to know of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, id_: int, /) -> bytes: ...


@dataclass(frozen=True)
class Call:
    """One checked API call: what to generate for each choice, and how to answer."""

    kind: Literal["chat", "text"]
    requests: tuple[GenerateRequest, ...]  # prompt by prompt, each with its n choices
    n: int
    stream: bool
    include_usage: bool
    token_ids: bool
    echo: bool = False

    @property
    def asks(self) -> str:
        """The field that holds the prompt."""
        return "messages" if self.kind == "chat" else "prompt"

    @property
    def logprobs(self) -> bool:
        return self.requests[0].sampling.logprobs is not None


class Answer(ABC):
    """The answer of one call while it is generated, choice by choice."""

    prefix: str
    object_whole: str
    object_chunk: str

    def __init__(self, call: Call, model: str, vocabulary: Vocabulary | None) -> None:
        self.call, self.vocabulary = call, vocabulary
        self.head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self.chunks: list[list[Chunk]] = [[] for _ in call.requests]

    def add(self, group: Group) -> None:
        for index, chunk in group:
            self.chunks[index].append(chunk)

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, chunks in enumerate(self.chunks):
            text = self._echoed(index) + "".join(chunk.text for chunk in chunks)
            choice = {"index": index, **self._content(text), "finish_reason": chunks[-1].finish_reason}
            choices.append(choice | self._token_fields(index, chunks))
        return {**self.head, "object": self.object_whole, "choices": choices, "usage": self.usage()}

    def events(self, group: Group) -> list[dict[str, Any]]:
        """The events for these chunks: one for each choice, with its tokens together.

        A choice's role comes first, its finish reason last and alone.
        """
        by_choice: dict[int, list[Chunk]] = {}
        for index, chunk in group:
            by_choice.setdefault(index, []).append(chunk)
        return [
            event
            for index, chunks in by_choice.items()
            for event in self._choice_events(index, joined(chunks))
        ]

    def _choice_events(self, index: int, chunk: Chunk) -> Iterator[dict[str, Any]]:
        if not self.chunks[index]:
            yield from self._opening(index)
        self.chunks[index].append(chunk)
        extras = self._token_fields(index, [chunk])
        if chunk.text or chunk.prompt or chunk.logprobs or (self.call.token_ids and chunk.token_ids):
            yield self._event({"index": index, **self._delta(chunk.text), "finish_reason": None} | extras)
        if chunk.finish_reason is not None:
            last = {"index": index, **self._delta(None), "finish_reason": chunk.finish_reason}
            yield self._event({**last, "logprobs": None})

    def usage_event(self) -> dict[str, Any]:
        return {**self._event(), "choices": [], "usage": self.usage()}

    def usages(self) -> list[Usage]:
        return [usage for chunks in self.chunks if (usage := chunks[-1].usage) is not None]

    def totals(self) -> Usage:
        """Over all choices. A prompt counts once, however many choices it has."""
        usages = self.usages()
        prompts = usages[:: self.call.n]
        cached = [usage.cached_tokens for usage in prompts if usage.cached_tokens is not None]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(cached) if len(cached) == len(prompts) else None,
            image_tokens=sum(usage.image_tokens for usage in prompts),
        )

    def usage(self) -> dict[str, Any]:
        total = self.totals()
        details = {"image_tokens": total.image_tokens}
        if total.cached_tokens is not None:  # absent is "not reported", which is not 0
            details["cached_tokens"] = total.cached_tokens
        return {
            "prompt_tokens": total.prompt_tokens,
            "completion_tokens": total.completion_tokens,
            "total_tokens": total.prompt_tokens + total.completion_tokens,
            "prompt_tokens_details": details,
        }

    def _event(self, *choices: dict[str, Any]) -> dict[str, Any]:
        event = {**self.head, "object": self.object_chunk, "choices": list(choices)}
        return event | ({"usage": None} if self.call.include_usage else {})

    def _token_fields(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        fields: dict[str, Any] = {"logprobs": None}
        if self.call.logprobs:
            fields["logprobs"] = self._logprobs(
                index, [entry for chunk in chunks for entry in (*chunk.prompt, *chunk.logprobs)]
            )
        if self.call.token_ids:  # an extension shared with SGLang and vLLM
            fields["token_ids"] = [id_ for chunk in chunks for id_ in chunk.token_ids]
        return fields

    def _bytes(self, id_: int) -> bytes:
        assert self.vocabulary is not None, "logprobs are refused without a vocabulary"
        return self.vocabulary.token_bytes(id_)

    def _text(self, id_: int) -> str:
        return self._bytes(id_).decode(errors="replace")

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        yield from ()

    def _echoed(self, index: int) -> str:
        """The prompt, where `echo` wants it before the answer."""
        return ""

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, text: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]: ...


class ChatAnswer(Answer):
    prefix, object_whole, object_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        yield self._event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(id_, logprob) for id_, logprob in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, id_: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(id_), "logprob": _finite(logprob), "bytes": list(self._bytes(id_))}


class TextAnswer(Answer):
    prefix, object_whole, object_chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, call: Call, model: str, vocabulary: Vocabulary | None) -> None:
        super().__init__(call, model, vocabulary)
        self.offsets = [0] * len(call.requests)  # characters begun so far

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        if text := self._echoed(index):
            yield self._event({"index": index, "text": text, "logprobs": None, "finish_reason": None})

    def _echoed(self, index: int) -> str:
        request = self.call.requests[index]
        if not self.call.echo:
            return ""
        return request.prompt or b"".join(map(self._bytes, request.prompt_ids or ())).decode(errors="replace")

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for entry in entries:
            offsets.append(self.offsets[index])
            # Bytes 10xxxxxx continue a character that an earlier token began. A BOS is no part of the text.
            if not (isnan(entry.logprob) and self.call.requests[index].prompt is not None):
                self.offsets[index] += sum(byte & 0xC0 != 0x80 for byte in self._bytes(entry.token_id))
        return {
            "tokens": [self._text(entry.token_id) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                None
                if isnan(entry.logprob)
                else {self._text(id_): _finite(value) for id_, value in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Consecutive chunks as one."""
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(id_ for chunk in chunks for id_ in chunk.token_ids),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        prompt=chunks[0].prompt,
        finish_reason=chunks[-1].finish_reason,
        usage=chunks[-1].usage,
    )


def answer_for(call: Call, model: str, vocabulary: Vocabulary | None) -> Answer:
    """The answer of a call, in the shape of its route."""
    return (ChatAnswer if call.kind == "chat" else TextAnswer)(call, model, vocabulary)


def _finite(logprob: float) -> float | None:
    return None if isnan(logprob) else max(logprob, LOWEST_LOGPROB)
