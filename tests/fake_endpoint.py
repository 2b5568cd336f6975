"""A KServe v2 endpoint that computes nothing and fails on request; the load generator is measured against it.

It logs when it received and answered each inference, by the load generator's clock (CLOCK_MONOTONIC), so that reported
percentiles can be compared with the true ones. It serves any model name, over HTTP and gRPC: x (batch, any) float32 in,
y (batch, 1) float32 out, the signature of tests/test_locustfile.py. Faults count inferences from 1, over both protocols,
so that they hit the same place of a schedule each time.

Examples:
    with FakeEndpoint(delay_ms=20, stall_at=300, stall_s=2) as endpoint:
        measure(endpoint.grpc_url); endpoint.stop(); received_s, answered_s = endpoint.log()
    python -m tests.fake_endpoint '{"delay_ms": 5, "refuse_every": 2}'      # until Ctrl-C
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

ROOT = Path(__file__).parent.parent
SERVICE = "/inference.GRPCInferenceService/"
CONFIG = {
    "max_batch_size": 8,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [1]}],
    "parameters": {"precision": {"string_value": "fp32"}},
}
SERVER = {"name": "triton", "version": "0", "extensions": ["statistics"]}  # perf_analyzer asks for it


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The delay and the faults; 0 is never."""

    delay_ms: float = 0.0
    spread: float = 0.0
    """Standard deviation of the delay's logarithm. Delays are log-normal around delay_ms, the same in each run."""
    stall_at: int = 0
    """From this inference on, all answers wait until `stall_s` is over."""
    stall_s: float = 0.0
    refuse_every: int = 0
    """Refuse every n-th inference, as Triton does with a full queue."""
    die_at: int = 0
    """End the process at this inference."""
    refuse_metadata: int = 0
    """How many metadata requests to refuse, from the second on; the first is the check before a load."""
    most_streams: int = 0
    """Limit on concurrent streams per HTTP/2 connection."""


class Endpoint:
    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.received_s: list[float] = []
        self.answered_s: list[float] = []
        self.model = ""
        """The model of the last metadata request."""
        self._stall_ends_s = 0.0
        self._asked = 0
        self._random = random.Random(0)

    def admit(self) -> tuple[int, float]:
        """Logs an inference; returns its number, and the seconds to hold it (negative: refuse it)."""
        now_s, faults = time.perf_counter(), self.faults
        self.received_s.append(now_s)
        self.answered_s.append(np.nan)
        number = len(self.received_s)
        if number == faults.die_at:
            os._exit(1)
        if number == faults.stall_at:
            self._stall_ends_s = now_s + faults.stall_s
        if faults.refuse_every and number % faults.refuse_every == 0:
            return number, -1
        delay_s = faults.delay_ms / 1000 * self._random.lognormvariate(0, faults.spread)
        return number, max(delay_s, self._stall_ends_s - now_s)

    def refuses_metadata(self) -> bool:
        self._asked += 1
        return 1 < self._asked <= 1 + self.faults.refuse_metadata

    def signature(self, model: str) -> dict[str, Any]:
        self.model = model
        return {
            "name": model,
            "versions": ["1"],
            "platform": "none",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
        }

    def statistics(self) -> dict[str, Any]:
        """The part of Triton's statistics that perf_analyzer needs: all models together, without times."""
        count = len(self.received_s)
        counts = {"name": self.model, "version": "1", "inference_count": count, "execution_count": count}
        parts = ("fail", "compute_input", "compute_infer", "compute_output")
        zero: dict[str, dict[str, int]] = {part: {"count": 0, "ns": 0} for part in parts}
        asked = {part: {"count": count, "ns": 0} for part in ("success", "queue")}  # perf_analyzer needs both
        return {"model_stats": [{**counts, "inference_stats": {**zero, **asked}}]}

    async def held(self, number: int, wait_s: float) -> None:
        """Waits `wait_s`, and longer if a stall begins in the meantime."""
        while wait_s > 0:
            await asyncio.sleep(wait_s)
            wait_s = self._stall_ends_s - time.perf_counter()
        self.answered_s[number - 1] = time.perf_counter()


# -- HTTP ----------------------------------------------------------------------------------------


