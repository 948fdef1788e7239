"""Errors as HTTP answers."""

from __future__ import annotations

import math

import msgspec

from llm_engine.api.errors import (
    DeadlineExceeded,
    Overloaded,
    PromptTooLong,
    RequestError,
    ServingError,
    TooManyRequests,
    UnknownModel,
)
from router.answers import ErrorBody, ErrorDetail
from router.tenants import Unauthorized

_CODES: dict[type[ServingError], str] = {
    PromptTooLong: "context_length_exceeded",
    UnknownModel: "model_not_found",
    Overloaded: "overloaded",
    TooManyRequests: "too_many_requests",
    DeadlineExceeded: "deadline_exceeded",
    Unauthorized: "invalid_api_key",
}


class NotFound(RequestError):
    """No such path."""

    status = 404


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    status = 405

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


def error_body(exc: ServingError) -> bytes:
    """The error object of the OpenAI API."""
    detail = ErrorDetail(
        message=str(exc),
        type=_error_type(exc.status),
        param=exc.param if isinstance(exc, RequestError) else None,
        code=_CODES.get(type(exc)),
    )
    return msgspec.json.encode(ErrorBody(detail))


def error_headers(exc: ServingError) -> list[tuple[bytes, bytes]]:
    """Retry-After where waiting helps, Allow where another method would."""
    if isinstance(exc, Overloaded):
        return [(b"retry-after", b"%d" % max(1, math.ceil(exc.retry_after_s)))]
    if exc.retryable:
        return [(b"retry-after", b"1")]
    if isinstance(exc, Unauthorized):
        return [(b"www-authenticate", b"Bearer")]
    if isinstance(exc, MethodNotAllowed):
        return [(b"allow", exc.allow.encode())]
    return []


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
