"""What /openapi.json says: routes, bodies and answers, as OpenAPI 3.1. Built from the parser's own tables.

A field that is absent here is refused (see `openai_fields`). Ranges are those of `Sampling`, and a test
keeps them so; what a model can hold besides is its own matter.
"""

from typing import Any, TypeAlias

from ghostvis_cli.serve import openai_fields as fields
from ghostvis_cli.serve.openai_fields import Kind, Known
from ghostvis_cli.serve.openai_types import MAX_N, MAX_PROMPTS, MAX_STOPS, ROLES
from ghostvis_cli.version import __version__

Schema: TypeAlias = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}


def optional(kind: str, text: str | None = None, **rules: Any) -> Schema:
    """A field of a request: null is the same as absent."""
    return {"type": [kind, "null"], **rules, **({"description": text} if text else {})}


def stops(most: int) -> Schema:
    text = {**STRING, "minLength": 1}
    return {"anyOf": [text, {"type": "array", "items": text, "maxItems": most}, {"type": "null"}]}


def closed(known: Known, *required: str, **properties: Schema) -> Schema:
    """An object of a request: what is read, what is ignored, what must ask for nothing, and nothing else."""
    assert set(properties) == known.read
    others: Schema = {name: {"description": "Not looked at."} for name in sorted(known.ignored)}
    others |= {name: {"enum": [*values, None]} for name, values in sorted(known.neutral.items())}
    null: Schema = {"type": "null"}
    found: Schema = {"type": "object", "properties": {**properties, **others}, "additionalProperties": null}
    return found | {"required": list(required)}


# Fields of both generating routes.
SAMPLING: Schema = {
    "model": optional("string", "The served model's name; absent or empty: whatever is served."),
    "max_tokens": optional("integer", "Not looked at beside max_completion_tokens."),
    "max_completion_tokens": optional("integer", minimum=1, maximum=1_000_000),
    "temperature": optional("number", "0 takes the likeliest token.", minimum=0, maximum=100),
    "top_p": optional("number", minimum=1e-9, maximum=1),
    "top_k": optional("integer", "0 or -1: all. Beyond OpenAI.", minimum=-1, maximum=1_000_000),
    "min_p": optional("number", "Beyond OpenAI.", minimum=0, maximum=1),
    "repetition_penalty": optional("number", "Beyond OpenAI.", minimum=1e-3, maximum=1e3),
    "ignore_eos": optional("boolean", "Beyond OpenAI."),
    "stop": stops(MAX_STOPS),
    "seed": optional("integer", minimum=0, maximum=2**63 - 1),
    "n": optional("integer", minimum=1, maximum=MAX_N),
    "stream": optional("boolean", "Answer with server-sent events, the last one [DONE]."),
    "stream_options": {
        "anyOf": [closed(fields.STREAM_OPTIONS, include_usage=optional("boolean")), {"type": "null"}]
    },
    "return_token_ids": optional("boolean", "Beyond OpenAI: token_ids in every choice."),
}
IMAGE_URL: Schema = {
    **STRING,
    "description": "A data: URL; http(s) only from the hosts that the server was started with.",
}
PARTS: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "oneOf": [
            closed(fields.TEXT_PART, "type", "text", type={"const": "text"}, text=STRING),
            closed(
                fields.IMAGE_PART,
                "type",
                "image_url",
                type={"const": "image_url"},
                image_url={"anyOf": [closed(fields.IMAGE_URL, "url", url=IMAGE_URL), IMAGE_URL]},
            )
            | {"description": "In a user's message only."},
        ]
    },
}
MESSAGE = closed(
    fields.MESSAGE, "role", "content", role={"enum": list(ROLES)}, content={"anyOf": [STRING, PARTS]}
)
BODIES: dict[Kind, Schema] = {
    "chat": closed(
        fields.BODY["chat"],
        "messages",
        **SAMPLING,
        messages={"type": "array", "items": MESSAGE, "minItems": 1},
        logprobs=optional("boolean"),
        top_logprobs=optional("integer", "Needs logprobs: true.", minimum=0, maximum=20),
    ),
    "text": closed(
        fields.BODY["text"],
        "prompt",
        **SAMPLING,
        prompt={
            "anyOf": [STRING, {"type": "array", "items": STRING, "minItems": 1, "maxItems": MAX_PROMPTS}]
        },
        logprobs=optional("integer", "Alternatives a token.", minimum=0, maximum=20),
    ),
}


