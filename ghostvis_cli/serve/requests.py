"""A request's body -> requests for the engine, within the limits of one request."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from ghostvis_cli.engines.base import MOST_TOKENS, EngineInfo, GenerateRequest
from ghostvis_cli.errors import InputError
from ghostvis_cli.fetch import is_from
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.openai import schema
from ghostvis_cli.openai.answers import Call
from ghostvis_cli.prompt import ImagePart, Message, Text, with_line_breaks
from ghostvis_cli.serve.api_errors import ApiError, too_long
from ghostvis_cli.serve.settings import Served, ServerSettings

PIXELS_PER_REQUEST = 4  # times the limit of one image, so that many small files can't fill the memory
# Bytes of text: what any body may have, and the most for each token, JSON's escapes included.
SMALL_TEXT_BYTES, TOKEN_BYTES = 2**20, 128
IMAGE = re.compile(rb'"data:[^"]{256,}"')


@dataclass(frozen=True)
class RequestReader:
    """Reads bodies for one model. Blocks while images are decoded or fetched: call it in a thread."""

    settings: ServerSettings
    served: Served

    @cached_property
    def model(self) -> str:
        return self.served.name(self.settings)

    @property
    def _context(self) -> int | None:
        return self.served.engine.info.context_tokens

    def read(self, kind: schema.Kind, body: bytes | bytearray) -> Call:
        asked = schema.read(schema.BODY[kind], self._parsed(body))
        self._check_model(asked.model)
        if asked.top is not None and self.served.vocabulary is None:
            raise ApiError(400, "logprobs is not supported by this server's engine", param="logprobs")
        default = replace(self.settings.sampling, max_tokens=self._most_tokens)
        sampling = replace(asked.sampling(default), logprobs=asked.top)
        if isinstance(asked, schema.ChatBody):
            prompts = [GenerateRequest(self._messages(asked), sampling=sampling)]
        else:
            prompts = [
                GenerateRequest(
                    prompt=prompt if isinstance(prompt, str) else None,
                    prompt_ids=None if isinstance(prompt, str) else prompt,
                    sampling=sampling,
                    prompt_logprobs=asked.top if asked.echo else None,
                    answer=asked.limit != 0,
                )
                for prompt in asked.prompt
            ]
        fit, n = asked.limit is None, asked.n or 1
        return Call(
            kind=kind,
            requests=tuple(choice for each in prompts for choice in _choices(replace(each, fit=fit), n)),
            n=n,
            stream=bool(asked.stream),
            include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
            token_ids=bool(asked.return_token_ids),
            echo=isinstance(asked, schema.TextBody) and bool(asked.echo),
        )

    def read_tokenize(self, body: bytes | bytearray) -> str:
        asked = schema.read(schema.TokenizeBody, self._parsed(body))
        self._check_model(asked.model)
        return asked.prompt

    def _parsed(self, body: bytes | bytearray) -> object:
        """Strict JSON: no NaN, and one error for whatever Python's parser fails on.

        It takes seconds and gigabytes for a body of millions of small values, so more text than fits the context
        is refused unparsed. Images are not counted.
        """
        if self._context is not None:
            text_bytes = len(body) - sum(found.end() - found.start() for found in IMAGE.finditer(body))
            if text_bytes > SMALL_TEXT_BYTES + TOKEN_BYTES * self._context:
                raise too_long(
                    f"{text_bytes:,} bytes of text can't fit the model's {self._context} positions"
                )
        try:
            values = json.loads(body, parse_constant=_no_constant)
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None
        except ValueError:
            raise ApiError(400, "the body is not valid JSON") from None
        self._check_number(values)
        return values

    def _check_number(self, values: object) -> None:
        """Refuse more messages and parts than the context has positions, before looking at any."""
        messages = values.get("messages") if isinstance(values, dict) else None
        if not isinstance(messages, list) or self._context is None:
            return
        contents = (message.get("content") for message in messages if isinstance(message, dict))
        count = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
        if count > self._context:
            message = f"{count:,} messages and parts can't fit the model's {self._context} positions"
            raise too_long(message, "messages")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.model, *self.settings.aliases):
            message = f"the model asked for is not served here; this server has {self.model}"
            raise ApiError(404, message, param="model", code="model_not_found")

    @property
    def _most_tokens(self) -> int:
        """The limit where the client names none: the server's, else the whole context."""
        return self.settings.max_tokens or min(self._context or MOST_TOKENS, MOST_TOKENS)

    def _messages(self, asked: schema.ChatBody) -> tuple[Message, ...]:
        images = _Images(self.settings, self.served.engine.info)
        return tuple(
            Message(message.speaker, with_line_breaks([
                Text(part.text) if isinstance(part, schema.TextPart)
                else ImagePart(images.load(part.image_url.url, f"messages[{number}].content[{at}].image_url"))
                for at, part in enumerate(message.content)
            ]))
            for number, message in enumerate(asked.messages)
        )  # fmt: skip


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _choices(request: GenerateRequest, n: int) -> Iterable[GenerateRequest]:
    """One request a choice. A seed gives each choice its own, so that they differ and can be repeated."""
    sampling = request.sampling
    for number in range(n):
        seed = None if sampling.seed is None else (sampling.seed + number) % 2**63
        yield replace(request, sampling=replace(sampling, seed=seed))


class _Images:
    """Loads the images of one request, within its limits."""

    def __init__(self, settings: ServerSettings, info: EngineInfo) -> None:
        self.hosts = {host.lower() for host in settings.allowed_image_hosts}
        self.limits, self.info = settings.image_limits, info
        self.pixels_left = PIXELS_PER_REQUEST * self.limits.max_pixels
        self.tokens = 0

    def load(self, url: str, name: str) -> EncodedImage:
        """`name` is the field's, for messages."""
        self._make_room(name)
        if not self._allowed(url):
            hosts = ", ".join(sorted(self.hosts))
            allowed = f"a data: URL, or http(s) from {hosts}" if hosts else "a data: URL"
            raise ApiError(400, f"{name} must be {allowed}", param=name, code="invalid_image_url")
        pixels = min(self.limits.max_pixels, self.pixels_left)
        # A redirect would lead from an allowed host to any other.
        limits = replace(self.limits, max_pixels=pixels, max_redirects=0)
        try:
            image = load_image(url, limits=limits)
        except InputError as error:
            raise ApiError(400, f"{name}: {error.message}", param=name, code="invalid_image") from error
        self.pixels_left -= image.width * image.height
        return image

    def _make_room(self, name: str) -> None:
        """Refuse more images than fit the context, before any is decoded."""
        if not self.info.image_tokens:
            raise ApiError(400, "this model reads text only, so it can't be given an image", param=name)
        self.tokens += self.info.image_tokens
        if self.info.context_tokens is not None and self.tokens > self.info.context_tokens:
            message = f"more images than fit the model's {self.info.context_tokens} positions"
            raise too_long(message, name)

    def _allowed(self, url: str) -> bool:
        return url[:5].lower() == "data:" or is_from(url, self.hosts)
