"""Errors as clients see them: OpenAI's shape, the right status, and no secrets.

Owns the mapping from our exceptions to answers. Knows nothing of handlers.
"""

import json
import re
from collections.abc import Mapping, Sequence
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
from foredraft.server.settings import show_bytes

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
SCALAR = str | int | float | None
MUST = {  # be, by what pydantic found it not to be
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "list_type": "a list",
    "literal_error": "{expected}",
    "none_required": "null",
    "string_too_long": "text of at most {max_length} characters",
    "string_too_short": "text of at least {min_length} characters",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
}
SHOWN = 60  # characters of a value
FORM = re.compile(r"str|int|float|bool|constrained-str|(list|dict|literal|nullable)\[.*\]")  # pydantic's, of a union


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


def check_room(name: str, needed: int, room: int) -> None:
    """Raises ApiError where a model needs more bytes than there are."""
    if needed > room:
        advice = "delete a model, launch this one with a smaller max_model_len, or raise --memory-budget"
        raise ApiError(
            507,
            f"{name[:100]!r} needs {show_bytes(needed)}, and {show_bytes(room)} of the memory budget are left: "
            f"{show_bytes(needed - room)} too much; {advice}",
            code="memory_budget",
        )


def invalid_body(errors: Sequence[Mapping[str, Any]], content_type: str) -> ApiError:
    """What is wrong with a body, in one sentence, from pydantic's list; of the body no more than a bad value."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "missing" and tuple(first["loc"]) == ("body",):
        return ApiError(400, "the body is empty; send a JSON object")
    if first["type"] == "refused":
        return ApiError(400, str(first["msg"]), first["ctx"]["name"])
    if tuple(first["loc"]) == ("body",) and "json" not in content_type:
        was = f"this was {content_type!r}" if content_type else "this had none"
        return ApiError(400, f"send the body with 'Content-Type: application/json'; {was}")
    if tuple(first["loc"]) == ("body",) and str(first["type"]).endswith("_type"):
        return ApiError(400, f"the body is {_shown(first)}; send a JSON object")
    at, message = _what(first, errors)
    param = ".".join(map(str, at)) or None
    return ApiError(400, f"{param}: {message}" if param else message, param)


def _what(first: Mapping[str, Any], errors: Sequence[Mapping[str, Any]]) -> tuple[Sequence[object], str]:
    """Where it is wrong, and how. Of a value that may have several forms, what the one that came closest lacks."""
    if first["type"] == "field":
        return _fields(first), str(first["msg"])
    place = _fields(first)
    tried = [error for error in errors if _fields(error)[: len(place)] == place]
    forms = list(dict.fromkeys(form for error in tried if (form := _form(error, place))))
    if not forms:
        return place, _told(first)
    close = [error for error in tried if not str(error["type"]).endswith("_type")]
    if close:
        best = max(close, key=lambda error: len(error["loc"]))
        return _fields(best), _told(best)
    return place, f"it must be {' or '.join(forms)}; it was {_shown(first)}"


def _told(error: Mapping[str, Any]) -> str:
    """What it must be, and the value unless the words have it."""
    words, kind = str(error["msg"]), str(error["type"])
    if kind in ("value_error", "field"):
        return words.removeprefix("Value error, ")
    if kind == "missing":
        return "it is missing; give it"
    if kind in MUST:
        words = f"it must be {MUST[kind].format(**error.get('ctx', {}))}"
    return f"{words}; it was {_shown(error)}"


def _shown(error: Mapping[str, Any]) -> str:
    """A value as JSON has it, or what kind of value it is."""
    value = error.get("input")
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list) and not (0 < len(value) < 9 and all(isinstance(one, SCALAR) for one in value)):
        return "a list"
    text = json.dumps(value, default=repr)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _fields(error: Mapping[str, Any]) -> list[object]:
    """Where it is; where an object complains of a field, that too."""
    own = [error["ctx"]["name"]] if error["type"] == "field" else []
    return [part for part in error["loc"] if part != "body" and not FORM.fullmatch(str(part))] + own


def _form(error: Mapping[str, Any], place: Sequence[object]) -> str:
    """Which form of the value at `place` this is about; empty where it has but one."""
    after = [str(part) for part in error["loc"] if part != "body"][len(place) :]
    return after[0].removeprefix("constrained-") if after and FORM.fullmatch(after[0]) else ""
