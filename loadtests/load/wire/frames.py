"""gRPC's unary calls as HTTP/2 frames, without a socket.

Contract: the client's side of RFC 9113 and "gRPC over HTTP/2": one message each way, uncompressed, without TLS. `out`
collects the bytes to send. `feed` returns the calls that ended; it raises NotHttp2 on bytes that it cannot read. It
respects both sides' flow control, the server's limit on streams, pings, GOAWAY and resets. Calls that the server
reports as not processed are marked `unprocessed`. The memory that a server can make it use is bounded.

The settings tell the server to use no table of header fields, so each header block decodes independently and can be
cached. Padding and priorities, which no gRPC server sends, are NotHttp2.

Example:
    frames = Frames()
    call = frames.begin(header_block([(":method", "POST"), ...]), framed(request))
    while not call.done:
        del frames.out[:socket.send(frames.out)]
        frames.feed(socket.recv(65536))
    answer_of(call)
"""

import struct
import urllib.parse
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import grpc.aio
import hpack

DATA, HEADERS, _, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
TABLE_SIZE, ENABLE_PUSH, MOST_STREAMS, INITIAL_WINDOW = range(1, 5)  # settings
REFUSED, CANCEL = 0x7, 0x8  # reasons of a reset
NO_TABLE = b"\x20"  # our own header blocks use no table either (RFC 7541, 6.3)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LARGEST = 2**31 - 1  # window, and number of a stream
DEFAULT_WINDOW, LARGEST_FRAME = 65535, 16384  # bytes; without another setting
REPLENISH = 2**30  # received bytes after which the connection's window is enlarged again
MOST_CACHED = 100  # decoded header blocks
LARGEST_HEADERS = 65536  # bytes of a header block
MOST_REPLIES = 1000  # unsent replies to pings and settings
STATUS = {str(code.value[0]).encode(): code for code in grpc.StatusCode}
HEAD = struct.Struct(">HBBBI")  # of a frame: size in 24 bits, kind, flags, stream


class NotHttp2(OSError):
    """The server violates the protocol; the connection is unusable."""


CallFailed = grpc.aio.AioRpcError


def call_failed(code: grpc.StatusCode, details: str, metadata: Mapping[str, str] | None = None) -> Exception:
    """The error that grpcio raises for a failed call; `metadata` combines headers and trailers."""
    return CallFailed(code, grpc.aio.Metadata(), grpc.aio.Metadata(*(metadata or {}).items()), details)


@dataclass(slots=True, eq=False)
class UnaryCall:
    """One call: the bytes still to be sent, and the response so far."""

    block: bytes
    unsent: memoryview
    stream: int = 0
    """0 while the call waits for a stream."""
    window: int = 0
    headers: Mapping[bytes, bytes] | None = None
    trailers: Mapping[bytes, bytes] = field(default_factory=dict)
    body: bytes | bytearray = b""
    failure: str = ""
    """Why no answer will come, if the server did not report it itself."""
    unprocessed: bool = False
    done: bool = False
    waiter: Any = None
    """For the caller's use."""


