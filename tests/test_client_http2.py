"""gRPC over a plain socket: frames by hand, and the real server over the wire that clients have under gevent."""

from __future__ import annotations

import struct

import grpc
import hpack
import numpy as np
import pytest
from deepseek_client.http2 import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEADERS,
    INITIAL_WINDOW,
    MOST_STREAMS,
    PADDED,
    PING,
    PREFACE,
    REFUSED,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    CallFailed,
    Frames,
    NotHttp2,
    answer_of,
    framed,
    header_block,
)
from deepseek_client.plain_wires import Messages

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BLOCK = header_block({":method": "POST", "long": "x" * 200})
Frame = tuple[int, int, int, bytes]  # kind, flags, stream, payload


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def setting(name: int, value: int) -> bytes:
    return frame(SETTINGS, payload=struct.pack(">HI", name, value))


class Peer:
    """The server's side: what has come, and answers to it."""

    def __init__(self, *settings: bytes) -> None:
        self.frames = Frames()
        self._encoder = hpack.Encoder()
        assert self.frames.take().startswith(PREFACE)
        self.frames.feed(b"".join(settings) or frame(SETTINGS))

    def sent(self) -> list[Frame]:
        """What the client sent since it was last asked."""
        data, found = self.frames.take(), []
        while data:
            high, low, kind, flags, stream = HEAD.unpack_from(data)
            end = HEAD.size + (high << 8 | low)
            found.append((kind, flags, stream, data[HEAD.size : end]))
            data = data[end:]
        return found

    def message(self) -> bytes:
        """The data among it."""
        return b"".join(payload for kind, _, _, payload in self.sent() if kind == DATA)

    def headers(self, stream: int, fields: dict[str, str], flags: int = 0) -> bytes:
        block = self._encoder.encode(list(fields.items()))
        return frame(HEADERS, flags | END_HEADERS, stream, block)

    def answer(self, stream: int, message: bytes) -> bytes:
        first = self.headers(stream, {":status": "200", "content-type": "application/grpc"})
        last = self.headers(stream, {"grpc-status": "0"}, END_STREAM)
        return first + frame(DATA, 0, stream, framed(message)) + last


def test_an_answer_is_read_however_it_was_cut() -> None:
    peer = Peer()
    exchanges = [peer.frames.begin(BLOCK, framed(b"ask")) for _ in range(3)]
    data = b"".join(peer.answer(exchange.stream, b"said %d" % exchange.stream) for exchange in exchanges)
    ended = [each for place in range(0, len(data), 7) for each in peer.frames.feed(data[place : place + 7])]
    assert ended == exchanges
    assert [answer_of(exchange) for exchange in exchanges] == [b"said 1", b"said 3", b"said 5"]


def test_headers_go_on_padded_and_in_pieces() -> None:
    peer = Peer()
    exchange = peer.frames.begin(BLOCK, framed(b"ask"))
    block = hpack.Encoder().encode([(":status", "200")])
    peer.frames.feed(frame(HEADERS, 0, 1, block[:0]) + frame(CONTINUATION, END_HEADERS, 1, block))
    said = framed(b"said")
    peer.frames.feed(frame(DATA, PADDED, 1, b"\x03" + said[:2] + b"\0\0\0"))
    peer.frames.feed(frame(DATA, 0, 1, said[2:4]) + frame(DATA, 0, 1, said[4:]))
    peer.frames.feed(peer.headers(1, {"grpc-status": "0"}, END_STREAM))
    assert answer_of(exchange) == b"said"


def test_no_more_is_sent_than_the_windows_have_room_for() -> None:
    peer = Peer(setting(INITIAL_WINDOW, 30_000))
    message = framed(bytes(100_000))
    exchange = peer.frames.begin(BLOCK, message)
    sent = [(len(payload), flags) for kind, flags, _, payload in peer.sent() if kind == DATA]
    assert sent == [(16384, 0), (13616, 0)]
    peer.frames.feed(frame(WINDOW_UPDATE, 0, exchange.stream, struct.pack(">I", 100_000)))
    assert len(peer.message()) == DEFAULT_WINDOW - 30_000  # now the connection's is the narrower one
    peer.frames.feed(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 100_000)))
    rest = peer.sent()
    assert sum(len(payload) for *_, payload in rest) == len(message) - DEFAULT_WINDOW
    assert [flags for _, flags, *_ in rest][-1] == END_STREAM