class Http(asyncio.Protocol):
    """The part of HTTP/1.1 that clients of Triton need: sequential requests, bodies of known length."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._received = bytearray()
        self._wanted = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < self._wanted:
            return  # a large body that arrives in pieces
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        at = head.lower().find(b"\r\ncontent-length:")
        size = int(head[at + 17 :].partition(b"\r\n")[0]) if at >= 0 else 0
        self._wanted = len(head) + 4 + size
        if len(body) < size:
            return
        self._received, self._wanted = self._received[self._wanted :], 0
        path = bytes(head.split(b" ", 2)[1])
        if path.endswith(b"/infer"):
            self._infer()
        elif _is_signature(path.decode()) and self._endpoint.refuses_metadata():
            self._answer(*BUSY)
        else:
            self._answer("200 OK", _http_about(path.decode(), self._endpoint))

    def _infer(self) -> None:
        number, wait_s = self._endpoint.admit()
        if wait_s < 0:
            self._answer(*BUSY)
        elif wait_s == 0:
            self._endpoint.answered_s[number - 1] = time.perf_counter()
            self._transport.write(HTTP_ANSWER)
        else:
            asyncio.get_running_loop().create_task(self._infer_late(number, wait_s))

    async def _infer_late(self, number: int, wait_s: float) -> None:
        await self._endpoint.held(number, wait_s)
        self._transport.write(HTTP_ANSWER)

    def _answer(self, status: str, content: bytes) -> None:
        self._transport.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(content)) + content)


def _is_signature(path: str) -> bool:
    return path.startswith("/v2/models/") and path.count("/") == 3


def _http_about(path: str, endpoint: Endpoint) -> bytes:
    found: dict[str, Any] = SERVER if path == "/v2" else CONFIG
    if path.endswith("/ready"):
        return b""
    if path.endswith("/stats"):
        found = endpoint.statistics()
    elif _is_signature(path):
        found = endpoint.signature(path.split("/")[3])
    return json.dumps(found).encode()


def _http_answer() -> bytes:
    output = {"name": "y", "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}}
    header = json.dumps({"model_name": "fake", "outputs": [output]}).encode()
    sizes = b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n" % (len(header), len(header) + 4)
    return b"HTTP/1.1 200 OK\r\n" + sizes + b"\r\n" + header + bytes(4)


HTTP_ANSWER = _http_answer()
BUSY = "503 Service Unavailable", b'{"error":"Exceeds maximum queue size"}'

# -- gRPC ----------------------------------------------------------------------------------------


class Grpc(grpc.GenericRpcHandler):
    """Messages stay bytes: each inference gets the same answer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        output = service_pb2.ModelInferResponse.InferOutputTensor(name="y", datatype="FP32", shape=[1, 1])
        answer = service_pb2.ModelInferResponse(model_name="fake", outputs=[output], raw_output_contents=[bytes(4)])
        self._answer = answer.SerializeToString()
        fixed = {
            "ServerReady": service_pb2.ServerReadyResponse(ready=True),
            "ModelReady": service_pb2.ModelReadyResponse(ready=True),
            "ModelConfig": service_pb2.ModelConfigResponse(config=CONFIG),
            "ServerMetadata": service_pb2.ServerMetadataResponse(**SERVER),
        }
        methods: dict[str, Any] = {name: _always(message.SerializeToString()) for name, message in fixed.items()}
        methods |= {"ModelInfer": self._infer, "ModelMetadata": self._metadata, "ModelStatistics": self._statistics}
        self._handlers = {
            f"{SERVICE}{name}": grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)

    async def _infer(self, _: bytes, context: Any) -> bytes:
        number, wait_s = self._endpoint.admit()
        if wait_s < 0:
            await _refuse(context)
        await self._endpoint.held(number, wait_s)
        return self._answer

    async def _metadata(self, request: bytes, context: Any) -> bytes:
        if self._endpoint.refuses_metadata():
            await _refuse(context)
        name = service_pb2.ModelMetadataRequest.FromString(request).name
        return service_pb2.ModelMetadataResponse(**self._endpoint.signature(name)).SerializeToString()

    async def _statistics(self, *_: Any) -> bytes:
        return service_pb2.ModelStatisticsResponse(**self._endpoint.statistics()).SerializeToString()


def _always(answer: bytes) -> Any:
    async def method(*_: Any) -> bytes:
        return answer

    return method


async def _refuse(context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")


# -- the process ---------------------------------------------------------------------------------


async def serve(faults: Faults, log: Path | None) -> None:
    """Serves until SIGTERM or SIGINT, then writes the log: an array of two rows, received and answered."""
    endpoint, loop, ended = Endpoint(faults), asyncio.get_running_loop(), asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, ended.set)
    http = await loop.create_server(lambda: Http(endpoint), "127.0.0.1", 0)
    limit = [("grpc.max_concurrent_streams", faults.most_streams)] if faults.most_streams else []
    server = grpc.aio.server(options=limit)
    server.add_generic_rpc_handlers((Grpc(endpoint),))
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"http": http.sockets[0].getsockname()[1], "grpc": grpc_port}), flush=True)
    await ended.wait()
    if log is not None:
        np.save(log, np.array([endpoint.received_s, endpoint.answered_s]))
    os._exit(0)  # held requests are never answered


def nearest_rank(ordered: np.ndarray, percent: float) -> float:
    return float(ordered[math.ceil(percent / 100 * len(ordered) - 1e-9) - 1])


class FakeEndpoint:
    """Starts and stops the process."""

    def __init__(self, **faults: float) -> None:
        self._log = Path(tempfile.mkdtemp()) / "log.npy"
        self._command = [sys.executable, "-m", "tests.fake_endpoint", json.dumps(asdict(Faults(**faults)))]  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        self.process = subprocess.Popen([*self._command, str(self._log)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ports = json.loads(self.process.stdout.readline())
        self.http_url, self.grpc_url = f"127.0.0.1:{ports['http']}", f"127.0.0.1:{ports['grpc']}"
        return self

    def stop(self) -> None:
        """Stops the process, which then writes its log, unless a fault ended it before."""
        self.process.terminate()
        self.process.wait(60)

    def log(self) -> np.ndarray:
        """When each inference was received and answered, in seconds of `time.perf_counter()`; shape (2, N)."""
        return np.load(self._log)

    def true_ms(self) -> np.ndarray:
        """Stops the process; the duration of each inference by its log, ascending, without the check before the load."""
        self.stop()
        received_s, answered_s = self.log()[:, 1:]
        return np.sort(answered_s - received_s) * 1000

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.unlink(missing_ok=True)
        self._log.parent.rmdir()


if __name__ == "__main__":
    with suppress(AttributeError, OSError):  # so that a busy machine adds no delay; threads inherit it
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    chosen = Faults(**json.loads(sys.argv[1])) if len(sys.argv) > 1 else Faults()
    asyncio.run(serve(chosen, Path(sys.argv[2]) if len(sys.argv) > 2 else None))
