"""KServe v2 over HTTP/1.1, with binary tensors.

Contract: `transports.Transport`. Connections are kept alive and reused, one for each call in flight; a connection on
which anything went wrong is closed, never reused. Servers close idle ones, and may do so as a call is sent: a call that
may run twice then goes over a new one, once and outside of `retries`. $http_proxy is not looked at.
The transport is the same over blocking sockets and over asyncio; a `Connection` hides which.
"""

import contextlib
import http.client
import json
import os
import ssl
import struct
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from deepseek_client.errors import (
    AccessDenied,
    ConnectionLost,
    InferenceError,
    ModelNotFound,
    ServerError,
    Unreachable,
    untrusted,
)
from deepseek_client.http_answer import Answer, read_answer
from deepseek_client.http_connections import Connection
from deepseek_client.http_pool import Pool
from deepseek_client.runtimes import Cancel
from deepseek_client.signature import ModelMetadata
from deepseek_client.transports import (
    NO_HEADERS,
    Deadline,
    Headers,
    Placement,
    PreparedRequest,
    error_of_status,
    metadata_from_json,
    one_line,
    placed_array,
    retry_after_s,
    to_numpy,
)

BINARY_HEADER_SIZE = "Inference-Header-Content-Length"  # the JSON's share of a body, the tensors follow
SMALL_BYTES = 65536  # up to here one write of all is faster than a copy less
Body = tuple[tuple[bytes, ...], str]
"""What is sent, in parts, and the headers that it needs beside its length."""
MakePool = Callable[[str, int, ssl.SSLContext | None], Pool]


class HttpTransport:
    """See the module."""

    def __init__(
        self,
        url: str,
        pool: MakePool,
        *,
        idempotent: bool,
        tls: bool,
        ca_cert: bytes | None,
        api_key: str | None,
    ) -> None:
        self._url = url
        self._idempotent = idempotent
        parsed = urlsplit(f"//{url}")
        self._scheme = "HTTPS" if tls else "HTTP"
        context = ssl.create_default_context(cadata=ca_cert.decode() if ca_cert else None) if tls else None
        self._pool = pool(parsed.hostname or "", parsed.port or 0, context)
        self._headers = f"Host: {url}\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")

    async def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        """See Transport."""
        path = f"{_path(model, version)}/ready" if model else "/v2/health/ready"
        answer = await self._exchange("GET", path, deadline)
        if answer.status in (401, 403):
            raise self._error(answer)
        return answer.status == 200

    async def metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        """See Transport."""
        path = _path(model, version)
        signature, config = await self._get_json(path, deadline), None
        with contextlib.suppress(AccessDenied, ModelNotFound):  # a gateway may not show it
            config = await self._get_json(f"{path}/config", deadline)
        try:
            return metadata_from_json(signature, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self._url}{path}: not a model's metadata ({error!r}); is this Triton?") from None

    def encode(self, request: PreparedRequest) -> tuple[bytes, ...]:
        """See Transport. The parts: path, JSON header up to the value of its time-out, tensors."""
        return _parts(request, b"".join(tensor.data for tensor in request.tensors))

    async def send(
        self,
        request: PreparedRequest,
        deadline: Deadline,
        headers: Headers = NO_HEADERS,
        cancel: Cancel | None = None,
        placement: Placement | None = None,
    ) -> dict[str, np.ndarray]:
        """See Transport."""
        parts = (request.parts or self.encode(request)) if placement is None else _parts(request, b"", placement)
        path, opened, tensors = parts
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

        def body() -> Body:
            header = b"%s%d}}" % (opened, deadline.left_us())
            return (header, tensors), f"{extra}{BINARY_HEADER_SIZE}: {len(header)}\r\n"

        answer = await self._exchange("POST", path.decode(), deadline, body, cancel)
        if answer.status != 200:
            raise self._error(answer)
        try:
            return _arrays(answer, placement)
        except (KeyError, TypeError, ValueError, struct.error) as error:
            start = bytes(answer.body[:80])
            raise ServerError(f"{self._url}: an answer that cannot be read ({error!r}): {start!r}") from None

    async def register(self, region: str, size_bytes: int, deadline: Deadline, cancel: Cancel | None = None) -> None:
        """See Transport."""
        place = {"key": f"/{region}", "offset": 0, "byte_size": size_bytes}
        await self._post(
            f"/v2/systemsharedmemory/region/{region}/register", json.dumps(place).encode(), deadline, cancel
        )

    async def unregister(self, region: str, deadline: Deadline) -> None:
        """See Transport."""
        await self._post(f"/v2/systemsharedmemory/region/{region}/unregister", b"", deadline)

    async def close(self) -> None:
        """See Transport. Connections of calls in flight are closed at the calls' ends."""
        self._pool.close()

    async def _post(self, path: str, body: bytes, deadline: Deadline, cancel: Cancel | None = None) -> None:
        answer = await self._exchange("POST", path, deadline, lambda: ((body,), ""), cancel)
        if answer.status != 200:
            raise self._error(answer)

    async def _get_json(self, path: str, deadline: Deadline) -> dict:
        answer = await self._exchange("GET", path, deadline)
        if answer.status != 200:
            raise self._error(answer)
        try:
            return json.loads(answer.body)
        except ValueError:
            start = bytes(answer.body[:80])
            raise ServerError(f"{self._url}{path}: not JSON but {start!r}; is this Triton?") from None

    def _error(self, answer: Answer) -> InferenceError:
        try:
            reason = json.loads(answer.body)["error"]
        except (ValueError, KeyError, TypeError):  # a gateway's page
            reason = f"{answer.status} {http.client.responses.get(answer.status, '')}"
        wait_s = retry_after_s(answer.headers.get("retry-after", ""))
        return error_of_status(answer.status, f"{self._url}: {one_line(str(reason))}", wait_s)

    async def _exchange(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        body: Callable[[], Body] = lambda: ((), ""),
        cancel: Cancel | None = None,
    ) -> Answer:
        """`body` is asked once there is a connection, for which it may have waited: what is left goes with it."""

        def parts() -> tuple[bytes, ...]:
            content, headers = body()
            size = sum(map(len, content))
            if method == "POST":
                headers += f"Content-Length: {size}\r\n"
            head = f"{method} {path} HTTP/1.1\r\n{self._headers}{headers}\r\n".encode("latin-1")
            return (b"".join((head, *content)),) if size < SMALL_BYTES else (head, *content)

        connection = await self._connection(deadline)
        may_run_twice = method == "GET" or self._idempotent  # RFC 9110, 9.2.2: else not by itself
        try:
            try:
                return await self._exchange_over(connection, parts, deadline, cancel)
            except http.client.RemoteDisconnected:
                if not (connection.reused and may_run_twice) or (cancel and cancel.cancelled):
                    raise
            return await self._exchange_over(await self._connection(deadline, idle=False), parts, deadline, cancel)
        except TimeoutError:
            raise deadline.exceeded(self._url) from None
        except (OSError, http.client.HTTPException) as error:
            raise _broken(self._url, error) from None

    async def _exchange_over(
        self, connection: Connection, parts: Callable[[], tuple[bytes, ...]], deadline: Deadline, cancel: Cancel | None
    ) -> Answer:
        """The answer; gives the connection back, or closes it."""
        answer = None
        try:
            if cancel is not None:
                cancel.stopped_by(connection.stop)
            # A server that refuses a large body (413) may close while we still send: its answer is there to read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await connection.send(*parts(), deadline=deadline)
            answer = await read_answer(lambda wanted: connection.receive(wanted, deadline))
            if cancel is not None and cancel.cancelled:  # the connection was stopped under it
                raise ConnectionResetError("another attempt was answered first")
        finally:  # on Ctrl-C and a gevent time-out, too: half an answer may be on its way
            if cancel is not None:
                cancel.stopped_by(None)
            if answer is not None and answer.keep and not (cancel and cancel.cancelled):
                connection.reused = True
                self._pool.give_back(connection)
            else:
                connection.close()
        return answer

    async def _connection(self, deadline: Deadline, *, idle: bool = True) -> Connection:
        """One of the pool; with `idle` False none that lay there."""
        try:
            return await self._pool.take(deadline, idle=idle)
        except TimeoutError:
            raise deadline.exceeded(self._url) from None
        except ssl.SSLCertVerificationError as error:
            raise untrusted(self._url, error.verify_message.rstrip(".")) from None
        except OSError as error:
            raise Unreachable(
                f"nothing serves {self._scheme} at {self._url} ({_why(error)}); "
                "start Triton there, or correct the url (its HTTP port is 8000 by default)"
            ) from None