def test_a_window_that_the_server_changes_counts_for_streams_that_are_open() -> None:
    peer = Peer(setting(INITIAL_WINDOW, 10))
    peer.frames.begin(BLOCK, framed(bytes(45)))
    assert len(peer.message()) == 10
    peer.frames.feed(setting(INITIAL_WINDOW, 30))
    assert len(peer.message()) == 20


def test_no_more_streams_are_open_than_the_server_allows() -> None:
    peer = Peer(setting(MOST_STREAMS, 2))
    exchanges = [peer.frames.begin(BLOCK, framed(b"ask")) for _ in range(3)]
    assert [exchange.stream for exchange in exchanges] == [1, 3, 0]
    peer.frames.feed(peer.answer(1, b"said"))
    assert [exchange.stream for exchange in exchanges] == [1, 3, 5]
    later = peer.frames.begin(BLOCK, framed(b"ask"))
    assert later.stream == 0
    peer.frames.feed(setting(MOST_STREAMS, 3))
    assert later.stream == 7


def test_a_ping_and_settings_are_acknowledged_and_what_is_not_known_is_passed_over() -> None:
    peer = Peer()
    assert [sent[:2] for sent in peer.sent()] == [(SETTINGS, ACK)]
    peer.frames.feed(frame(PING, 0, 0, b"12345678") + frame(0x42, 0xFF, 0, b"?") + frame(PING, ACK, 0, b"12345678"))
    assert peer.sent() == [(PING, ACK, 0, b"12345678")]


def test_what_the_server_did_not_look_at_is_told_from_what_it_may_have_run() -> None:
    peer = Peer(setting(MOST_STREAMS, 2))
    looked, not_looked, waits = (peer.frames.begin(BLOCK, framed(b"ask")) for _ in range(3))
    ended = peer.frames.feed(frame(GOAWAY, 0, 0, struct.pack(">II", 1, 0)))
    assert ended == [not_looked, waits]
    assert [each.unprocessed for each in (looked, not_looked, waits)] == [False, True, True]
    assert peer.frames.closing
    late = peer.frames.begin(BLOCK, framed(b"ask"))
    assert (late.done, late.unprocessed) == (True, True)
    peer.frames.feed(peer.answer(1, b"said"))
    assert answer_of(looked) == b"said"


def test_of_a_broken_connection_only_what_was_never_sent_is_safe() -> None:
    peer = Peer(setting(MOST_STREAMS, 1))
    sent, waits = peer.frames.begin(BLOCK, framed(b"ask")), peer.frames.begin(BLOCK, framed(b"ask"))
    assert peer.frames.abandon("it broke") == [sent, waits]
    assert (sent.unprocessed, waits.unprocessed) == (False, True)
    with pytest.raises(CallFailed, match="it broke"):
        answer_of(sent)


def test_a_cancelled_call_is_reset_and_its_late_answer_disturbs_no_other() -> None:
    peer = Peer()
    first, second = (peer.frames.begin(BLOCK, framed(b"ask")) for _ in range(2))
    peer.sent()
    peer.frames.cancel(first)
    assert [(kind, stream) for kind, _, stream, _ in peer.sent()] == [(RST_STREAM, 1)]
    assert peer.frames.feed(peer.answer(1, b"late") + peer.answer(3, b"said")) == [second]
    assert answer_of(second) == b"said"


