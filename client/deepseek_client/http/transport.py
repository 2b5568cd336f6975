"""KServe v2 over HTTP/1.1, with binary tensors.

Contract: `deepseek_client.transport.Transport`. Connections are kept alive and reused, one per call in flight; any
error closes the connection. A server may close idle connections just as a call is sent on one: a call that may run
twice is then sent once more, outside of `retries`. $http_proxy is ignored.
"""

import contextlib
import http.client
import json
import os
import ssl
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np

from deepseek_client.concurrency import Cancel
from deepseek_client.errors import (
    AccessDenied,
    ConnectionLost,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerError,
    Unreachable,
)
from deepseek_client.http.connection import Connection
from deepseek_client.http.pool import AsyncPool, BlockingPool
from deepseek_client.http.response import Response, ResponseTooLarge, read_response
from deepseek_client.metadata import DTYPES, UNREADABLE, ModelMetadata, metadata_from_json
from deepseek_client.options import ClientOptions
from deepseek_client.server_errors import error_of_status, one_line, retry_after_s, untrusted
from deepseek_client.tensors import listed_to_numpy, placed_array, to_numpy
from deepseek_client.transport import NO_HEADERS, Deadline, Headers, Placement, PreparedRequest, Tensor

BINARY_HEADER_SIZE = "Inference-Header-Content-Length"  # bytes of JSON in a body; the tensors follow
SMALL_BYTES = 65536  # up to this size, joining head and body into one write is faster than two writes
Body = tuple[tuple[bytes, ...], str]
"""The parts of a body, and its headers except the length."""


