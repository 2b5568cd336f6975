"""KServe v2 over HTTP/1.1: plain sockets out, the standard library's parser back in.

Contract: `transports.Transport`. Connections are kept alive and reused, one for each call in flight; a connection on
which anything went wrong is closed, never reused. $http_proxy is not looked at.
"""

import contextlib
import http.client
import io
import json
import socket
import ssl
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

import numpy as np

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
from deepseek_client.signature import ModelMetadata
from deepseek_client.transports import (
    Deadline,
    PreparedRequest,
    means_not_ready,
    metadata_from_json,
    one_line,
    to_bytes,
    to_numpy,
)

BINARY_HEADER_SIZE = "Inference-Header-Content-Length"  # the JSON's share of a body, the tensors follow


class HttpTransport:
    """See the module."""

    def __init__(self, url: str, *, tls: bool, ca_cert: bytes | None, api_key: str | None) -> None:
        self._url = url
        parsed = urlsplit(f"//{url}")
        self._host, self._port = parsed.hostname or "", parsed.port or 0
        self._tls = ssl.create_default_context(cadata=ca_cert.decode() if ca_cert else None) if tls else None
        self._headers = f"Host: {url}\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")
        self._idle: deque[socket.socket] = deque()  # append and pop are atomic, so threads need no lock

    def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        """See Transport."""
        path = f"{_path(model, version)}/ready" if model else "/v2/health/ready"
        status, _, content = self._exchange("GET", path, deadline)
        if status in (401, 403):
            self._raise(status, content)
        return status == 200

    def metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        """See Transport."""
        path = _path(model, version)
        signature, config = self._get_json(path, deadline), None
        with contextlib.suppress(AccessDenied, ModelNotFound):  # a gateway may not show it
            config = self._get_json(f"{path}/config", deadline)
        return metadata_from_json(signature, config)

    def encode(
        self,
        metadata: ModelMetadata,
        version: str,
        arrays: Sequence[np.ndarray | None],
        outputs: Sequence[str] | None,
        request_id: str,
    ) -> PreparedRequest:
        """See Transport. The parts: path, JSON header up to the value of its time-out, tensors."""
        inputs, tensors = [], []
        for spec, array in zip(metadata.inputs, arrays, strict=True):
            if array is not None:
                data = to_bytes(spec, array)
                size = {"binary_data_size": len(data)}
                inputs.append({"name": spec.name, "shape": array.shape, "datatype": spec.datatype, "parameters": size})
                tensors.append(data)
        header: dict[str, Any] = {"id": request_id} if request_id else {}
        header["inputs"] = inputs
        if outputs:
            header["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        opened = json.dumps(header)[:-1] + ', "parameters": {"binary_data_output": true, "timeout": '
        path = f"{_path(metadata.name, version)}/infer"
        parts = (path.encode(), opened.encode(), b"".join(tensors))
        return PreparedRequest(model=metadata.name, version=version, parts=parts)

    def send(self, request: PreparedRequest, deadline: Deadline) -> dict[str, np.ndarray]:
        """See Transport."""
        path, opened, tensors = request.parts
        header = b"%s%d}}" % (opened, deadline.left_us())
        size = f"{BINARY_HEADER_SIZE}: {len(header)}\r\n"
        status, header_size, content = self._exchange("POST", path.decode(), deadline, header + tensors, size)
        if status != 200:
            self._raise(status, content)
        end = header_size or len(content)
        results = {}
        try:
            for output in json.loads(content[:end])["outputs"]:
                start, end = end, end + output["parameters"]["binary_data_size"]
                # A slice is a copy, and so aligned for whoever computes on it.
                results[output["name"]] = to_numpy(output["datatype"], output["shape"], content[start:end])
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise ServerError(f"{self._url}: an answer that cannot be read ({error!r}): {content[:80]!r}") from None
        return results

    def close(self) -> None:
        """See Transport."""
        while self._idle:
            self._idle.pop().close()

    def _get_json(self, path: str, deadline: Deadline) -> dict:
        status, _, content = self._exchange("GET", path, deadline)
        if status != 200:
            self._raise(status, content)
        try:
            return json.loads(content)
        except ValueError:
            raise ServerError(f"{self._url}{path}: not JSON but {content[:80]!r}; is this Triton?") from None

    def _raise(self, status: int, content: bytes) -> NoReturn:
        try:
            reason = json.loads(content)["error"]
        except (ValueError, KeyError, TypeError):  # a gateway's page
            reason = f"{status} {http.client.responses.get(status, '')}"
        raise _error(status, f"{self._url}: {one_line(reason)}")

    def _exchange(
        self, method: str, path: str, deadline: Deadline, body: bytes = b"", headers: str = ""
    ) -> tuple[int, int | None, bytes]:
        """Status, size of the JSON header where there is one, body."""
        if method == "POST":
            headers += f"Content-Length: {len(body)}\r\n"
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}{headers}\r\n".encode()
        connection = self._connection(deadline)
        keep = False
        try:
            connection.settimeout(deadline.socket_timeout_s())
            # A server that refuses a large body (413) may close while we still send: its answer is there to read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(head + body)
            response = http.client.HTTPResponse(_Reader(connection, deadline), method=method)  # type: ignore[arg-type]
            response.begin()
            content = response.read()
            keep = not response.will_close
        except TimeoutError:
            raise deadline.exceeded(self._url) from None
        except (OSError, http.client.HTTPException) as error:
            raise _broken(self._url, error) from None
        finally:  # on Ctrl-C and a gevent time-out, too: half an answer may be on its way
            if keep:
                self._idle.append(connection)
            else:
                connection.close()
        size = response.getheader(BINARY_HEADER_SIZE)
        return response.status, int(size) if size else None, content

    def _connection(self, deadline: Deadline) -> socket.socket:
        """An idle connection that still stands, or a new one."""
        with contextlib.suppress(IndexError):
            while not _is_alive(connection := self._idle.pop()):
                connection.close()
            return connection
        try:
            connection = _connect(self._host, self._port, deadline)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._tls.wrap_socket(connection, server_hostname=self._host) if self._tls else connection
        except TimeoutError:
            raise deadline.exceeded(self._url) from None
        except OSError as error:
            scheme = "HTTPS" if self._tls else "HTTP"
            raise Unreachable(
                f"nothing serves {scheme} at {self._url} ({error.strerror or error}); "
                "start Triton there, or correct the url (its HTTP port is 8000 by default)"
            ) from None


