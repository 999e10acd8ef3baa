"""/openapi.json: routes, bodies and answers as OpenAPI 3.1. The bodies are the models in `schema`."""

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from ghostvis_cli.engines.base import FinishReason
from ghostvis_cli.openai.schema import BODY, Kind, TokenizeBody
from ghostvis_cli.version import __version__

Json: TypeAlias = dict[str, Any]


class Details(BaseModel):
    """cached_tokens is absent where the engine does not report it."""

    image_tokens: int
    cached_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Details


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    error: Problem


class Card(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    ghostvis: Json = Field(description="Layout, image tokens, device, source, tag and step.")


class Cards(BaseModel):
    object: Literal["list"]
    data: list[Card]


class Choice(BaseModel):
    index: int
    finish_reason: FinishReason
    logprobs: Json | None = None
    token_ids: list[int] = []


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    message: ChatMessage


class TextChoice(Choice):
    text: str


class Completion(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class ChatCompletion(Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(Completion):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int | None


class Life(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    status: Literal["ready", "loading", "draining"]


class Description(BaseModel):
    openapi: str


_ANSWERS = (Refusal, Cards, Card, ChatCompletion, TextCompletion, Tokens, Life, Readiness, Description)
_, SCHEMAS = models_json_schema(
    [(model, "validation") for model in (*BODY.values(), TokenizeBody, *_ANSWERS)],
    ref_template="#/components/schemas/{model}",
)


def json_content(model: type[BaseModel]) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def route(summary: str, content: Json, *, body: type[BaseModel] | None = None, **more: Any) -> Json:
    errors = {"description": "A refusal, in OpenAI's shape.", "content": json_content(Refusal)}
    responses = {"200": {"description": "OK", "content": content}, "4XX": errors, "5XX": errors}
    asked = {} if body is None else {"requestBody": {"required": True, "content": json_content(body)}}
    return {"summary": summary, "responses": responses, **asked, **more}


def probe(summary: str, model: type[BaseModel]) -> Json:
    """A route for probes, without a key: its body has the state, whatever its status."""
    found = route(summary, json_content(model), security=[])
    found["responses"]["5XX"] = {"description": "Not yet, or no more.", "content": json_content(model)}
    return found


def generating(summary: str, kind: Kind, answer: type[BaseModel]) -> Json:
    return route(summary, {**json_content(answer), "text/event-stream": {}}, body=BODY[kind])


MODEL_NAME: Json = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
PATHS: dict[str, tuple[Literal["get", "post"], Json]] = {
    "/healthz": ("get", probe("Whether the process lives", Life)),
    "/health": ("get", probe("As /readyz, by SGLang's name", Readiness)),
    "/readyz": ("get", probe("Whether the model is loaded and warm", Readiness)),
    "/metrics": ("get", route("Prometheus metrics", {"text/plain": {"schema": {"type": "string"}}})),
    "/v1/models": ("get", route("The model served", json_content(Cards))),
    "/v1/models/{model}": (
        "get",
        route("The model, by its name", json_content(Card), parameters=[MODEL_NAME]),
    ),
    "/v1/chat/completions": ("post", generating("Answer a conversation", "chat", ChatCompletion)),
    "/v1/completions": ("post", generating("Continue a text", "text", TextCompletion)),
    "/tokenize": ("post", route("The token ids of a text", json_content(Tokens), body=TokenizeBody)),
    "/openapi.json": ("get", route("This description", json_content(Description))),
}
DESCRIPTION: Json = {
    "openapi": "3.1.0",
    "info": {"title": "ghostvis serve", "version": __version__},
    "components": {
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        "schemas": SCHEMAS["$defs"],
    },
    "security": [{}, {"key": []}],  # a server that was started without a key wants none
    "paths": {path: {method: operation} for path, (method, operation) in PATHS.items()},
}
