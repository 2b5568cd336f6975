"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

Contract: each `ApiError` has the HTTP status; `api_errors` turns the errors of the client into ApiErrors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from deepseek_client import (
    ConnectionLost,
    DeadlineExceeded,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerBusy,
    Unreachable,
)

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
CODES = {429: "rate_limit_exceeded"}


class ApiError(Exception):
    """A request that is not answered; `status` is the HTTP status, `retry_after_s` becomes Retry-After."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        self._param, self._code = param, code or CODES.get(status)

    def body(self) -> dict:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self._param, "code": self._code}}


def no_such_model(model: str, why: str) -> ApiError:
    """404, as OpenAI answers for an unknown model."""
    return ApiError(
        404, f"model {model!r}: {why}; GET /v1/models lists the models", param="model", code="model_not_found"
    )


def busy(message: str, retry_after_s: float | None = None) -> ApiError:
    """429 with Retry-After, in whole seconds."""
    return ApiError(429, f"overloaded: {message}", retry_after_s=max(1, math.ceil(retry_after_s or 1)))


@contextmanager
def api_errors(model: str) -> Iterator[None]:
    """Raises each of the client's errors about a model as an ApiError."""
    try:
        yield
    except InferenceError as error:
        raise from_client(error, model) from error


def from_client(error: InferenceError, model: str) -> ApiError:
    reason = str(error)
    match error:
        case InvalidInput():
            return ApiError(400, reason, param="input")
        case ModelNotFound():
            return no_such_model(model, "not served here")
        case ServerBusy():
            return busy(reason, error.retry_after_s)
        case Unreachable():
            return ApiError(503, "not ready: Triton does not answer", retry_after_s=1)
        case ModelNotReady() | ConnectionLost():
            return ApiError(503, f"not ready: {reason}", retry_after_s=1)
        case DeadlineExceeded():
            return ApiError(504, reason)
    return ApiError(500, reason)