class _Reader(io.RawIOBase):
    """What HTTPResponse reads: each read waits for what is left of the call, so that a trickle cannot outlive it."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection = connection
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        """What HTTPResponse asks a socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._deadline.socket_timeout_s())
        return self._connection.recv_into(buffer)


def _path(model: str, version: str) -> str:
    return f"/v2/models/{quote(model, safe='')}" + (f"/versions/{version}" if version else "")


def _connect(host: str, port: int, deadline: Deadline) -> socket.socket:
    """As socket.create_connection, which would give each address of the host the full time."""
    failure = OSError("the host has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(deadline.socket_timeout_s())
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
            if isinstance(error, TimeoutError):
                break
    raise failure


def _is_alive(connection: socket.socket) -> bool:
    """Whether an idle connection has nothing to read: its end, or stray bytes, make it useless."""
    try:
        connection.settimeout(0)
        connection.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        pass
    return False


def _broken(url: str, error: Exception) -> InferenceError:
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return ServerError(f"{url} does not speak HTTP; is it Triton's gRPC port (8001), not the HTTP port (8000)?")
    return ConnectionLost(f"{url}: the connection broke before the answer was complete ({error!r})")


def _error(status: int, reason: str) -> InferenceError:
    """The error for a status from Triton, or from a gateway before it."""
    kinds: dict[int, type[InferenceError]] = {
        400: InvalidInput,
        401: AccessDenied,
        403: AccessDenied,
        404: ModelNotFound,
        413: InvalidInput,
        429: ServerBusy,
        502: ConnectionLost,  # the gateway lost the server, perhaps in the middle of it
        503: ServerBusy,
        504: DeadlineExceeded,
    }
    kind = ModelNotReady if means_not_ready(reason) else kinds.get(status, ServerError)
    return kind(reason)
