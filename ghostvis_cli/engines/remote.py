"""A server as an engine: SGLang, `ghostvis serve`, or any other with OpenAI's routes. No torch, no PIL.

Writes requests and reads the events of answers. Images are sent as `data:` URLs: the server never gets a path or
an address to open for us.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import httpx2

from ghostvis_cli.engines.base import (
    Chunk,
    Closing,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Server,
    TokenLogprob,
    ToolCall,
    Usage,
)
from ghostvis_cli.engines.connection import (
    DONE,
    BrokenOffError,
    Connection,
    RefusedError,
    RemoteSettings,
    now,
    said,
)
from ghostvis_cli.engines.text_stream import SurrogateJoiner
from ghostvis_cli.errors import EngineError, GhostvisError, InputError, RequestError, UsageError, printable
from ghostvis_cli.prompt import ImagePart, Message, Text

if TYPE_CHECKING:
    from ghostvis_cli.images import EncodedImage

__all__ = ["RemoteEngine", "RemoteSettings"]

PROBE_TIMEOUT_S = 30.0  # a server that accepts a connection and is silent for so long is broken
# Most characters of an answer's events: a token with 20 log probabilities takes some 3,000.
ANSWER_CHARS, TOKEN_CHARS = 1 << 24, 1 << 14
MOST_TOKENS = 10**12  # more than any server counts; larger sums would fail elsewhere
UNKNOWN_TOKEN = -1  # OpenAI's log probabilities name a token by its text, not by its id
# OpenAI's reasoning models have another name for it, and older servers know only this one.
LIMIT, NEWER_LIMIT = "max_tokens", "max_completion_tokens"
# Fields beyond OpenAI's, each with its neutral value.
EXTENSIONS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False}
# Servers' names for the reasoning before an answer.
REASONING = ("reasoning_content", "reasoning", "reasoning_details")
# Fields beyond OpenAI's in the model card of `ghostvis serve`.
OUR_WORDS = ("dtype", "layout", "source", "tag")
OUR_NUMBERS = ("image_tokens", "image_pixels", "trained_tokens", "step", "kv_token_bytes")
# A gateway in front of several servers (smg, sglang-router) sends requests with the same key to the same server,
# whose cache then has the image. 16 bits: enough to spread requests over any number of servers, too few to confirm
# a guess of a request's user or content from the gateway's log.
ROUTING_HEADER, ROUTING_DIGITS, ROUTING_BYTES = "X-SMG-Routing-Key", 4, 1 << 16
IMAGE = uuid4().hex  # placeholder in a body for an image's base64; random, so that no text contains it
# All other names mean stop. A content filter cuts an answer short, as an abort does.
FINISH_REASONS: dict[str, FinishReason] = {"length": "length", "abort": "abort", "content_filter": "abort"}


class RemoteEngine(Closing):
    """A connection to a server. `connect` finds out its kind; without it the server counts as plain OpenAI."""

    tokenizer = None

    def __init__(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self.server = Server()
        self.info = EngineInfo("remote", settings.model or "", "remote", "unknown", context_tokens=None)
        self._connection = Connection(settings)
        self._stream_options, self._limit = True, LIMIT
        self._noticed: set[str] = set()

    @classmethod
    async def connect(cls, settings: RemoteSettings) -> Self:
        """An engine whose server is reachable, ready and identified; else EngineError."""
        engine = cls(settings)
        try:
            await engine._probe(now() + min(PROBE_TIMEOUT_S, settings.timeout_s))
        except BaseException:
            await engine.aclose()
            raise
        return engine

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        request.refuse_scoring()
        path, body = self._body(request)
        deadline = now() + self.settings.timeout_s
        images = [image for message in request.messages for image in message.images]
        response = await self._open(path, body, images, deadline, _routing(request))
        answer = _StreamState(room=ANSWER_CHARS + TOKEN_CHARS * request.sampling.max_tokens)
        try:
            try:
                async with aclosing(self._events(path, response, deadline)) as events:
                    async for event in events:
                        chunk = self._read(answer, event)
                        if chunk is not None:
                            yield chunk
            except BrokenOffError:
                if answer.usage is None:  # the usage comes last: with it, the answer is complete
                    raise
            if answer.finish_reason is None:
                raise BrokenOffError(self._connection.where)
            usage = self._usage(answer, request)
            yield replace(
                answer.rest(),
                finish_reason=answer.finish_reason,
                usage=usage,
                reasoning_tokens=answer.reasoning_tokens,
            )
        finally:
            await response.aclose()  # where the answer is not complete, the server aborts it

    async def aclose(self) -> None:
        await self._connection.aclose()

    # Identifying the server

    async def _probe(self, deadline: float) -> None:
        cards = await self._models(deadline)
        model = self._choose(cards)
        card: dict[str, Any] = next((card for card in cards if card["id"] == model), {})
        length = card.get("max_model_len")  # of SGLang, vLLM and `ghostvis serve`
        self.info = replace(self.info, model=model, context_tokens=length if _is_count(length) else None)
        owner = cards[0].get("owned_by") if cards else None
        if owner == "ghostvis":
            self.server = Server("ghostvis")
            self.info = replace(self.info, **_facts(card.get("ghostvis")))
            return
        if owner == "vllm":
            self.server = Server("vllm", _version(await self._ask("version", deadline)))
            return
        # A gateway in front of SGLang may put its own name into the list of models.
        if owner != "sglang" and "is_generation" not in await self._ask("model_info", deadline):
            return
        with suppress(RefusedError):  # 0.5.17 lacks this route; later ones answer 503 until ready
            await self._connection.get("/ready", deadline)
        about = await self._ask("server_info", deadline)
        self.server = Server("sglang", _version(about), about.get("enable_cache_report"))
        self.info = replace(self.info, dtype=str(about.get("dtype", "unknown")))

    async def _models(self, deadline: float) -> list[dict[str, Any]]:
        try:
            body = await self._connection.get("/v1/models", deadline)
            return [card for card in json.loads(body)["data"] if isinstance(card["id"], str)]
        except RefusedError as error:
            if error.status == 404 and self.settings.model is not None:
                return []  # the server lacks this route; the model's name is given
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise EngineError(
                f"{self._connection.where} is no OpenAI-compatible server: /v1/models gave no list of models",
                hint=f"curl {self._connection.root}/v1/models",
            ) from error

    def _choose(self, cards: list[dict[str, Any]]) -> str:
        if self.settings.model is not None:
            return self.settings.model
        names: list[str] = [card["id"] for card in cards if not card.get("parent")]  # an adapter has a parent
        where, plain = self._connection.where, self._connection.plain
        if not names:
            raise EngineError(f"{where} serves no model", hint="read the server's log")
        if len(names) > 1:
            raise UsageError(
                f"{where} serves {len(names)} models, and none was chosen: {plain(', '.join(names))}",
                hint=f"--set engine.model={plain(names[0])}",
            )
        return names[0]

    async def _ask(self, route: str, deadline: float) -> dict[str, Any]:
        """The JSON of an optional route of SGLang, else empty. smg only has the route under its older name."""
        for path in (f"/{route}", f"/get_{route}"):
            with suppress(GhostvisError, ValueError, RecursionError):
                found = json.loads(await self._connection.get(path, deadline))
                if isinstance(found, dict):
                    return found
        return {}

    # Writing requests

    def _body(self, request: GenerateRequest) -> tuple[str, dict[str, Any]]:
        """Route and JSON body of a request, with the fields that this server knows."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.info.model,
            **({} if request.fit else {LIMIT: sampling.max_tokens}),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        for name in ("presence_penalty", "frequency_penalty"):
            if value := getattr(sampling, name):
                body[name] = value
        if sampling.json_schema is not None:
            schema = {"name": "answer", "schema": json.loads(sampling.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        self._add_extensions(body, request)
        if request.prompt is not None:
            logprobs = {} if sampling.logprobs is None else {"logprobs": sampling.logprobs}
            return "/v1/completions", {**body, "prompt": request.prompt, **logprobs}
        if request.messages[-1].role == "assistant":
            if self.server.kind not in ("sglang", "ghostvis"):
                raise InputError("this server does not continue an assistant's message: end with the user's")
            body["continue_final_message"] = True
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        messages = [{"role": message.role, "content": _content(message)} for message in request.messages]
        return "/v1/chat/completions", {**body, "messages": messages}

    def _add_extensions(self, body: dict[str, Any], request: GenerateRequest) -> None:
        if request.sampling.regex is not None:
            if self.server.kind not in ("sglang", "ghostvis"):
                raise RequestError("OpenAI's API has no field for a regular expression", hint="--schema FILE")
            body["regex"] = request.sampling.regex
        for name, no_effect in EXTENSIONS.items():
            value = getattr(request.sampling, name)
            if self.server.kind != "openai":  # neutral values too: the server may have other defaults
                body[name] = -1 if name == "top_k" and value == 0 else value
            elif value != no_effect:
                self._notice(name, f"this server was not sent {name} = {value}: it is no field of OpenAI's")
        if self.server.kind == "sglang" and request.messages:
            body["return_output_ids_in_sglext"] = True  # this route gives token ids only at a stream's end
        elif self.server.kind != "openai":
            body["return_token_ids"] = True

    def _notice(self, key: str, line: str) -> None:
        """Notify the user once for each key, not for each request."""
        if key not in self._noticed:
            self._noticed.add(key)
            self.info = replace(self.info, notices=(*self.info.notices, line))

    async def _open(
        self,
        path: str,
        body: dict[str, Any],
        images: "Sequence[EncodedImage]",
        deadline: float,
        headers: dict[str, str],
    ) -> httpx2.Response:
        """The response, its body unread. Retries with a field's other name where the server refuses the first."""
        sent = body | ({"stream_options": {"include_usage": True}} if self._stream_options else {})
        if self._limit != LIMIT and LIMIT in sent and "messages" in sent:
            sent[self._limit] = sent.pop(LIMIT)
        try:
            content = _written(sent, images)
            return await self._connection.open("POST", path, content, deadline, headers)
        except RefusedError as error:
            if error.status not in (400, 422):
                raise
            if "stream_options" in sent and "stream_options" in error.message:
                self._stream_options = False
            elif LIMIT in sent and "messages" in sent and _is_name_refused(error.message):
                self._limit = NEWER_LIMIT
            else:
                raise
            return await self._open(path, body, images, deadline, headers)

    async def _events(
        self, path: str, response: httpx2.Response, deadline: float
    ) -> AsyncGenerator[str, None]:
        """The events of a stream. The answer of a server that does not stream counts as one event."""
        kind = response.headers.get("content-type", "").lower()
        if kind.startswith("text/event-stream"):
            async with aclosing(self._connection.events(response, deadline)) as events:
                async for event in events:
                    yield event
            return
        whole = kind.startswith("application/json")
        text = await (
            self._connection.text(response, path, deadline) if whole else self._connection.words(response)
        )
        if not whole or not _is_answer(text):
            where, plain = self._connection.where, self._connection.plain
            raise RequestError(f"{where} answered {path} with {plain(kind)}, no stream: {plain(text)}")
        yield text

    # Reading answers

    def _read(self, answer: "_StreamState", event: str) -> Chunk | None:
        if event == DONE:
            answer.finish_reason = answer.finish_reason or "stop"
            return None
        answer.room -= len(event)
        if answer.room < 0:  # the answer would fill the memory
            raise RequestError(f"{self._connection.where} sent far more than was asked for")
        try:
            payload = json.loads(event)
            failure = _failure_in(payload)
            if failure is None:
                return answer.read(payload)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RequestError(
                f"{self._connection.where} sent an event of an unknown shape: {self._connection.plain(event)}"
            ) from error
        raise RequestError(
            f"{self._connection.where} broke the answer off: {self._connection.plain(failure)}"
        )

    def _usage(self, answer: "_StreamState", request: GenerateRequest) -> Usage:
        usage = answer.usage
        if usage is None:
            self._notice(
                "usage", "this server does not count tokens: a count of 0 means that it is not known"
            )
            return Usage(0, 0)
        if self.server.kind == "sglang":
            if not usage.image_tokens and any(message.images for message in request.messages):
                self._notice("images", "this server counted no tokens for an image: it may not have seen it")
            if self.server.cache_report is False:
                # Without --enable-cache-report SGLang still writes cached_tokens: 0 beside its image_tokens.
                usage = replace(usage, cached_tokens=None)
        return usage


def _routing(request: GenerateRequest) -> dict[str, str]:
    """A header with the same value for all requests that begin with the same image, or else the same text."""
    images = (image.data for message in request.messages for image in message.images)
    words = (message.text.encode() for message in request.messages if message.role == "user")
    first = next(images, None) or next(words, None)
    if first is None:
        return {}
    digest = hashlib.sha256(first[:ROUTING_BYTES])  # hashing takes a millisecond for each megabyte
    return {ROUTING_HEADER: digest.hexdigest()[:ROUTING_DIGITS]}


def _written(body: dict[str, Any], images: "Sequence[EncodedImage]") -> bytes:
    """The body as JSON. Images are inserted as bytes: the encoder would scan each of their characters."""
    first, *others = json.dumps(body).encode().split(IMAGE.encode())
    parts = [first]
    for image, text in zip(images, others, strict=True):
        parts += image.base64(), text
    return b"".join(parts)


def _content(message: Message) -> str | list[dict[str, Any]]:
    """OpenAI's form of a turn: plain text, or with images a list of parts in order.

    GhostVis was trained with a line break after an image, which the server's template adds. It is removed
    here, since it would be in the prompt twice.
    """
    if message.role == "system" and message.images:
        raise InputError("a system message can't hold an image: attach it to a user message")
    parts: list[dict[str, Any]] = []
    after_image = False
    for part in message.parts:
        if isinstance(part, ImagePart):
            parts.append(
                {"type": "image_url", "image_url": {"url": f"data:{part.image.mime};base64,{IMAGE}"}}
            )
        elif isinstance(part, Text):
            text = part.text.removeprefix("\n") if after_image else part.text
            if parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += text
            elif text:
                parts.append({"type": "text", "text": text})
        else:
            raise RequestError("a server can't be sent tool turns: OpenAI's messages have no such part")
        after_image = isinstance(part, ImagePart)
    return parts if message.images else message.text


def _is_name_refused(words: str) -> bool:
    """Whether a refusal is about the name max_tokens, and not about its value."""
    return LIMIT in words and not re.search(
        r"too (large|big|long)|at (most|least)|less|greater|exceed|(must|should) be|context", words
    )


def _is_answer(text: str) -> bool:
    """Whether it is an answer, and not an error in place of one."""
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(payload, dict) and bool(payload.get("choices") or payload.get("error"))


def _failure_in(payload: dict[str, Any]) -> str | None:
    """The server's error in the middle of an answer, in any of its forms."""
    # The fields of an `event: error`.
    bare = "choices" not in payload and (payload.get("message") or payload.get("detail"))
    if payload.get("object") == "error" or payload.get("error") or bare:
        return said(payload)
    for choice in payload.get("choices") or ():
        reason = choice.get("finish_reason")
        # An abort on a client's request has no status: it is an end, not an error.
        if isinstance(reason, dict) and reason.get("type") == "abort" and reason.get("status_code"):
            return said(reason)
    return None


@dataclass
class _StreamState:
    """What is gathered from a stream's events. `room`: how many more characters are accepted."""

    room: int
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    reasoning_tokens: int | None = None
    late_token_ids: tuple[int, ...] = ()
    joiners: defaultdict[str, SurrogateJoiner] = field(default_factory=lambda: defaultdict(SurrogateJoiner))

    def read(self, payload: dict[str, Any]) -> Chunk | None:
        if payload.get("usage"):
            self.usage = _usage(payload["usage"])
            self.reasoning_tokens = _reasoning_tokens(payload["usage"])
        late = (payload.get("sglext") or {}).get("output_ids")
        if late:
            self.late_token_ids = tuple(late[0])
        for choice in payload.get("choices") or ():
            reason = choice.get("finish_reason")
            if reason:
                name = reason["type"] if isinstance(reason, dict) else reason
                self.finish_reason = FINISH_REASONS.get(name, "stop")
            said = choice.get("delta") or choice.get("message") or {}  # the second where nothing is streamed
            ids = tuple(choice.get("token_ids") or ())
            given = choice.get("logprobs")
            chunk = Chunk(
                self._joined("text", choice.get("text") or said.get("content")),
                ids,
                _logprobs(given, ids) if given else (),
                reasoning=self._joined("reasoning", _first_of(said, REASONING)),
                refusal=self._joined("refusal", said.get("refusal")),
                tool_calls=tuple(map(self._tool_call, _tool_calls(said))),
            )
            if chunk.generated or chunk.logprobs:
                return chunk
        return None

    def rest(self) -> Chunk:
        """The text held back until the end."""
        rest = {name: joiner.finish() for name, joiner in self.joiners.items()}
        text, reasoning, refusal = (rest.pop(name, "") for name in ("text", "reasoning", "refusal"))
        calls = tuple(ToolCall(int(index), arguments=half) for index, half in rest.items() if half)
        return Chunk(text, self.late_token_ids, reasoning=reasoning, refusal=refusal, tool_calls=calls)

    def _joined(self, name: str, text: Any) -> str:
        if not text:
            return ""
        if not isinstance(text, str):
            raise TypeError(f"{name} that is no text")
        return self.joiners[name].push(text)

    def _tool_call(self, call: dict[str, Any]) -> ToolCall:
        index, function = int(call.get("index") or 0), call.get("function") or {}
        arguments = self._joined(str(index), function.get("arguments"))
        return ToolCall(index, str(call.get("id") or ""), str(function.get("name") or ""), arguments)


def _first_of(delta: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The first value that is not empty, since servers have several names for the same."""
    value = next(filter(None, map(delta.get, keys)), "")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tool_calls(delta: dict[str, Any]) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's present form, or in its earlier one."""
    old = delta.get("function_call")
    return delta.get("tool_calls") or ([{"function": old}] if old else [])


def _reasoning_tokens(usage: dict[str, Any]) -> int | None:
    """The count of reasoning tokens, from OpenAI's field or SGLang's."""
    details = usage.get("completion_tokens_details") or {}
    count = details.get("reasoning_tokens", usage.get("reasoning_tokens"))
    return count if _is_count(count) else None


def _usage(usage: dict[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    return Usage(
        prompt_tokens=_count(usage["prompt_tokens"]),
        completion_tokens=_count(usage.get("completion_tokens", 0)),
        cached_tokens=None if cached is None else _count(cached),
        image_tokens=_count(details.get("image_tokens")),
    )


def _count(value: Any) -> int:
    """A count of tokens; null is 0. ValueError for what is none."""
    if value is not None and not _is_count(value):
        raise ValueError("a count that is no count")
    return value or 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_TOKENS


def _version(about: dict[str, Any]) -> str | None:
    """The version as one printable line, or nothing."""
    value = about.get("version")
    return printable(value) if isinstance(value, str) and value else None


def _facts(about: Any) -> dict[str, Any]:
    """The known fields of a model's card that have valid types."""
    given = about if isinstance(about, dict) else {}
    words = {name: given[name] for name in OUR_WORDS if isinstance(given.get(name), str)}
    return words | {name: given[name] for name in OUR_NUMBERS if _is_count(given.get(name))}


def _logprobs(given: dict[str, Any], ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
    """The chat route has an object for each token, the completion route a list for each property."""
    if "content" in given:
        entries = given["content"] or []
        chosen = [entry["logprob"] for entry in entries]
        tops = [[top["logprob"] for top in entry.get("top_logprobs") or ()] for entry in entries]
    else:
        chosen = given.get("token_logprobs") or []
        tops = [list((top or {}).values()) for top in given.get("top_logprobs") or [{}] * len(chosen)]
    known = ids if len(ids) == len(chosen) else (UNKNOWN_TOKEN,) * len(chosen)
    return tuple(
        TokenLogprob(id_, float(logprob), tuple((UNKNOWN_TOKEN, float(other)) for other in top))
        for id_, logprob, top in zip(known, chosen, tops, strict=True)
    )
