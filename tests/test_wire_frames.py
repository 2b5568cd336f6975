"""The load generator's HTTP/2 frames, byte by byte: valid server behaviour and violations of the protocol."""

from __future__ import annotations

import contextlib
import random
import struct
from typing import Any

import grpc
import hpack
import pytest

from loadtests.load.wire import frames as wire
from loadtests.load.wire.frames import CallFailed, Frames, NotHttp2, UnaryCall, answer_of, framed, header_block
from loadtests.load.wire.grpc_channel import request_headers, response

BLOCK = header_block([(":method", "POST"), ("long", "x" * 200)])
Frame = tuple[int, int, int, bytes]  # kind, flags, stream, payload


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return wire.HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def setting(name: int, value: int) -> bytes:
    return frame(wire.SETTINGS, payload=struct.pack(">HI", name, value))


class Peer:
    """The server's side: reads the client's frames and makes answers."""

    def __init__(self, *settings: bytes) -> None:
        self.frames = Frames()
        self._encoder = hpack.Encoder()
        assert self.frames.out.startswith(wire.PREFACE)
        del self.frames.out[: len(wire.PREFACE)]
        _, _, _, payload = self.sent()[0]
        for name, value in struct.iter_unpack(">HI", payload):
            if name == wire.TABLE_SIZE:
                self._encoder.header_table_size = value
        self.frames.feed(b"".join(settings) or frame(wire.SETTINGS))

    def begin(self, count: int = 1) -> list[UnaryCall]:
        return [self.frames.begin(BLOCK, framed(b"ask")) for _ in range(count)]

    def sent(self) -> list[Frame]:
        """The frames that the client sent since the last call."""
        data, found = bytes(self.frames.out), []
        self.frames.out.clear()
        while data:
            high, low, kind, flags, stream = wire.HEAD.unpack_from(data)
            end = wire.HEAD.size + (high << 8 | low)
            found.append((kind, flags, stream, data[wire.HEAD.size : end]))
            data = data[end:]
        return found

    def data_sent(self) -> int:
        return sum(len(payload) for kind, _, _, payload in self.sent() if kind == wire.DATA)

    def headers(self, stream: int, fields: dict[str, str], flags: int = 0) -> bytes:
        return frame(wire.HEADERS, flags | wire.END_HEADERS, stream, self._encoder.encode(list(fields.items())))

    def answer(self, stream: int, message: bytes, **trailers: str) -> bytes:
        first = self.headers(stream, {":status": "200", "content-type": "application/grpc"})
        last = self.headers(stream, {"grpc-status": "0", **trailers}, wire.END_STREAM)
        return first + frame(wire.DATA, 0, stream, framed(message)) + last


def test_an_answer_is_read_from_pieces_of_any_size() -> None:
    peer = Peer()
    calls = peer.begin(3)
    data = b"".join(peer.answer(call.stream, b"said %d" % call.stream) for call in calls)
    ended = [call for place in range(0, len(data), 7) for call in peer.frames.feed(data[place : place + 7])]
    assert ended == calls
    assert [answer_of(call) for call in calls] == [b"said 1", b"said 3", b"said 5"]


def test_an_error_longer_than_a_frame_comes_in_pieces() -> None:
    peer = Peer()
    (call,) = peer.begin()
    block = hpack.Encoder().encode([(":status", "200"), ("grpc-status", "13"), ("grpc-message", 40_000 * "x")])
    first, *middle, last = (block[start : start + 8_000] for start in range(0, len(block), 8_000))
    peer.frames.feed(frame(wire.HEADERS, wire.END_STREAM, 1, first))
    for piece in middle:
        peer.frames.feed(frame(wire.CONTINUATION, 0, 1, piece))
    assert not call.done
    peer.frames.feed(frame(wire.CONTINUATION, wire.END_HEADERS, 1, last))
    with pytest.raises(CallFailed, match=40_000 * "x"):
        answer_of(call)