class HttpTransport:
    def __init__(self, url: str, pool: BlockingPool | AsyncPool, options: ClientOptions) -> None:
        self._url = url
        self._pool = pool
        self._idempotent = options.idempotent
        self._max_response_bytes = options.response_limit
        self._scheme = "HTTPS" if options.speaks_tls else "HTTP"
        key = options.api_key
        self._headers = f"Host: {url}\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "")

    async def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        path = f"{_path(model, version)}/ready" if model else "/v2/health/ready"
        answer = await self._exchange("GET", path, deadline)
        if answer.status == 200:
            return True
        error = self._error(answer)
        is_empty = answer.status == 400 and not answer.body  # Triton: the server is not ready
        is_unknown = model is not None and isinstance(error, ModelNotFound)
        if is_empty or is_unknown or isinstance(error, ModelNotReady) or "not ready" in str(error):
            return False
        raise error  # a gateway's own, or of a server without KServe v2

    async def metadata(
        self, model: str, version: str, deadline: Deadline, cancel: Cancel | None = None
    ) -> ModelMetadata:
        path = _path(model, version)
        signature, config = await self._get_json(path, deadline, cancel), None
        # Hidden by a gateway, or not implemented: OpenVINO Model Server answers 400.
        with contextlib.suppress(AccessDenied, ModelNotFound, InvalidInput):
            config = await self._get_json(f"{path}/config", deadline, cancel)
        binary = config is not None or await self._takes_bytes(deadline, cancel)  # only Triton shows configurations
        return metadata_from_json(f"{self._url}{path}", signature, config, binary=binary)

    async def _takes_bytes(self, deadline: Deadline, cancel: Cancel | None) -> bool:
        """Whether the server has the extension for binary tensors; a gateway that hides this is in front of Triton."""
        try:
            extensions = (await self._get_json("/v2", deadline, cancel)).get("extensions")
        except (AccessDenied, ModelNotFound):
            return True
        return isinstance(extensions, list) and "binary_tensor_data" in extensions

    async def model_statistics(self, model: str, deadline: Deadline) -> dict:
        return await self._get_json(f"{_path(model, '')}/stats", deadline)

    def encode(self, request: PreparedRequest) -> tuple[bytes, ...]:
        """Three parts: the path, the JSON header up to the value of its time-out, and the tensors."""
        return _parts(request)

    async def send(
        self,
        request: PreparedRequest,
        deadline: Deadline,
        headers: Headers = NO_HEADERS,
        cancel: Cancel | None = None,
        placement: Placement | None = None,
    ) -> dict[str, np.ndarray]:
        parts = request.parts if request.parts and placement is None else _parts(request, placement)
        path, opened, tensors = parts
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

        def body() -> Body:
            header = b"%s%d}}" % (opened, deadline.left_us())
            if not request.binary:
                return (header,), f"{extra}Content-Type: application/json\r\n"
            return (header, tensors), f"{extra}{BINARY_HEADER_SIZE}: {len(header)}\r\n"

        answer = await self._exchange("POST", path.decode(), deadline, body, cancel)
        if answer.status != 200:
            raise self._error(answer)
        try:
            return _arrays(answer, placement)
        except UNREADABLE as error:
            start = bytes(answer.body[:80])
            raise ServerError(f"{self._url}: an answer that cannot be read ({error!r}): {start!r}") from None

    async def register(self, region: str, size_bytes: int, deadline: Deadline, cancel: Cancel | None = None) -> None:
        place = {"key": f"/{region}", "offset": 0, "byte_size": size_bytes}
        await self.post(
            f"/v2/systemsharedmemory/region/{region}/register", json.dumps(place).encode(), deadline, cancel
        )

    async def unregister(self, region: str, deadline: Deadline) -> None:
        await self.post(f"/v2/systemsharedmemory/region/{region}/unregister", b"", deadline)

    async def close(self) -> None:
        """Closes idle connections now, those of calls in flight when the calls end."""
        self._pool.close()

    async def post(self, path: str, body: bytes, deadline: Deadline, cancel: Cancel | None = None) -> None:
        answer = await self._exchange("POST", path, deadline, lambda: ((body,), ""), cancel)
        if answer.status != 200:
            raise self._error(answer)

    async def _get_json(self, path: str, deadline: Deadline, cancel: Cancel | None = None) -> dict:
        answer = await self._exchange("GET", path, deadline, cancel=cancel)
        if answer.status != 200:
            raise self._error(answer)
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(answer.body), dict):
                return found
        raise ServerError(f"{self._url}{path}: not a JSON object but {bytes(answer.body[:80])!r}; is this Triton?")

    def _error(self, answer: Response) -> InferenceError:
        try:
            told = json.loads(answer.body)
            reason, unsent = told["error"], told.get("unsent") is True
            reason = reason["message"] if isinstance(reason, dict) else reason  # OpenAI's shape
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a gateway's page
            reason, unsent = f"{answer.status} {http.client.responses.get(answer.status, '')}", False
            if answer.status == 400 and self._scheme == "HTTP" and b"HTTPS" in answer.body:  # nginx, Apache, Go
                reason += "; it speaks TLS: pass ca_cert= or tls=True"
        wait_s = retry_after_s(answer.headers.get("retry-after", ""))
        return error_of_status(answer.status, f"{self._url}: {one_line(str(reason))}", wait_s, unsent=unsent)

    async def _exchange(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        body: Callable[[], Body] = lambda: ((), ""),
        cancel: Cancel | None = None,
    ) -> Response:
        """Sends a request. `body` is called once there is a connection, since it holds the time left."""

        def parts() -> tuple[bytes, ...]:
            content, headers = body()
            size = sum(map(len, content))
            if method == "POST":
                headers += f"Content-Length: {size}\r\n"
            head = f"{method} {path} HTTP/1.1\r\n{self._headers}{headers}\r\n".encode("latin-1")
            return (b"".join((head, *content)),) if size < SMALL_BYTES else (head, *content)

        may_run_twice = method == "GET" or self._idempotent  # RFC 9110, 9.2.2
        try:
            connection = await self._connection(deadline, cancel)
            try:
                return await self._exchange_over(connection, parts, deadline, cancel)
            except http.client.RemoteDisconnected:
                if not (connection.reused and may_run_twice) or (cancel and cancel.cancelled):
                    raise
            self._pool.drop_idle()  # the server may be closing these too
            return await self._exchange_over(await self._connection(deadline, cancel), parts, deadline, cancel)
        except TimeoutError:
            raise deadline.exceeded(self._url) from None
        except (OSError, http.client.HTTPException) as error:
            raise _broken(self._url, error) from None

    async def _exchange_over(
        self, connection: Connection, parts: Callable[[], tuple[bytes, ...]], deadline: Deadline, cancel: Cancel | None
    ) -> Response:
        """Returns the response and gives the connection back, or closes it."""
        answer = None
        try:
            if cancel is not None:
                cancel.stopped_by(connection.stop)
            # A server that refuses a large body (413) may close while the client sends; its answer can still be read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await connection.send(*parts(), deadline=deadline)
            answer = await read_response(lambda wanted: connection.receive(wanted, deadline), self._max_response_bytes)
            if cancel is not None and cancel.cancelled:  # stopped by the winning attempt
                raise ConnectionResetError("another attempt was answered first")
        finally:  # also after Ctrl-C and a gevent time-out: part of an answer may still arrive
            if cancel is not None:
                cancel.stopped_by(None)
            if answer is not None and answer.keep and not (cancel and cancel.cancelled):
                connection.reused = True
                self._pool.give_back(connection)
            else:
                connection.close()
        return answer

    async def _connection(self, deadline: Deadline, cancel: Cancel | None) -> Connection:
        try:
            return await self._pool.take(deadline, cancel)
        except TimeoutError:
            raise deadline.exceeded(self._url) from None
        except ssl.SSLCertVerificationError as error:
            raise untrusted(self._url, error.verify_message.rstrip(".")) from None
        except OSError as error:
            raise Unreachable(
                f"nothing serves {self._scheme} at {self._url} ({_why(error)}); "
                "start Triton there, or correct the url (its HTTP port is 8000 by default)"
            ) from None