def _parts(request: PreparedRequest, tensors: bytes, placement: Placement | None = None) -> tuple[bytes, bytes, bytes]:
    """Path, JSON header up to the value of its time-out, tensors."""
    inputs = [
        {
            "name": tensor.name,
            "shape": tensor.shape,
            "datatype": tensor.datatype,
            "parameters": _placed(placement.region, placement.inputs[tensor.name])
            if placement
            else {"binary_data_size": len(tensor.data)},
        }
        for tensor in request.tensors
    ]
    header: dict[str, Any] = {"id": request.request_id} if request.request_id else {}
    header["inputs"] = inputs
    if placement is not None and placement.outputs:
        header["outputs"] = [
            {"name": name, "parameters": _placed(placement.region, place)} for name, place in placement.outputs.items()
        ]
    elif request.outputs:
        header["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in request.outputs]
    opened = json.dumps(header)[:-1] + ', "parameters": {"binary_data_output": true, "timeout": '
    return f"{_path(request.model, request.version)}/infer".encode(), opened.encode(), tensors


def _placed(region: str, place: tuple[int, int]) -> Mapping[str, Any]:
    return {"shared_memory_region": region, "shared_memory_offset": place[0], "shared_memory_byte_size": place[1]}


def _arrays(answer: Answer, placement: Placement | None) -> dict[str, np.ndarray]:
    """The outputs by name, out of the body or the shared memory."""
    content = memoryview(answer.body)
    end = int(answer.headers.get(BINARY_HEADER_SIZE.lower(), len(content)))
    results = {}
    for output in json.loads(bytes(content[:end]))["outputs"]:
        name, datatype, shape = output["name"], output["datatype"], output["shape"]
        if placement is not None and placement.outputs:
            results[name] = placed_array(placement, name, datatype, shape)
        else:
            start, end = end, end + output["parameters"]["binary_data_size"]
            # A slice is a copy, and so aligned for whoever computes on it.
            results[name] = to_numpy(datatype, shape, bytes(content[start:end]))
    return results


def _path(model: str, version: str) -> str:
    return f"/v2/models/{quote(model, safe='')}" + (f"/versions/{version}" if version else "")


def _why(error: OSError) -> str:
    """The system's own words, which asyncio puts into a sentence of its own."""
    if isinstance(error, ssl.SSLError) or not error.errno or error.errno < 0:
        return str(error.strerror or error)
    return os.strerror(error.errno)


def _broken(url: str, error: Exception) -> InferenceError:
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return ServerError(f"{url} does not speak HTTP; is it Triton's gRPC port (8001), not the HTTP port (8000)?")
    return ConnectionLost(f"{url}: the connection broke before the answer was complete ({error!r})")
