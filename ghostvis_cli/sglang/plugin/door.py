"""`ghostvis serve`'s rules on SGLang's own HTTP server: access, and no ignored fields.

Only where `ghostvis serve` has started SGLang, which passes the rules in an environment variable.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ghostvis_cli.errors import InputError
from ghostvis_cli.openai import schema
from ghostvis_cli.openai.schema import Kind, Known
from ghostvis_cli.serve.api_errors import ApiError, as_api_error, no_route
from ghostvis_cli.serve.door import Door, without_slash
from ghostvis_cli.serve.settings import ServerSettings

VARIABLE = "GHOSTVIS_SERVE"
ROUTES: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}
OPEN_PATHS = ("/health", "/ready")
PROBED = (*OPEN_PATHS, "/v1/models")
# SGLang has these fields, and ignores them for models such as ours.
NOT_FOLLOWED = frozenset((
    "tools", "tool_choice", "suffix", "best_of", "chat_template_kwargs", "thinking", "task", "images_config",
    "video_config", "use_audio_in_video", "max_dynamic_patch", "min_dynamic_patch", "mm_processor_kwargs",
))  # fmt: skip
# 0.5.17 lacks the second.
NEUTRAL = {"use_audio_in_video": (False,), "return_output_ids_in_sglext": (True, False)}
TOO_LONG = re.compile(
    r"longer than the model's context|(maximum|model's) context length|maximum allowed length"
)
OUT_OF_RANGE = re.compile(r"'?([a-z_]+)'? must be ")
ASKS = {"OpenAIServingChat": "messages", "OpenAIServingCompletion": "prompt"}  # a route's prompt
# Parts of pydantic's locations.
FIELD, TYPES = re.compile(r"[a-z]\w*"), ("str", "int", "float", "bool", "dict", "list")
NO_ANSWER = "ghostvis.no_answer"  # in the scope of a request for a prompt's own log-probabilities
SPELLED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}


@dataclass(frozen=True)
class Rules(Door):
    """The rules for SGLang's process. `max_tokens` None: an answer may take the rest of the context.

    `keys`: a file with the clients' keys, where SGLang itself checks none: with several processes.
    """

    max_tokens: int | None = None
    keys: str | None = None

    @classmethod
    def of(cls, settings: ServerSettings, **more: Any) -> Self:
        return super().of(settings, max_tokens=settings.max_tokens, **more)

    @classmethod
    def told(cls) -> "Rules | None":
        """None for an SGLang that `ghostvis serve` did not start."""
        text = os.environ.get(VARIABLE)
        return None if text is None else cls(**json.loads(text))

    def as_variable(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def install(rules: Rules) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    base = "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase"
    completion = "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion"
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    for target, hook, kind in (
        (
            "sglang.srt.entrypoints.http_server.app.build_middleware_stack",
            lambda: put_in_front(rules),
            HookType.BEFORE,
        ),
        (f"{base}.create_error_response", with_code, HookType.AFTER),
        (f"{completion}._convert_to_internal_request", without_hidden_limit, HookType.AFTER),
        (
            f"{manager}._validate_one_request",
            lambda *args, **_: limit_answer(rules.max_tokens, *args),
            HookType.BEFORE,
        ),
    ):
        HookRegistry.register(target, hook, kind)


def put_in_front(rules: Rules) -> None:
    """Install our middleware outermost, in place of SGLang's CORS for all origins; keys are checked first."""
    from fastapi.exceptions import RequestValidationError
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest

    known: dict[Kind, Known] = {
        "chat": _known("chat", ChatCompletionRequest.model_fields),
        "text": _known("text", CompletionRequest.model_fields),
    }
    if rules.keys is not None:
        check_keys(app, json.loads(Path(rules.keys).read_bytes()))
    others = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    app.user_middleware = [
        Middleware(RequestMiddleware, door=rules), *others, Middleware(FieldCheck, known=known)
    ]  # fmt: skip
    theirs = app.exception_handlers[RequestValidationError]

    async def told(request: Any, error: Any) -> Response:
        """SGLang's own message has paths of its files and names no field."""
        ours = request.scope["path"] in ROUTES
        return _refused(invalid(error.errors())) if ours else await theirs(request, error)

    app.exception_handlers[RequestValidationError] = told
    app.exception_handlers[HTTPException] = no_such_route  # from routing; SGLang raises FastAPI's class


def check_keys(app: Any, keys: Mapping[str, str]) -> None:
    """What SGLang does itself where a single process takes requests."""
    from sglang.srt.utils.auth import add_api_key_middleware

    add_api_key_middleware(app, api_key=keys.get("api-key"), admin_api_key=keys.get("admin-api-key"))


def _known(kind: Kind, theirs: Iterable[str]) -> Known:
    ours = schema.BODY[kind].known()
    return Known(frozenset(theirs) - NOT_FOLLOWED, ours.ignored, {**ours.neutral, **NEUTRAL})