def _parts(request: PreparedRequest, placement: Placement | None = None) -> tuple[bytes, bytes, bytes]:
    """The path, the JSON up to the value of its time-out, which two brackets follow, and the tensors.

    Raises InvalidInput if the server takes only JSON and a string is not UTF-8.
    """

    def content(tensor: Tensor) -> Mapping[str, Any]:
        if placement is not None:
            return {"parameters": _placed(placement.region, placement.inputs[tensor.name])}
        return {"parameters": {"binary_data_size": len(tensor.data)}} if request.binary else {"data": _listed(tensor)}

    header: dict[str, Any] = {"id": request.request_id} if request.request_id else {}
    header["inputs"] = [
        {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype, **content(tensor)}
        for tensor in request.tensors
    ]
    if placement is not None and placement.outputs:
        header["outputs"] = [
            {"name": name, "parameters": _placed(placement.region, place)} for name, place in placement.outputs.items()
        ]
    elif request.outputs:
        binary = {"parameters": {"binary_data": True}} if request.binary else {}
        header["outputs"] = [{"name": name, **binary} for name in request.outputs]
    all_binary = {"binary_data_output": True} if request.binary else {}
    header["parameters"] = {**all_binary, **request.parameters, "timeout": 0}
    in_body = request.binary and placement is None
    tensors = b"".join(tensor.data for tensor in request.tensors) if in_body else b""
    path = f"{_path(request.model, request.version)}/infer"
    return path.encode(), json.dumps(header)[: -len("0}}")].encode(), tensors


def _listed(tensor: Tensor) -> list:
    values = to_numpy(tensor.datatype, tensor.shape, tensor.data).ravel()
    if tensor.datatype == "BF16":
        return values.astype(np.float32).tolist()
    try:
        return [text.decode() for text in values] if tensor.datatype == "BYTES" else values.tolist()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"input {tensor.name!r} is not UTF-8 ({error}); this server takes only JSON") from None


def _placed(region: str, place: tuple[int, int]) -> Mapping[str, Any]:
    return {"shared_memory_region": region, "shared_memory_offset": place[0], "shared_memory_byte_size": place[1]}


def _arrays(answer: Response, placement: Placement | None) -> dict[str, np.ndarray]:
    """The outputs by name, from the body or from shared memory. Raises one of UNREADABLE."""
    content = memoryview(answer.body)
    end = int(answer.headers.get(BINARY_HEADER_SIZE.lower(), len(content)))
    if not 0 <= end <= len(content):
        raise ValueError(f"{BINARY_HEADER_SIZE} is {end}, of {len(content)} bytes")
    results: dict[str, np.ndarray] = {}
    for output in json.loads(bytes(content[:end]))["outputs"]:
        name, datatype, shape = output["name"], output["datatype"], output["shape"]
        if not isinstance(name, str) or name in results or datatype not in DTYPES:
            raise ValueError(f"output {name!r} of type {datatype!r}, after {list(results)}")
        if placement is not None and placement.outputs:
            results[name] = placed_array(placement, name, datatype, shape)
        elif "data" in output:
            results[name] = listed_to_numpy(datatype, shape, output["data"])
        else:
            start, end = end, end + output["parameters"]["binary_data_size"]
            if not start <= end <= len(content):
                raise ValueError(f"bytes {start} to {end} of {len(content)}")
            # bytes() copies the data, so that the array is aligned.
            results[name] = to_numpy(datatype, shape, bytes(content[start:end]))
    if end != len(content):
        raise ValueError(f"{len(content) - end} bytes after the last output")
    return results


def _path(model: str, version: str) -> str:
    return f"/v2/models/{quote(model, safe='')}" + (f"/versions/{version}" if version else "")


def _why(error: OSError) -> str:
    """The system's message without asyncio's words around it."""
    if isinstance(error, ssl.SSLError) or not error.errno or error.errno < 0:
        return str(error.strerror or error)
    return os.strerror(error.errno)


def _broken(url: str, error: Exception) -> InferenceError:
    if isinstance(error, ResponseTooLarge):
        return ServerError(f"{url}: {error}")
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return ServerError(f"{url} does not speak HTTP; is it Triton's gRPC port (8001), not the HTTP port (8000)?")
    return ConnectionLost(f"{url}: the connection broke before the answer was complete ({error!r})")