class Frames:
    """The client's side of one connection."""

    def __init__(self) -> None:
        self.closing = False
        """No further call can begin on this connection."""
        self.out = bytearray(PREFACE)
        settings = struct.pack(">HIHIHI", TABLE_SIZE, 0, ENABLE_PUSH, 0, INITIAL_WINDOW, LARGEST)
        self._put(SETTINGS, 0, 0, settings)
        self._put(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST - DEFAULT_WINDOW))
        self._streams: dict[int, UnaryCall] = {}
        self._waiting: deque[UnaryCall] = deque()
        self._blocked: dict[int, UnaryCall] = {}  # by stream: no window has room for the rest
        self._next = 1
        self._window, self._initial = DEFAULT_WINDOW, DEFAULT_WINDOW
        self._most = 0  # as in gRPC, no call is sent before the server's first settings
        self._received = 0
        self._replies = 0
        self._rest = b""  # of an incomplete frame
        self._greeted = False
        self._headers, self._ends = b"", 0  # a header block so far, and its END_STREAM

    def begin(self, block: bytes, message: bytes) -> UnaryCall:
        """Begins a call, now or when the server's limit on streams allows it; fails it if the connection is closing."""
        call = UnaryCall(block, memoryview(message))
        if self.closing:
            call.done = call.unprocessed = True
            call.failure = "the connection accepts no more calls"
        else:
            self._waiting.append(call)
            self._start_waiting()
        return call

    def cancel(self, call: UnaryCall) -> None:
        if call in self._waiting:
            self._waiting.remove(call)
        elif not call.done:
            self._put(RST_STREAM, 0, call.stream, struct.pack(">I", CANCEL))
            self._end(call, [])

    def abandon(self, why: str) -> list[UnaryCall]:
        """Fails all unanswered calls after the connection broke, and returns them."""
        self.closing = True
        left = [*self._streams.values(), *self._waiting]
        for call in left:
            call.done, call.unprocessed, call.failure = True, call.stream == 0, why
        self._streams.clear()
        self._waiting.clear()
        return left

    def feed(self, data: bytes) -> list[UnaryCall]:
        """Processes received bytes; returns the calls that they ended. Raises NotHttp2."""
        if self._rest:
            data = self._rest + data
        ended: list[UnaryCall] = []
        at, available = 0, len(data)
        while available - at >= HEAD.size:
            high, low, kind, flags, stream = HEAD.unpack_from(data, at)
            size = high << 8 | low
            if size > LARGEST_FRAME or not (self._greeted or kind == SETTINGS):
                raise NotHttp2(f"the server does not speak HTTP/2: {data[at : at + 24]!r}")
            end = at + HEAD.size + size
            if end > available:
                break
            payload = data[at + HEAD.size : end]
            at = end
            if kind == DATA:
                self._take_data(flags, stream, payload, ended)
            elif kind in (HEADERS, CONTINUATION):
                self._take_headers(kind, flags, stream, payload, ended)
            else:
                self._take_control(kind, flags, stream, payload, ended)
        self._rest = data[at:]
        if self._received > REPLENISH:
            self._put(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received))
            self._received = 0
        return ended

    # -- sending ---------------------------------------------------------------------------------

    def _put(self, kind: int, flags: int, stream: int, payload: bytes | memoryview) -> None:
        size = len(payload)
        self.out += HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream)
        self.out += payload

    def _start_waiting(self) -> None:
        while self._waiting and len(self._streams) < self._most and not self.closing:
            call = self._waiting.popleft()
            call.stream, call.window = self._next, self._initial
            self._next += 2
            self.closing = self._next > LARGEST
            self._streams[call.stream] = call
            # A server with a smaller table than the default expects a notice that our table is empty (RFC 7541, 4.2).
            self._put(HEADERS, END_HEADERS, call.stream, NO_TABLE * (call.stream == 1) + call.block)
            self._send_body(call)

    def _send_body(self, call: UnaryCall) -> None:
        """Sends as much of the message as the windows allow."""
        while (left := len(call.unsent)) > 0:
            room = min(self._window, call.window, LARGEST_FRAME, left)
            if room <= 0:
                self._blocked[call.stream] = call
                return
            self._put(DATA, END_STREAM if room == left else 0, call.stream, call.unsent[:room])
            call.unsent = call.unsent[room:]
            call.window -= room
            self._window -= room
        self._blocked.pop(call.stream, None)

    def _unblock(self) -> None:
        for call in list(self._blocked.values()):
            self._send_body(call)

    def _end(self, call: UnaryCall, ended: list[UnaryCall]) -> None:
        """Ends a call and starts one that waits for a stream."""
        del self._streams[call.stream]
        self._blocked.pop(call.stream, None)
        call.done = True
        ended.append(call)
        self._start_waiting()

    # -- receiving -------------------------------------------------------------------------------

    def _take_data(self, flags: int, stream: int, payload: bytes, ended: list[UnaryCall]) -> None:
        self._received += len(payload)
        call = self._streams.get(stream)
        if call is None:  # it was cancelled
            return
        if flags & PADDED:
            raise NotHttp2("padding")
        if not call.body:
            call.body = payload  # usually all of it
        elif isinstance(call.body, bytes):
            call.body = bytearray(call.body) + payload
        else:
            call.body += payload
        if flags & END_STREAM:
            self._end(call, ended)

    def _take_headers(self, kind: int, flags: int, stream: int, part: bytes, ended: list[UnaryCall]) -> None:
        """Reads a header block: a HEADERS frame, and CONTINUATION frames for what does not fit, as in a long error."""
        if kind == HEADERS:
            if flags & (PADDED | WITH_PRIORITY):
                raise NotHttp2("headers with padding or a priority")
            self._headers, self._ends = b"", flags & END_STREAM
        self._headers += part
        if len(self._headers) > LARGEST_HEADERS:
            raise NotHttp2(f"a header block of more than {LARGEST_HEADERS} bytes")
        if not flags & END_HEADERS:
            return
        found = _decoded(self._headers)
        call = self._streams.get(stream)
        if call is None or found.get(b":status", b"").startswith(b"1"):
            return
        if call.headers is None:
            call.headers = found
        else:
            call.trailers = found
        if self._ends:
            if call.unsent:  # answered before it was completely sent
                self._put(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
            self._end(call, ended)

    def _take_control(self, kind: int, flags: int, stream: int, payload: bytes, ended: list[UnaryCall]) -> None:
        if kind == PUSH_PROMISE:
            raise NotHttp2("a server push, which the settings forbid")
        try:
            if kind == WINDOW_UPDATE:
                self._widen(stream, struct.unpack(">I", payload)[0])
            elif kind == PING and not flags & ACK:
                self._reply(PING, payload)
            elif kind == SETTINGS and not flags & ACK:
                if not self._greeted:
                    self._greeted, self._most = True, LARGEST
                for name, value in struct.iter_unpack(">HI", payload):
                    self._set(name, value)
                self._start_waiting()
                self._reply(SETTINGS, b"")
            elif kind == GOAWAY:
                self._go_away(struct.unpack_from(">I", payload)[0], ended)
            elif kind == RST_STREAM and stream in self._streams:
                call = self._streams[stream]
                (reason,) = struct.unpack(">I", payload)
                call.failure, call.unprocessed = f"the stream was reset (HTTP/2 error {reason})", reason == REFUSED
                self._end(call, ended)
        except struct.error as error:
            raise NotHttp2(f"a frame with a wrong size: {error}") from None

    def _reply(self, kind: int, payload: bytes) -> None:
        """Acknowledges a frame, unless too many replies are unread."""
        self._replies = self._replies + 1 if self.out else 1
        if self._replies > MOST_REPLIES:
            raise NotHttp2("the server sends pings and settings but reads no replies")
        self._put(kind, ACK, 0, payload)

    def _widen(self, stream: int, more: int) -> None:
        if stream == 0:
            self._window += more
        elif stream in self._streams:
            self._streams[stream].window += more
        self._unblock()

    def _set(self, name: int, value: int) -> None:
        if name == INITIAL_WINDOW:
            for call in self._streams.values():
                call.window += value - self._initial
            self._initial = value
            self._unblock()
        elif name == MOST_STREAMS:
            self._most = value

    def _go_away(self, last: int, ended: list[UnaryCall]) -> None:
        """Handles GOAWAY: the server processes no stream after `last`."""
        self.closing = True
        left = [call for number, call in self._streams.items() if number > last]
        for call in left:
            self._end(call, ended)
        ended += self._waiting
        for call in (*left, *self._waiting):
            call.unprocessed = call.done = True
            call.failure = "the server is closing the connection"
        self._waiting.clear()


@lru_cache(MOST_CACHED)
def _decoded(block: bytes) -> Mapping[bytes, bytes]:
    decoder = hpack.Decoder()
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    try:
        return dict(decoder.decode(block, raw=True))
    except hpack.HPACKError as error:
        raise NotHttp2(f"an unreadable header block: {error}") from None


def header_block(headers: Iterable[tuple[str, str]]) -> bytes:
    """Encodes header fields without a table of earlier ones, so that each block can be read alone."""
    return hpack.Encoder().encode([(name, value, True) for name, value in headers], huffman=False)


def framed(request: bytes) -> bytes:
    """A message with gRPC's prefix: the flag for no compression, then the length."""
    return b"\x00" + len(request).to_bytes(4, "big") + request


def answer_of(call: UnaryCall) -> bytes:
    """The message of a call that ended. Raises CallFailed."""
    if call.failure:
        raise call_failed(grpc.StatusCode.UNAVAILABLE, call.failure)
    headers = call.headers or {}
    status = call.trailers.get(b"grpc-status", headers.get(b"grpc-status"))
    if status == b"0":
        body = call.body
        if len(body) < 5 or len(body) != 5 + int.from_bytes(body[1:5], "big"):
            raise call_failed(grpc.StatusCode.INTERNAL, f"an answer of {len(body)} bytes that is not a gRPC message")
        if body[0]:
            raise call_failed(grpc.StatusCode.INTERNAL, "a compressed answer, which was not requested")
        return bytes(memoryview(body)[5:])
    found = {**headers, **call.trailers}
    metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in found.items()}
    if status is not None:
        code = STATUS.get(status, grpc.StatusCode.UNKNOWN)
        raise call_failed(code, urllib.parse.unquote(metadata.get("grpc-message", "")), metadata)
    raise call_failed(
        grpc.StatusCode.UNKNOWN, f"Received http2 header with status: {metadata.get(':status', 'none')}", metadata
    )