def fixed(**fields: Schema) -> Schema:
    """An object of an answer, in which all of these are."""
    return {"type": "object", "properties": fields, "required": list(fields)}


USAGE = fixed(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details={
        "type": "object",
        "properties": {"image_tokens": INTEGER, "cached_tokens": INTEGER},
        "required": ["image_tokens"],
        "description": "cached_tokens is absent where the engine does not report it.",
    },
)
ERROR = fixed(
    error=fixed(
        message=STRING, type=STRING, param={"type": ["string", "null"]}, code={"type": ["string", "null"]}
    )
)
CARD = fixed(
    id=STRING,
    object={"const": "model"},
    created=INTEGER,
    owned_by=STRING,
    max_model_len={"type": ["integer", "null"]},
    ghostvis={"type": "object", "description": "Layout, image tokens, device, source, tag and step."},
)


def answer(object_: str, **content: Schema) -> Schema:
    choice = fixed(index=INTEGER, **content, finish_reason={"enum": ["stop", "length", "abort"]})
    choice["properties"] |= {
        "logprobs": {"type": ["object", "null"]},
        "token_ids": {"type": "array", "items": INTEGER},
    }
    choices: Schema = {"type": "array", "items": choice}
    return fixed(
        id=STRING, object={"const": object_}, created=INTEGER, model=STRING, choices=choices, usage=USAGE
    )


def json_content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def route(summary: str, content: Schema, *, body: Schema | None = None, **more: Any) -> Schema:
    errors = {"description": "A refusal, in OpenAI's shape.", "content": json_content(ERROR)}
    found = {
        "summary": summary,
        "responses": {"200": {"description": "OK", "content": content}, "4XX": errors, "5XX": errors},
        **more,
    }
    return (
        found if body is None else {**found, "requestBody": {"required": True, "content": json_content(body)}}
    )


def probe(summary: str, *states: str) -> Schema:
    """A route for probes, without a key: its body says the state whatever its status."""
    content = json_content(fixed(status={"enum": list(states)}))
    found = route(summary, content, security=[])
    found["responses"]["5XX"] = {"description": "Not yet, or no more.", "content": content}
    return found


def generating(summary: str, kind: Kind, schema: Schema) -> Schema:
    return route(summary, {**json_content(schema), "text/event-stream": {}}, body=BODIES[kind])


CHAT_MESSAGE = fixed(role={"const": "assistant"}, content=STRING, refusal={"type": "null"})
MODEL_NAME: Schema = {"name": "model", "in": "path", "required": True, "schema": STRING}
DESCRIPTION: Schema = {
    "openapi": "3.1.0",
    "info": {"title": "ghostvis serve", "version": __version__},
    "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    "security": [{}, {"key": []}],  # a server that was started without a key wants none
    "paths": {
        "/healthz": {"get": probe("Whether the process lives", "ok")},
        "/health": {"get": probe("As /readyz, by SGLang's name", "ready", "loading", "draining")},
        "/readyz": {"get": probe("Whether the model is loaded and warm", "ready", "loading", "draining")},
        "/metrics": {"get": route("Prometheus metrics", {"text/plain": {"schema": STRING}})},
        "/v1/models": {
            "get": route(
                "The model served",
                json_content(fixed(object={"const": "list"}, data={"type": "array", "items": CARD})),
            )
        },
        "/v1/models/{model}": {
            "get": route("The model, by its name", json_content(CARD), parameters=[MODEL_NAME])
        },
        "/v1/chat/completions": {
            "post": generating("Answer a conversation", "chat", answer("chat.completion", message=CHAT_MESSAGE))
        },
        "/v1/completions": {
            "post": generating("Continue a text", "text", answer("text_completion", text=STRING))
        },
        "/tokenize": {
            "post": route(
                "The token ids of a text",
                json_content(
                    fixed(
                        tokens={"type": "array", "items": INTEGER},
                        count=INTEGER,
                        max_model_len={"type": ["integer", "null"]},
                    )
                ),
                body=closed(fields.TOKENIZE, "prompt", model=SAMPLING["model"], prompt=STRING),
            )
        },
        "/openapi.json": {
            "get": route("This description", json_content({"type": "object", "required": ["openapi"]}))
        },
    },
}  # fmt: skip
