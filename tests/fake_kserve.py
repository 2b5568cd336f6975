"""Small KServe v2 servers whose every byte a test chooses, over HTTP and gRPC."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

from tritonclient.grpc import service_pb2

from tests.failing_servers import accepting, grpc_answering

Y = {"name": "y", "datatype": "FP32", "shape": [1, 3]}
SIGNATURE = {
    "name": "m",
    "versions": ["1"],
    "platform": "",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
}


def http_answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def http_json(value: Any, tensors: bytes = b"", **kwargs: Any) -> bytes:
    """An answer with a JSON head; with `tensors` in Triton's binary format."""
    head = json.dumps(value).encode()
    return http_answer(
        head + tensors, *([f"Inference-Header-Content-Length: {len(head)}"] if tensors else []), **kwargs
    )


def binary(**changes: Any) -> dict[str, Any]:
    """One output of 12 bytes, changed."""
    return {**copy.deepcopy(Y), "parameters": {"binary_data_size": 12}, **changes}


@contextlib.contextmanager
def http_serving(answer: Callable[[str, bytes], bytes | None], *, keep: bool = True) -> Iterator[str]:
    """A server that sends `answer(path, body)`, and closes the connection after None; `keep` False: after any answer."""

    def serve(connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            while (line := stream.readline()).strip():
                head = line + b"".join(iter(stream.readline, b"\r\n"))
                size = re.search(rb"(?i)content-length: (\d+)", head.replace(b"Inference-Header-Content-Length", b""))
                body = stream.read(int(size[1])) if size else b""
                if (raw := answer(line.split()[1].decode(), body)) is None:
                    return
                connection.sendall(raw)
                if not keep:
                    return

    with accepting(serve) as url:
        yield url


@contextlib.contextmanager
def grpc_serving(infer: Callable[[bytes], bytes]) -> Iterator[str]:
    """A gRPC server with that signature and no configuration; `infer` makes the bytes of its answers."""
    metadata = service_pb2.ModelMetadataResponse(**SIGNATURE).SerializeToString()
    with grpc_answering(lambda request, _: infer(request), "ModelInfer", metadata=metadata) as (url, _):
        yield url


def triton(infer: Callable[[], bytes | None], signature: Any = SIGNATURE) -> Callable[[str, bytes], bytes | None]:
    """The answers of a Triton over HTTP that hides its configuration and server metadata."""

    def answer(path: str, body: bytes) -> bytes | None:
        if path.endswith("/infer"):
            return infer()
        return http_json(signature) if path.endswith("/m") else http_answer(b"", status="404 Not Found")

    return answer