class RequestMiddleware:
    """Around every request: hosts, origins, and paths with a slash at their end."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = without_slash(scope)
        if scope["method"] == "HEAD" and scope["path"] in PROBED:  # SGLang says 405; uvicorn drops the body
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        cors = self.door.cors(headers)

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(cors)
            await send(message)

        try:
            answer = self._check(scope, headers) or self.app
        except ApiError as refusal:
            answer = _refused(refusal)
        await answer(scope, receive, send_with_cors)

    def _check(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        if scope["path"] not in OPEN_PATHS:
            self.door.check(headers)
        allowed = self.door.preflight(scope["method"], headers)
        return None if allowed is None else Response(status_code=204, headers=allowed)


class FieldCheck:
    """In front of OpenAI's routes: 400 for a body with a field that is not read."""

    def __init__(self, app: ASGIApp, known: Mapping[Kind, Known]) -> None:
        self.app, self.known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = ROUTES.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if kind is None:
            await self.app(scope, receive, send)
            return
        messages = await _whole_body(receive)
        try:
            values = check(b"".join(message.get("body", b"") for message in messages), self.known[kind])
        except (ApiError, InputError) as refusal:
            await _refused(as_api_error(refusal, ""))(scope, receive, send)
            return
        if kind == "text" and _is_zero(values.pop("max_tokens", None)):
            scope = {**scope, NO_ANSWER: True}
            messages = [{"type": "http.request", "body": json.dumps(values).encode()}]
        replayed = iter(messages)

        async def again() -> Message:
            return next(replayed, None) or await receive()

        await self.app(scope, again, send)


async def _whole_body(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


class StreamOptions(schema.StreamOptions):
    continuous_usage_stats: bool | None = None


def check(body: bytes, known: Known) -> dict[str, Any]:
    """The body, or ApiError for a field that SGLang would ignore. Invalid JSON is left for SGLang to refuse."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    if bad := known.bad_field(values):
        raise ApiError(400, f"{bad.name} {bad.rule}", param=bad.name, code=bad.code)
    if values.get("top_logprobs") and not values.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if values.get("n") == 0:
        raise ApiError(400, "n must be at least 1", param="n")
    if values.get("stream_options") is not None:
        schema.read(StreamOptions, values["stream_options"], "stream_options")
    if "messages" in values and "messages" in known.read:
        schema.read(schema.Conversation, {"messages": values["messages"]})
    return values


def _is_zero(limit: object) -> bool:
    return type(limit) is int and limit == 0


async def no_such_route(request: Any, error: Any) -> Response:
    refusal = no_route(error.status_code, (error.headers or {}).get("Allow"))
    return JSONResponse(refusal.body(), error.status_code, error.headers)


def _refused(refusal: ApiError) -> JSONResponse:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first error that pydantic found, and its field."""
    where, says = errors[0].get("loc", ()), errors[0].get("msg", "is not valid")
    if errors[0].get("type") == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    param = ""
    for step in where[1:] if where[:1] == ("body",) else ():
        if isinstance(step, int):
            param += f"[{step}]"
        elif FIELD.fullmatch(step) and step not in TYPES:
            param += f".{step}" if param else step
        else:
            break  # a member of a union, as pydantic names it
    rule = schema.rule_of(errors[0])
    says = f": {says}" if rule is None else f" {rule}"
    return ApiError(400, f"{param or 'the body'}{says}", param=param or None)


def with_code(response: Any, route: Any, *_: Any, **__: Any) -> Any:
    """Add to SGLang's refusals OpenAI's code for too long a context, and the name of a field out of range."""
    if response.status_code != 400:
        return response
    said = json.loads(response.body)
    message = str(said.get("message"))
    if TOO_LONG.search(message):
        asks = ASKS.get(type(route).__name__)
        said |= {"code": "context_length_exceeded", "type": "invalid_request_error", "param": asks}
    elif (named := OUT_OF_RANGE.match(message)) and said.get("param") is None:
        said |= {"param": SPELLED.get(named[1], named[1])}
    return JSONResponse(said, response.status_code)


def without_hidden_limit(result: tuple[Any, Any], _: Any, request: Any, raw: Any) -> None:
    """Without a limit SGLang would end a completion after 16 tokens, and its route refuses a limit of 0."""
    if "max_tokens" not in request.model_fields_set:
        result[0].sampling_params["max_new_tokens"] = 0 if NO_ANSWER in raw.scope else None


def limit_answer(max_tokens: int | None, manager: Any, request: Any, input_ids: Any, *_: Any) -> None:
    """Give an answer without a limit the server's, or the rest of the context."""
    sampling = request.sampling_params or {}
    if max_tokens is not None and sampling.get("max_new_tokens", 0) is None:
        left = manager.context_len - len(input_ids or ())
        request.sampling_params = {**sampling, "max_new_tokens": max(1, min(max_tokens, left))}
