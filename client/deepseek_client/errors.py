"""All errors of a call as one tree, the same for HTTP and gRPC.

    InferenceError                 catch this one to catch them all
    +-- InvalidInput               the request is wrong: names, types, shapes, sizes, or the client's own settings
    +-- AccessDenied               the server or gateway does not accept the API key, or not this call
    +-- Unreachable             *  no connection: refused, unknown host, TLS failure; nothing was sent
    +-- ConnectionLost          +  the connection broke after sending began: the request may have run
    +-- ServerBusy              *  refused before it ran: queue full, queue time-out, rate limit; `retry_after_s`
    |                           +  a 503 that neither Triton nor this project's gateway explains
    +-- DeadlineExceeded           `timeout_s` is over; the server may still be at it
    +-- ModelUnavailable           the server is there, the model is not
    |   +-- ModelNotFound          no such model or version
    |   +-- ModelNotReady       *  it is loading, unloading or failed to load
    +-- ServerError                the model failed on this request, or an answer that cannot be read

    *  did not run for certain: retried within `retries`, the retry budget and the deadline
    +  may have run: retried only by a client made with `idempotent=True`

`str(error)` is one line: what is wrong, the value seen, what is allowed, what to do.
"""


class InferenceError(Exception):
    """Root of the tree."""

    did_not_run = False
    """The request certainly did not run, and a retry may help."""
    may_have_run = False
    """A retry may help, and may run the request a second time."""


class InvalidInput(InferenceError):
    """The request is wrong; the client or the server found it."""


class AccessDenied(InferenceError):
    """Missing, wrong or expired API key, or a call that the gateway does not allow."""


class Unreachable(InferenceError):
    """No connection could be made."""

    did_not_run = True


class ConnectionLost(InferenceError):
    """The connection broke after sending began and before the answer was complete."""

    may_have_run = True


class ServerBusy(InferenceError):
    """The server refused the request to protect itself."""

    did_not_run = True

    def __init__(self, message: str, retry_after_s: float | None = None, *, did_not_run: bool = True) -> None:
        super().__init__(message)
        self.did_not_run, self.may_have_run = did_not_run, not did_not_run
        self.retry_after_s = retry_after_s
        """Seconds to wait before the next request (Retry-After); None if the server gave none."""


class DeadlineExceeded(InferenceError):
    """The call, with all its retries, took longer than its deadline."""


class ModelUnavailable(InferenceError):
    """The server answers but cannot run the model."""


class ModelNotFound(ModelUnavailable):
    """No model or version of this name."""


class ModelNotReady(ModelUnavailable):
    """The model is known but not loaded."""

    did_not_run = True


class ServerError(InferenceError):
    """The request reached the model and failed there."""
