"""Everything that can go wrong with a call, as one tree, the same for HTTP and gRPC.

    InferenceError                 catch this one to catch them all
    +-- InvalidInput               the request is wrong: names, types, shapes, sizes, or the client's own settings
    +-- AccessDenied               the server or gateway does not accept the API key, or not this call
    +-- Unreachable             *  no connection: refused, unknown host, TLS failure; nothing was sent
    +-- ConnectionLost          +  the connection broke after sending began: the request may have run
    +-- ServerBusy              *  refused before it ran: queue full, queue time-out, rate limit; `retry_after_s`
    +-- DeadlineExceeded           `timeout_s` is over; the server may still be at it
    +-- ModelUnavailable           the server is there, the model is not
    |   +-- ModelNotFound          no such model or version
    |   +-- ModelNotReady       *  it is loading, unloading or failed to load
    +-- ServerError                the model failed on this request, or an answer that cannot be read

    *  did not run for certain: retried within `retries`, the retry budget and the deadline
    +  may have run: retried only by a client made with `idempotent=True`

`str(error)` is one line: what is wrong, the value seen, what is allowed, what to do.
"""

from typing import ClassVar


class InferenceError(Exception):
    """Root of the tree."""

    did_not_run: ClassVar[bool] = False
    """The request was certainly not executed, and trying again may help."""
    may_have_run: ClassVar[bool] = False
    """Trying again may help, and may execute the request a second time."""


class InvalidInput(InferenceError):
    """The request cannot be right, whoever found it: client or server."""


class AccessDenied(InferenceError):
    """Missing, wrong or expired API key, or a call that the gateway does not let through."""


class Unreachable(InferenceError):
    """No connection could be made."""

    did_not_run = True


class ConnectionLost(InferenceError):
    """The connection broke between sending and the end of the answer."""

    may_have_run = True


class ServerBusy(InferenceError):
    """The server refused the request to protect itself."""

    did_not_run = True

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds that it asked to be left alone for (Retry-After), None where it did not say."""


class DeadlineExceeded(InferenceError):
    """The time given to the call, all its retries together, is over."""


class ModelUnavailable(InferenceError):
    """The server answers but has no such model to run."""


class ModelNotFound(ModelUnavailable):
    """No model or version of this name."""


class ModelNotReady(ModelUnavailable):
    """The model is known but not loaded."""

    did_not_run = True


class ServerError(InferenceError):
    """The request reached the model and failed there."""


def untrusted(url: str, why: str) -> Unreachable:
    """The server's certificate does not prove who it is; nothing was sent."""
    return Unreachable(
        f"the certificate of {url} is not trusted ({why}); have the server renew it, ask it by the name that the "
        "certificate is for, or give the authority that signed it (ca_cert=)"
    )