def test_header_blocks_decode_independently() -> None:
    """The client allows no table, so the same bytes always decode to the same fields."""
    peer = Peer()
    for number, trace in enumerate(["a", "b", "a", "a", "b"]):
        (call,) = peer.begin()
        peer.frames.feed(peer.answer(call.stream, b"said", trace=trace, seen=str(number // 2)))
        assert (call.trailers[b"trace"], call.trailers[b"seen"]) == (trace.encode(), str(number // 2).encode())


def test_the_windows_limit_the_data_sent() -> None:
    peer = Peer(setting(wire.INITIAL_WINDOW, 30_000))
    message = framed(bytes(100_000))
    call = peer.frames.begin(BLOCK, message)
    sent = [(len(payload), flags) for kind, flags, _, payload in peer.sent() if kind == wire.DATA]
    assert sent == [(16384, 0), (13616, 0)]
    peer.frames.feed(frame(wire.WINDOW_UPDATE, 0, call.stream, struct.pack(">I", 100_000)))
    assert peer.data_sent() == wire.DEFAULT_WINDOW - 30_000  # now the connection's window is the smaller one
    peer.frames.feed(frame(wire.WINDOW_UPDATE, 0, 0, struct.pack(">I", 100_000)))
    rest = peer.sent()
    assert sum(len(payload) for *_, payload in rest) == len(message) - wire.DEFAULT_WINDOW
    assert [flags for _, flags, *_ in rest][-1] == wire.END_STREAM


def test_settings_change_the_windows_of_open_streams() -> None:
    peer = Peer(setting(wire.INITIAL_WINDOW, 10))
    peer.frames.begin(BLOCK, framed(bytes(45)))
    assert peer.data_sent() == 10
    peer.frames.feed(setting(wire.INITIAL_WINDOW, 30))
    assert peer.data_sent() == 20


def test_the_servers_limit_on_streams_holds() -> None:
    peer = Peer(setting(wire.MOST_STREAMS, 2))
    calls = peer.begin(3)
    assert [call.stream for call in calls] == [1, 3, 0]
    peer.frames.feed(peer.answer(1, b"said"))
    assert calls[2].stream == 5
    (later,) = peer.begin()
    assert later.stream == 0
    peer.frames.feed(setting(wire.MOST_STREAMS, 3))
    assert later.stream == 7


def test_calls_wait_until_the_server_has_said_how_many_it_takes() -> None:
    frames = Frames()
    calls = [frames.begin(BLOCK, framed(b"ask")) for _ in range(3)]
    assert [call.stream for call in calls] == [0, 0, 0]
    frames.feed(setting(wire.MOST_STREAMS, 2))
    assert [call.stream for call in calls] == [1, 3, 0]


def test_pings_and_settings_are_acknowledged_and_unknown_frames_ignored() -> None:
    peer = Peer()
    assert [sent[:2] for sent in peer.sent() if sent[0] == wire.SETTINGS] == [(wire.SETTINGS, wire.ACK)]
    peer.frames.feed(
        frame(wire.PING, 0, 0, b"12345678") + frame(0x42, 0xFF, 0, b"?") + frame(wire.PING, wire.ACK, 0, b"12345678")
    )
    assert peer.sent() == [(wire.PING, wire.ACK, 0, b"12345678")]
    for _ in range(2 * wire.MOST_REPLIES):  # the server reads the replies
        peer.frames.feed(frame(wire.PING, 0, 0, b"12345678"))
        peer.sent()


def test_unprocessed_calls_are_marked() -> None:
    peer = Peer(setting(wire.MOST_STREAMS, 2))
    processed, unprocessed, waits = peer.begin(3)
    assert peer.frames.feed(frame(wire.GOAWAY, 0, 0, struct.pack(">II", 1, 0))) == [unprocessed, waits]
    assert [call.unprocessed for call in (processed, unprocessed, waits)] == [False, True, True]
    (late,) = peer.begin()
    assert (peer.frames.closing, late.done, late.unprocessed) == (True, True, True)
    peer.frames.feed(peer.answer(1, b"said"))
    assert answer_of(processed) == b"said"


def test_after_a_broken_connection_only_calls_that_were_never_sent_are_unprocessed() -> None:
    peer = Peer(setting(wire.MOST_STREAMS, 1))
    sent, waits = peer.begin(2)
    assert peer.frames.abandon("it broke") == [sent, waits]
    assert (sent.unprocessed, waits.unprocessed) == (False, True)
    with pytest.raises(CallFailed, match="it broke"):
        answer_of(sent)


def test_a_cancelled_call_is_reset_and_its_late_answer_is_ignored() -> None:
    peer = Peer(setting(wire.MOST_STREAMS, 2))
    first, second, waits = peer.begin(3)
    peer.sent()
    for call in (waits, first):
        peer.frames.cancel(call)
    assert [(kind, stream) for kind, _, stream, _ in peer.sent()] == [(wire.RST_STREAM, 1)]
    assert peer.frames.feed(peer.answer(1, b"late") + peer.answer(3, b"said")) == [second]
    assert answer_of(second) == b"said"


def test_a_refused_call_differs_from_other_resets() -> None:
    peer = Peer()
    refused, broken = peer.begin(2)
    for stream, reason in ((1, wire.REFUSED), (3, 2)):
        peer.frames.feed(frame(wire.RST_STREAM, 0, stream, struct.pack(">I", reason)))
    assert (refused.unprocessed, broken.unprocessed) == (True, False)
    with pytest.raises(CallFailed, match="reset"):
        answer_of(broken)


@pytest.mark.parametrize(
    ("fields", "code", "details"),
    [
        ({":status": "200", "grpc-status": "5", "grpc-message": "no%20model%0A"}, "NOT_FOUND", "no model\n"),
        ({":status": "503"}, "UNKNOWN", "Received http2 header with status: 503"),
        ({":status": "200", "grpc-status": "14", "retry-after": "3"}, "UNAVAILABLE", ""),
        ({":status": "200", "grpc-status": "0"}, "INTERNAL", "an answer of 0 bytes"),
        ({":status": "200", "grpc-status": "x"}, "UNKNOWN", ""),
        ({":status": "200", "grpc-status": "9" * 5000}, "UNKNOWN", ""),
    ],
    ids=["an error", "a gateway's page", "a refusal", "no message", "no number", "a long number"],
)
def test_failures_look_like_grpcs_errors(fields: dict[str, str], code: str, details: str) -> None:
    peer = Peer()
    (call,) = peer.begin()
    peer.frames.feed(peer.headers(1, fields, wire.END_STREAM))
    with pytest.raises(CallFailed) as caught:
        answer_of(call)
    assert caught.value.code() is grpc.StatusCode[code]
    assert caught.value.details().startswith(details)
    assert dict(caught.value.trailing_metadata()).get("retry-after") == fields.get("retry-after")


def test_an_answer_of_another_message_type_is_an_error() -> None:
    peer = Peer()
    (call,) = peer.begin()
    peer.frames.feed(peer.answer(1, b"\xff\xff\xff"))
    with pytest.raises(CallFailed, match="unreadable answer"):
        response("ModelInfer", call)


GREETED = frame(wire.SETTINGS)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="HTTP/1.1"),
        pytest.param(frame(wire.PING, 0, 0, b"12345678"), id="no settings first"),
        pytest.param(GREETED + b"\xff\xff\xff" + bytes(6), id="frame too large"),
        pytest.param(GREETED + frame(wire.WINDOW_UPDATE, 0, 0, b"?"), id="wrong size"),
        pytest.param(GREETED + frame(wire.PUSH_PROMISE, 0, 1, bytes(4)), id="push"),
        pytest.param(
            GREETED + frame(wire.HEADERS, 0, 1) + 5 * frame(wire.CONTINUATION, 0, 1, bytes(wire.LARGEST_HEADERS // 4)),
            id="long headers",
        ),
        pytest.param(GREETED + frame(wire.DATA, wire.PADDED, 1, b"\0"), id="padding"),
        pytest.param(GREETED + frame(wire.HEADERS, wire.END_HEADERS, 1, b"\x3f\xe1\x1f\x88"), id="a table"),
        pytest.param(GREETED + frame(wire.HEADERS, wire.END_HEADERS, 1, b"\xff" * 7), id="no headers"),
        pytest.param(GREETED + (wire.MOST_REPLIES + 1) * frame(wire.PING, 0, 0, b"12345678"), id="pings without end"),
        pytest.param((wire.MOST_REPLIES + 1) * GREETED, id="settings without end"),
    ],
)
def test_a_server_that_violates_the_protocol_loses_the_connection(data: bytes) -> None:
    peer = Frames()
    peer.begin(BLOCK, framed(b"ask"))
    with pytest.raises(NotHttp2):
        peer.feed(data)


def test_changed_bytes_end_in_answers_or_one_error() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        peer = Peer()
        peer.begin(2)
        data = bytearray(setting(wire.MOST_STREAMS, 2) + peer.answer(1, b"said") + peer.answer(3, b"said"))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(NotHttp2, CallFailed):
            for call in peer.frames.feed(bytes(data)):
                answer_of(call)


@pytest.mark.parametrize(("timeout_s", "said"), [(0.5, "500000u"), (99.9, "99900000u"), (3600, "3600000m"), (-1, "1u")])
def test_the_headers_carry_the_deadline_and_the_metadata(timeout_s: float, said: str) -> None:
    block = request_headers("h:1", "ModelInfer", (("authorization", "Bearer k"),), timeout_s)
    headers = {tuple(field) for field in hpack.Decoder().decode(block)}
    path = (":path", "/inference.GRPCInferenceService/ModelInfer")
    assert headers >= {("grpc-timeout", said), path, ("authorization", "Bearer k")}


def test_a_server_without_a_table_reads_the_clients_headers() -> None:
    peer = Peer()
    peer.begin()
    block = next(payload for kind, *_, payload in peer.sent() if kind == wire.HEADERS)
    decoder: Any = hpack.Decoder()
    decoder.max_allowed_table_size = 0  # raises unless the block announces it too
    assert decoder.decode(block) == [(":method", "POST"), ("long", "x" * 200)]
