"""Turns gRPC's status codes into the client's errors."""

import contextlib
import re
from typing import Any

import grpc

from deepseek_client.errors import (
    AccessDenied,
    ConnectionLost,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerBusy,
    ServerError,
    Unreachable,
)
from deepseek_client.server_errors import (
    error_of_status,
    means_not_ready,
    means_refused,
    one_line,
    retry_after_s,
    untrusted,
)
from deepseek_client.transport import Deadline

KINDS: dict[grpc.StatusCode, type[InferenceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.CANCELLED: ConnectionLost,  # the server is shutting down; the request may have run
}
TOO_LARGE = re.compile("larger than max|metadata size exceeds")  # a message, or its headers
PUSHBACK = "grpc-retry-pushback-ms"  # gRPC's own Retry-After (proposal A6)
# BoringSSL's reason, and gRPC's own check of the host name.
UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:()]*[^:() ])|Hostname Verification Check failed")
# What gRPC reports of a port that speaks something else.
OTHER_PROTOCOLS = {
    "WRONG_VERSION_NUMBER": "it speaks no TLS",
    "Expected SETTINGS frame": "it speaks HTTP/1.1 or TLS; for TLS pass ca_cert= or tls=True",
}


def error_of_rpc(url: str, error: Any, deadline: Deadline, *, connected: bool) -> InferenceError:
    """The error for a grpc.RpcError, whether Triton, a gateway or grpcio itself reports it.

    `connected` False: the channel has no connection, so "failed to connect" is grpcio's own message. A proxy may pass
    on the same words from its own connections.
    """
    code = error.code()
    reason = one_line(error.details() or code.name)
    of_the_model = code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)  # which may name another model
    if not of_the_model and means_not_ready(reason, refused=KINDS.get(code) in (InvalidInput, ModelNotFound)):
        return ModelNotReady(f"{url}: {reason}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline.exceeded(url)
    if status := re.search(r"http2 header with status: (\d{3})", reason):  # a gateway's page, as gRPC reports it
        return error_of_status(int(status[1]), f"{url}: {reason}", _retry_after_s(error))
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(url, reason, error, connected)
    if "CLIENT: Received message larger than max" in reason:
        return ServerError(f"{url}: {reason}, which is max_response_bytes; allow more")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and TOO_LARGE.search(reason):
        return InvalidInput(f"{url}: {reason}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ServerBusy(f"{url}: {reason}", _retry_after_s(error))
    return KINDS.get(code, ServerError)(f"{url}: {reason}")


def _unavailable(url: str, reason: str, error: Any, connected: bool) -> InferenceError:
    """UNAVAILABLE has four meanings, which only the message distinguishes.

    A refused connection (nothing was sent), Triton's full queue (the request did not run), Triton's restricted
    protocols, and a broken connection (the request may have run). Unknown messages, such as a model's own, count as
    the last.
    """
    if not connected and reason.startswith(("failed to connect", "errors resolving", "DNS resolution failed")):
        if found := UNTRUSTED.search(reason):
            return untrusted(url, found[1] or found[0])
        last = reason.rpartition(": ")[2].rstrip("]")
        last = next((said for part, said in OTHER_PROTOCOLS.items() if part in reason), last)
        return Unreachable(
            f"nothing serves gRPC at {url} ({last}); "
            "start Triton there, or correct the url (its gRPC port is 8001 by default)"
        )
    if "This protocol is restricted" in reason:
        return AccessDenied(f"{url}: {reason}")
    if means_refused(reason):
        return ServerBusy(f"{url}: {reason}")
    wait_s = _retry_after_s(error)
    if wait_s is not None:  # gRPC's own pushback, which this project's gateway sends only for unsent requests
        return ServerBusy(f"{url}: {reason}", wait_s, did_not_run=PUSHBACK in _metadata_of(error))
    why = f"the connection broke before the answer was complete, or the model is unavailable ({reason})"
    return ConnectionLost(f"{url}: {why}")


def _retry_after_s(error: Any) -> float | None:
    """Seconds to wait, from the response's metadata."""
    found = _metadata_of(error)
    with contextlib.suppress(KeyError, ValueError):  # negative: do not retry
        return max(0, int(found[PUSHBACK])) / 1000
    return retry_after_s(str(found.get("retry-after", "")))


def _metadata_of(error: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metadata in (error.initial_metadata(), error.trailing_metadata()):
        found.update(metadata or ())
    return found
