"""The fault suite: servers that fail at every phase. Each call ends in one error, in time, and leaves nothing behind.

The time allowed is the deadline plus 0.2 s, plus what the machine was late by: a thread beside the call measures how late
it wakes up.
"""

from __future__ import annotations

import contextlib
import gc
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import psutil
import pytest
from deepseek_client import InferenceClient, InferenceError, PreparedRequest
from tritonclient.grpc import service_pb2

from tests.failing_servers import Awaited, Kind, answering, dropping, kinds, mute, protocols
from tests.fake_kserve import Y, binary, grpc_serving, http_answer, http_json, http_serving, triton
from tests.waiting import wait_for

Fault = Callable[[socket.socket], Any]
X = {"x": np.ones((1, 3), np.float32)}
DATA = np.arange(3, dtype=np.float32).tobytes()
HTTP_RAW = http_json({"model_name": "m", "outputs": [binary()]}, DATA)
GRPC_RAW = service_pb2.ModelInferResponse(
    model_name="m", outputs=[service_pb2.ModelInferResponse.InferOutputTensor(**Y)], raw_output_contents=[DATA]
).SerializeToString()
TIMEOUT_S, MARGIN_S = 0.3, 0.2
SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # HTTP/2's empty SETTINGS frame


@contextlib.contextmanager
def in_time(timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Allows `timeout_s`, the margin, and five times the worst lateness of a thread that sleeps."""
    over, late_s = threading.Event(), [0.0]

    def watch() -> None:
        while not over.is_set():
            start_s = time.monotonic()
            time.sleep(0.01)
            late_s[0] = max(late_s[0], time.monotonic() - start_s - 0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start_s = time.monotonic()
    try:
        yield
        took_s = time.monotonic() - start_s
    finally:
        over.set()
        watcher.join()
    assert took_s <= timeout_s + MARGIN_S + 5 * late_s[0], f"{took_s:.2f} s; the machine was late by {late_s[0]:.3f} s"


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """Makes `gc.collect` fast: it skips what exists by now, such as torch's objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Waits until the block's threads and sockets are gone."""

    def found() -> tuple[set, set]:
        connections = psutil.Process().net_connections("tcp")
        threads = {each for each in threading.enumerate() if each.name.startswith("deepseek")}
        return threads, {each.fd for each in connections}

    def left() -> list[set]:
        gc.collect()  # a call in a cycle of an exception and its frames keeps its connection open
        return [now - then for now, then in zip(found(), before, strict=True)]

    before = found()
    yield
    wait_for(left, [set(), set()].__eq__)


def reset(connection: socket.socket) -> None:
    """Ends with a reset instead of an orderly close."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def sends(raw: bytes, then: Fault = lambda _: None) -> Fault:
    def answer(connection: socket.socket) -> None:
        connection.sendall(raw)
        then(connection)

    return answer


def trickles(raw: bytes) -> Fault:
    """Sends a byte now and then until the other end closes, and then filler."""

    def answer(connection: socket.socket) -> None:
        for byte in raw + 10_000 * b"z":
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    return answer


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BROKEN: dict[str, list[tuple[str, Fault]]] = {  # connections, which threads and asyncio read each in their own way
    "http": [
        *((f"silence after {size}", sends(HTTP_RAW[:size], mute)) for size in (20, len(HTTP_RAW) - 1)),
        *((f"reset after {size}", sends(HTTP_RAW[:size], reset)) for size in (0, 20, len(HTTP_RAW) - 1)),
        ("trickle in the body", trickles(HEAD + b"Content-Length: 9000\r\n\r\n")),
    ],
    "grpc": [("reset at once", reset), ("silence after the settings", sends(SETTINGS, mute))],
}
WRONG: dict[str, list[tuple[str, Fault]]] = {  # bytes, which one parser reads for both
    "http": [
        ("trickle in the head", trickles(HEAD + b"X-Patience: ")),
        ("trickle of chunks", trickles(CHUNKED + 100 * b"1\r\nz\r\n")),
        ("endless interim answers", sends(9000 * b"HTTP/1.1 100 Continue\r\n\r\n", mute)),
        ("wrong chunk size", sends(CHUNKED + b"zz\r\n", mute)),
        ("no HTTP", sends(b"SSH-2.0-OpenSSH\r\n", mute)),
        ("HTTP/2", sends(SETTINGS, mute)),
    ],
    "grpc": [
        ("trickle of settings", trickles(9000 * SETTINGS)),
        ("half a frame", sends(SETTINGS[:5], mute)),
        ("a frame too large", sends(b"\xff\xff\xff\0\0\0\0\0\1", mute)),
        ("data for no stream", sends(SETTINGS + b"\0\0\1\0\1\0\0\0\7z", mute)),
        ("go away", sends(SETTINGS + b"\0\0\x08\7\0\0\0\0\0\0\0\0\0\0\0\0\1", mute)),
        ("HTTP/1", sends(http_answer(b"{}"), mute)),
        ("garbage", sends(bytes(range(256)), mute)),
    ],
}


@cache
def prepared(protocol: Any) -> PreparedRequest:
    serving: Any = http_serving(triton(lambda: HTTP_RAW)) if protocol == "http" else grpc_serving(lambda _: GRPC_RAW)
    with serving as url, InferenceClient(url, protocol) as client:
        assert client.infer("m", X)["y"].tolist() == [[0, 1, 2]]
        return client.prepare("m", X)


KINDS: dict[str, Kind] = {"threads": InferenceClient, "asyncio": Awaited}
CASES = [
    pytest.param(p, fault, True, kind, id=f"{p}, {name}, {how}")
    for p, faults in BROKEN.items()
    for name, fault in faults
    for how, kind in KINDS.items()
]
CASES += [pytest.param(p, fault, True, InferenceClient, id=f"{p}, {name}") for p in WRONG for name, fault in WRONG[p]]
CASES += [pytest.param(p, reset, False, InferenceClient, id=f"{p}, reset, once") for p in BROKEN]


@pytest.mark.parametrize(("protocol", "fault", "idempotent", "kind"), CASES)
def test_a_fault_ends_in_one_error_in_time(protocol: Any, fault: Fault, idempotent: bool, kind: Kind) -> None:
    request = prepared(protocol)
    with (
        nothing_left(),
        answering(fault) as (url, _),
        kind(url, protocol, timeout_s=TIMEOUT_S, idempotent=idempotent) as client,
    ):
        said = error_in_time(lambda: client.send(request))
    assert "\n" not in said


def error_in_time(call: Callable[[], Any]) -> str:
    """The text of the one error; its traceback, which keeps sockets open, is dropped."""
    with in_time(), pytest.raises(InferenceError) as caught:
        call()
    return str(caught.value)


@kinds
@protocols
@pytest.mark.parametrize("hedged", [False, True], ids=["alone", "hedged"])
def test_addresses_that_do_not_connect_end_in_one_error_in_time(protocol: Any, hedged: bool, kind: Kind) -> None:
    options: dict[str, Any] = {"idempotent": True, "hedge_after_ms": 50} if hedged else {}
    request = prepared(protocol)
    with (
        nothing_left(),
        dropping() as one,
        dropping() as two,
        kind([one, two], protocol, timeout_s=TIMEOUT_S, **options) as client,
    ):
        error_in_time(lambda: client.send(request))
        error_in_time(lambda: client.infer("m", X))


def test_an_http_answer_cut_at_any_byte_is_one_error() -> None:
    request = prepared("http")
    size = [0]
    with (
        nothing_left(),
        answering(lambda connection: connection.sendall(HTTP_RAW[: size[0]])) as (url, _),
        InferenceClient(url, "http", timeout_s=60) as client,
    ):
        for size[0] in range(len(HTTP_RAW)):
            with pytest.raises(InferenceError):
                client.send(request)
        size[0] = len(HTTP_RAW)
        assert client.send(request)["y"].tolist() == [[0, 1, 2]]


def mutated(raw: bytes, dice: random.Random) -> bytes:
    """The bytes with one to three changes: a bit, a slice removed, doubled or replaced, an end cut off."""
    data = bytearray(raw)
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(data) + 1)
        end = min(len(data), start + dice.randint(0, 12))
        change = dice.randrange(5)
        if change == 0 and start < len(data):
            data[start] ^= 1 << dice.randrange(8)
        elif change == 1:
            del data[start:end]
        elif change == 2:
            data[start:start] = data[start:end]
        elif change == 3:
            data[start:end] = dice.randbytes(end - start)
        elif dice.random() < 0.3:
            del data[start:]
    return bytes(data)


def fits(answer: dict[str, np.ndarray]) -> bool:
    """Whether it has the shape and type of the metadata."""
    (y,) = answer.values()
    return list(answer) == ["y"] and y.dtype == np.float32 and y.ndim == 2 and y.shape[1] == 3


@pytest.mark.slow
@protocols
def test_ten_thousand_mutated_answers_are_one_error_or_an_answer_that_fits(protocol: Any) -> None:
    dice, errors = random.Random(20), 0
    before = psutil.Process().memory_info().rss
    serving: Any = (
        http_serving(triton(lambda: mutated(HTTP_RAW, dice)), keep=False)
        if protocol == "http"
        else grpc_serving(lambda _: mutated(GRPC_RAW, dice))
    )
    with serving as url, InferenceClient(url, protocol, timeout_s=60, retries=0) as client:
        request = client.prepare("m", X)
        for _ in range(10_000):
            try:
                assert fits(client.send(request))
            except InferenceError:
                errors += 1
    assert errors > 2000
    assert psutil.Process().memory_info().rss - before < 200e6
