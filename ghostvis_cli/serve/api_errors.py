"""Failures as OpenAI's clients expect them: a status, and `{"error": {message, type, param, code}}`."""

import logging
from typing import Any

from ghostvis_cli.errors import (
    ContextLengthError,
    EngineError,
    GhostvisError,
    InputError,
    MemoryLimitError,
    RequestError,
    UsageError,
)
from ghostvis_cli.openai.schema import BodyError

log = logging.getLogger("ghostvis.serve")

MESSAGE_LIMIT = 500  # characters: whatever a message quotes, a response stays small
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A failure and its status. The message says what is wrong, and never repeats what was sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        message = self.message if len(self.message) <= MESSAGE_LIMIT else f"{self.message[:MESSAGE_LIMIT]}..."
        kind = TYPES.get(self.status, default)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def too_long(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def no_route(status: int, allowed: str | None) -> ApiError:
    """404 or 405. `allowed` is what the header Allow says."""
    if status == 405:
        return ApiError(405, f"this route takes {allowed}", code="method_not_allowed")
    return ApiError(status, "no such route; /openapi.json lists all", code="unknown_url")


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """The failure as the client sees it. A bug's message stays in the log, under the request's id."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return too_long(error.message)
        case BodyError():
            return ApiError(400, error.message, param=error.param, code=error.api_code)
        case InputError() | RequestError() | UsageError():
            return ApiError(400, error.message)
        case MemoryLimitError():
            return ApiError(503, error.message, code="out_of_memory", retry_after_s=1)
        case EngineError():
            return ApiError(503, error.message, code="engine_unavailable", retry_after_s=1)
        case GhostvisError():
            log.error("%s id=%s", error.message, request_id)
        case _:
            log.error("a bug: id=%s", request_id, exc_info=error)
    return ApiError(500, f"internal error; the server's log has it under {request_id}", code="internal_error")