@pytest.mark.parametrize(
    ("fields", "code", "details"),
    [
        ({":status": "200", "grpc-status": "5", "grpc-message": "no%20model%0A"}, "NOT_FOUND", "no model\n"),
        ({":status": "503"}, "UNKNOWN", "Received http2 header with status: 503"),
        ({":status": "200", "grpc-status": "14", "retry-after": "3"}, "UNAVAILABLE", ""),
        ({":status": "200", "grpc-status": "0"}, "INTERNAL", "an answer of 0 bytes"),
        ({":status": "200", "grpc-status": "x"}, "UNKNOWN", ""),
    ],
    ids=["an error", "a gateway's page", "a refusal", "no message", "no status"],
)
def test_what_goes_wrong_has_the_face_of_grpcs_own_errors(fields: dict[str, str], code: str, details: str) -> None:
    peer = Peer()
    exchange = peer.frames.begin(BLOCK, framed(b"ask"))
    peer.frames.feed(peer.headers(1, fields, END_STREAM))
    with pytest.raises(CallFailed) as caught:
        answer_of(exchange)
    assert caught.value.code() is grpc.StatusCode[code]
    assert caught.value.details().startswith(details)
    assert dict(caught.value.trailing_metadata()).get("retry-after") == fields.get("retry-after")


def test_an_answer_that_is_no_message_of_its_kind_is_an_error_like_any() -> None:
    peer = Peer()
    exchange = peer.frames.begin(BLOCK, framed(b"ask"))
    peer.frames.feed(peer.answer(1, b"\xff\xff\xff"))
    with pytest.raises(CallFailed, match="cannot be read"):
        Messages("h:1").answer("ModelInfer", exchange)


def test_a_reset_says_whether_the_call_was_refused() -> None:
    peer = Peer()
    refused, broken = (peer.frames.begin(BLOCK, framed(b"ask")) for _ in range(2))
    peer.frames.feed(
        frame(RST_STREAM, 0, 1, struct.pack(">I", REFUSED)) + frame(RST_STREAM, 0, 3, struct.pack(">I", 2))
    )
    assert (refused.unprocessed, broken.unprocessed) == (True, False)
    with pytest.raises(CallFailed, match="reset"):
        answer_of(broken)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame(PING, 0, 0, b"12345678"),
        frame(SETTINGS) + b"\xff\xff\xff" + bytes(6),
        frame(SETTINGS) + frame(WINDOW_UPDATE, 0, 0, b"?"),
        frame(SETTINGS) + frame(CONTINUATION, END_HEADERS, 1, b""),
        frame(SETTINGS) + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff"),
    ],
    ids=["HTTP/1.1", "no settings first", "too large", "wrong size", "no beginning", "no headers"],
)
def test_nonsense_ends_the_connection(data: bytes) -> None:
    with pytest.raises(NotHttp2):
        Frames().feed(data)


@pytest.mark.parametrize(("timeout_s", "said"), [(0.5, "500000u"), (99.9, "99900000u"), (3600, "3600000m"), (-1, "1u")])
def test_the_servers_deadline_goes_with_the_headers(timeout_s: float, said: str) -> None:
    block = Messages("h:1").block("ModelInfer", (("authorization", "Bearer k"),), timeout_s)
    headers = [tuple(field) for field in hpack.Decoder().decode(block)]
    assert ("grpc-timeout", said) in headers
    assert (":path", "/inference.GRPCInferenceService/ModelInfer") in headers
    assert ("authorization", "Bearer k") in headers


def test_a_header_that_is_long_has_its_length_in_several_bytes() -> None:
    assert hpack.Decoder().decode(BLOCK) == [(":method", "POST"), ("long", "x" * 200)]


def test_a_server_with_a_table_of_no_room_reads_our_headers() -> None:
    frames = Frames()
    frames.take()
    frames.begin(BLOCK, framed(b"x"))
    sent = frames.take()
    size = int.from_bytes(sent[:3])
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0  # raises where it is not told
    headers = decoder.decode(sent[HEAD.size : HEAD.size + size], raw=True)
    assert (b":method", b"POST") in [tuple(each) for each in headers]


@pytest.mark.parametrize("payload", [b"", b"\x05ab", b"\x03ab"], ids=["empty", "too long", "as long"])
def test_padding_longer_than_its_frame_is_no_http2(payload: bytes) -> None:
    peer = Peer()
    peer.frames.begin(BLOCK, framed(b"x"))
    with pytest.raises(NotHttp2, match="padding"):
        peer.frames.feed(frame(DATA, PADDED, 1, payload))
