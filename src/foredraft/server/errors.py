"""Errors as clients see them: OpenAI's shape, the right status, and no secrets.

Owns the mapping from our exceptions to answers. Knows nothing of handlers.
"""

from dataclasses import dataclass, field
from typing import Any

from foredraft.errors import (
    CacheMemoryError,
    ForedraftError,
    ModelError,
    PromptTooLongError,
    RequestError,
    StoppedError,
)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    411: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
    507: "unavailable_error",
}


@dataclass(slots=True)
class ApiError(Exception):
    """An answer that is no success. `param` is the field that is wrong; `code` is for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's shape; `detail` is what Xinference's client reads."""
        kind = TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "detail": self.message}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception; of one that nobody foresaw only that it happened."""
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, PromptTooLongError):
        return ApiError(400, message, code="context_length_exceeded")
    if isinstance(error, RequestError | ModelError):
        return ApiError(400, message)
    if isinstance(error, CacheMemoryError):
        return ApiError(503, message, code="out_of_memory")
    if isinstance(error, StoppedError):
        return ApiError(503, "the model was stopped before this request was finished", code="stopped")
    if isinstance(error, ForedraftError):
        return ApiError(500, message)
    return ApiError(500, "the model failed on this request; the server's log has the reason", code="internal_error")
