"""Turns the errors that a server or a gateway reports into the client's errors, for both protocols.

`grpc/status.py` adds gRPC's status codes.
"""

import contextlib
import email.utils
import time

from deepseek_client.errors import (
    AccessDenied,
    ConnectionLost,
    DeadlineExceeded,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerBusy,
    ServerError,
    Unreachable,
)

LONGEST_REASON = 4096  # characters


def one_line(reason: str) -> str:
    """The start of a server's message, without its empty request id, line breaks and what controls a terminal."""
    words = " ".join(reason[:LONGEST_REASON].replace("[request id: <id_unknown>]", "").split())
    return "".join(each if each.isprintable() else "\ufffd" for each in words)


def means_not_ready(reason: str, *, refused: bool) -> bool:
    """Whether the message says that the server knows the model but has not loaded it; the status code varies.

    `refused`: the status refuses the request itself (400, 404). With any other, "is not ready" may be the message of a
    proxy that lost the server, and the request may have run.
    """
    by_triton = "no available versions" in reason or "not at ready state" in reason
    return by_triton or (refused and "is not ready" in reason)


def means_refused(reason: str) -> bool:
    """Whether Triton's message says that its queue refused the request, which therefore did not run."""
    return "Exceeds maximum queue size" in reason or "Request timeout expired" in reason


def error_of_status(status: int, reason: str, wait_s: float | None = None, *, unsent: bool = False) -> InferenceError:
    """The error for an HTTP status of Triton or a gateway.

    Args:
        wait_s: the answer's Retry-After.
        unsent: this project's gateway says that it sent nothing to a server. Other proxies also answer 503 after they
            lost the server (Envoy: "upstream connect error or disconnect/reset before headers").
    """
    # 500 is the model's own failure, which may name another model.
    if status != 500 and means_not_ready(reason, refused=status in (400, 404)):
        return ModelNotReady(reason)
    if status in (429, 503):
        text = reason if wait_s is None else f"{reason}; it asks to wait {wait_s:g} s"
        return ServerBusy(text, wait_s, did_not_run=status == 429 or unsent or means_refused(reason))
    kinds: dict[int, type[InferenceError]] = {
        400: InvalidInput,
        401: AccessDenied,
        403: AccessDenied,
        404: ModelNotFound,
        413: InvalidInput,
        502: ConnectionLost,  # the gateway lost the server; the request may have run
        504: DeadlineExceeded,
    }
    return kinds.get(status, ServerError)(reason)


def retry_after_s(value: str) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None if it is neither."""
    with contextlib.suppress(ValueError, OverflowError):
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def untrusted(url: str, why: str) -> Unreachable:
    """The error for a server certificate that is not trusted; nothing was sent."""
    return Unreachable(
        f"the certificate of {url} is not trusted ({why}); have the server renew it, use the host name that the "
        "certificate is for, or pass the authority that signed it (ca_cert=)"
    )
