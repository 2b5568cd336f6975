"""Sends texts to Triton: KServe v2 over HTTP/1.1 with binary tensors, one call at a time on a connection.

Contract: raises the client's errors. A cancelled call closes its connection. The client itself also checks requests and
answers against the metadata, retries and balances, which costs several times the CPU time
(docs/research/2026-11-openai-routes.md).
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
from deepseek_client import ConnectionLost, DeadlineExceeded, ServerError, Unreachable
from deepseek_client.server_errors import error_of_status, one_line
from deepseek_client.tensors import to_numpy
from deepseek_client.transport import Parameters

from deepseek.spec import TEXT

HEAD_END = b"\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
BODY_BYTES = re.compile(rb"\r\ncontent-length: *(\d+)\r", re.IGNORECASE)
JSON_BYTES = re.compile(rb"\r\ninference-header-content-length: *(\d+)\r", re.IGNORECASE)


class TritonHttp:
    """The connections to one server, `host:port`."""

    def __init__(self, url: str) -> None:
        self._host, _, self._port = url.rpartition(":")
        self._idle: list[_Connection] = []

    async def infer(
        self,
        model: str,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        outputs: Sequence[str],
        *,
        timeout_s: float,
        parameters: Parameters,
    ) -> tuple[str, dict[str, np.ndarray]]:
        """The model's version that answered, and its outputs, (texts, ...) each.

        Takes at most the model's largest batch of texts or pairs.
        """
        try:
            status, head, body = await self._exchange(_request(model, texts, outputs, timeout_s, parameters), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"Triton did not answer within {timeout_s:g} s") from None
        try:
            if status == 200:
                return _arrays(head, body, len(texts))
            reason = one_line(orjson.loads(body)["error"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"Triton: an answer that cannot be read (status {status}: {error!r})") from None
        raise error_of_status(status, reason)

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: Sequence[bytes], timeout_s: float) -> tuple[int, bytes, bytes]:
        """Status, head and body."""
        connection = None
        while connection is None or connection.lost:
            connection = self._idle.pop() if self._idle else await self._opened(timeout_s)
        try:
            answer = await connection.exchange(request, timeout_s)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    async def _opened(self, timeout_s: float) -> "_Connection":
        try:
            async with asyncio.timeout(timeout_s):
                opening = asyncio.get_running_loop().create_connection(_Connection, self._host, int(self._port))
                return (await opening)[1]
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise Unreachable(f"Triton does not listen at {self._host}:{self._port}") from None


class _Connection(asyncio.Protocol):
    """A connection that is kept."""

    def __init__(self) -> None:
        self.lost = False
        self._transport: Any = None
        self._received = bytearray()
        self._body = self._end = 0  # where the body begins and ends; 0: the head is not complete yet
        self._answer: asyncio.Future[tuple[int, bytes, bytes]] | None = None

    async def exchange(self, request: Sequence[bytes], timeout_s: float) -> tuple[int, bytes, bytes]:
        """Sends a request. Raises TimeoutError, ConnectionLost."""
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        timer = loop.call_later(timeout_s, self._fail, TimeoutError())
        self._transport.writelines(request)
        try:
            return await self._answer
        finally:
            timer.cancel()
            self._answer = None

    def close(self) -> None:
        """Closes it at once."""
        self.lost = True
        self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._fail(ConnectionLost("Triton closed the connection before the answer was complete"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._end:
            self._body = self._received.find(HEAD_END) + len(HEAD_END)
            if self._body < len(HEAD_END):
                return
            size = BODY_BYTES.search(self._received, 0, self._body)
            self._end = self._body + int(size[1]) if size else -1
        if len(self._received) < self._end:
            return
        received, status = bytes(self._received), STATUS.match(self._received)
        if self._answer is None or self._answer.done() or status is None or len(received) != self._end:
            self._fail(ServerError("Triton: an answer that is not HTTP/1.1 with a Content-Length"))
            self.close()
            return
        self._answer.set_result((int(status[1]), received[: self._body], received[self._body :]))
        self._received.clear()
        self._end = 0

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _request(
    model: str,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    outputs: Sequence[str],
    timeout_s: float,
    parameters: Parameters,
) -> tuple[bytes, bytes]:
    """Head and body. The queue drops the request after the time-out, in microseconds."""
    pieces: list[bytes] = []
    for each in texts:
        for text in (each,) if isinstance(each, str) else each:
            data = text.encode()
            pieces += (len(data).to_bytes(4, "little"), data)
    shape = [len(texts), len(pieces) // 2 // len(texts)]
    tensor = b"".join(pieces)
    binary = {"binary_data_size": len(tensor)}
    header = orjson.dumps(
        {
            "inputs": [{"name": TEXT, "shape": shape, "datatype": "BYTES", "parameters": binary}],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
            "parameters": {**parameters, "timeout": max(1, int(timeout_s * 1e6))},
        }
    )
    head = (
        f"POST /v2/models/{quote(model, safe='')}/infer HTTP/1.1\r\nHost: triton\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(header) + len(tensor)}\r\n\r\n"
    )
    return head.encode() + header, tensor


def _arrays(head: bytes, body: bytes, rows: int) -> tuple[str, dict[str, np.ndarray]]:
    """The model's version, and the outputs by name. Raises ValueError, KeyError or TypeError."""
    size = JSON_BYTES.search(head)
    end = int(size[1]) if size else 0
    found, answer = {}, orjson.loads(body[:end])
    for output in answer["outputs"]:
        start, end = end, end + output["parameters"]["binary_data_size"]
        found[output["name"]] = array = to_numpy(output["datatype"], output["shape"], body[start:end])
        if len(array) != rows:
            raise ValueError(f"{output['name']} has {len(array)} rows for {rows} texts")
    return answer["model_version"], found
