"""Connections that are cut in the middle of a request, and half-open connections, whose request never ends."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from loadtests.load.request_log import RequestLog
from tests.bench.failure.setting import WAYS, Row, Service, Setting, grown_row, lost, told

RATE = 10  # requests/s of each concurrent stream
CUTS = 200  # per way
SLOWER = 100.0  # the other callers' p99 may rise by this many ms, or by this factor:
SLOWER_TIMES = 3.0
GROWTH_MIB = 128.0  # for a thousand connections: 64 KiB each for TLS and for the body of a request
LEFT_OVER = 20  # descriptors that may stay open: idle connections
SETTLES_S = 15.0

Open = Callable[[Service, str], socket.socket]


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def begun_call(headers: dict[str, str], size_bytes: int = 100_000) -> bytes:
    """The start of a connection and of a ModelInfer call whose message never ends."""
    fields = {":method": "POST", ":scheme": "http", ":path": "/inference.GRPCInferenceService/ModelInfer"}
    fields |= {":authority": "localhost", "content-type": "application/grpc", "te": "trailers", **headers}
    block = b"".join(b"\x00" + _hpack(name) + _hpack(value) for name, value in fields.items())
    message = b"\x00" + struct.pack(">I", size_bytes) + b"\x0a" * 1000
    opened = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    return opened + frame(1, 4, 1, block) + frame(0, 0, 1, message)


def _hpack(text: str) -> bytes:
    """An uncompressed literal of up to 126 bytes."""
    return bytes([len(text)]) + text.encode()


def begun_post(headers: str, model: str) -> bytes:
    """An HTTP/1.1 request whose body never ends."""
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 100000\r\n\r\n"
    return head.encode() + b"{" * 1000


def http(service: Service, model: str) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", service.ports["http"]), timeout=10)
    plain.sendall(begun_post("", model))
    return plain


def grpc(service: Service, model: str) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", service.ports["grpc"]), timeout=10)
    plain.sendall(begun_call({}))
    return plain


def http_by_gateway(service: Service, model: str) -> socket.socket:
    encrypted = service.gateway.connect()
    encrypted.sendall(begun_post(f"Authorization: Bearer {service.crowd_key}\r\n", model))
    return encrypted


def grpc_by_gateway(service: Service, model: str) -> socket.socket:
    encrypted = service.gateway.connect("h2")
    encrypted.sendall(begun_call({"authorization": f"Bearer {service.crowd_key}"}))
    return encrypted


def no_handshake(service: Service, model: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.gateway.port), timeout=10)


CUT: dict[str, Open] = {
    "http": http, "grpc": grpc, "http by gateway": http_by_gateway, "grpc by gateway": grpc_by_gateway,
}  # fmt: skip
HALF_OPEN: dict[str, Open] = {**CUT, "gateway, no TLS handshake": no_handshake}


def cut_connections(setting: Setting) -> list[Row]:
    """Resets connections in the middle of the body, while others call."""
    with setting.service("cut") as service:
        before = service.descriptors()

        def cut() -> None:
            for opened in CUT.values():
                for _ in range(CUTS):
                    connection = opened(service, setting.model.name)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                    with contextlib.suppress(OSError):
                        connection.close()

        answers, _ = _meanwhile(setting, service, cut)
        left = _settled(service, before)
    what = f"{CUTS * len(CUT)} connections cut in the middle of a request, over {', '.join(CUT)}"
    return [_others(what, answers), _left_over(left)]


def half_open_connections(setting: Setting) -> list[Row]:
    """Holds half-open connections while others call, then closes them."""
    with setting.service("half-open") as service:
        # Raised after the server has started: a child process inherits the limit.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, setting.connections + 1000)), hard))
        return [row for name, opened in HALF_OPEN.items() for row in _held(setting, service, name, opened)]


def _held(setting: Setting, service: Service, name: str, opened: Open) -> list[Row]:
    before, before_mib = service.descriptors(), service.memory_mib()
    grown_mib = [0.0]

    def hold() -> None:
        with contextlib.ExitStack() as held:
            for _ in range(setting.connections):
                held.enter_context(contextlib.closing(opened(service, setting.model.name)))
            time.sleep(setting.watch_s)
            grown_mib[0] = service.memory_mib() - before_mib

    answers, marks = _meanwhile(setting, service, hold)
    left = _settled(service, before)
    quiet_ms, held_ms = (_p99_ms(answers, *stretch) for stretch in (marks[:2], marks[1:]))
    limit_ms = max(quiet_ms + SLOWER, SLOWER_TIMES * quiet_ms)
    what = f"{setting.connections} half-open connections, {name}"
    return [
        _others(what, answers),
        Row(
            what="    and their p99",
            asked=f"at most {limit_ms:.0f} ms",
            seen=f"{held_ms:.0f} ms, {quiet_ms:.0f} ms before",
            holds=held_ms <= limit_ms,
        ),
        grown_row(grown_mib[0], before_mib, most_mib=GROWTH_MIB),
        _left_over(left),
    ]


def _meanwhile(
    setting: Setting, service: Service, act: Callable[[], Any]
) -> tuple[dict[str, RequestLog], tuple[float, float, float]]:
    """Runs a load on every way before, during and after `act`; returns the answers, and 0, the start and the end of it."""
    streams = [setting.stream(service, way, f"{RATE}x600") for way in WAYS]
    with setting.load(service, streams) as load:
        time.sleep(setting.watch_s)
        began_s = load.now_s
        act()
        ended_s = load.now_s
        time.sleep(1)
        return load.stop(), (0.0, began_s, ended_s)


def _p99_ms(answers: dict[str, RequestLog], begins_s: float, ends_s: float) -> float:
    return max(each.between(begins_s, ends_s).answered.latency_ms(99) for each in answers.values())


def _others(what: str, answers: dict[str, RequestLog]) -> Row:
    sent = sum(len(each) for each in answers.values())
    seen = f"{lost(answers)} of {sent} failed{told(answers)}"
    return Row(what=f"{what}: other callers", asked="no request fails", seen=seen, holds=lost(answers) == 0)


def _settled(service: Service, before: int) -> int:
    """Waits until the extra descriptors are closed, for at most SETTLES_S; returns how many are left."""
    ends_s = time.monotonic() + SETTLES_S
    while (left := service.descriptors() - before) > LEFT_OVER and time.monotonic() < ends_s:
        time.sleep(0.5)
    return left


def _left_over(left: int) -> Row:
    seen = f"{left:+d} descriptors"
    return Row(what="    afterwards", asked="closed", seen=seen, holds=left <= LEFT_OVER)
