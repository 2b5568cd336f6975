"""gRPC's unary calls as HTTP/2 frames: what is to be sent, what has come. No socket, no thread, no waiting.

For where gRPC's own library cannot be used well: under gevent it hands every event from a thread to the loop, at
several times the cost of the call itself. `plain_wires` puts it on a socket.

Contract: RFC 9113 and "gRPC over HTTP/2", the client's side, one message each way, uncompressed, without TLS. Frames to
send gather until `take`; `feed` says which calls ended. Flow control of both sides, the server's limit on streams,
pings, GOAWAY and resets are kept to here, so that a caller only waits for its answer. A call that the server says not
to have looked at is marked `unprocessed`. Header compression is the package hpack's.

Example:
    frames = Frames()
    exchange = frames.begin(header_block({":method": "POST", ...}), framed(request))
    socket.sendall(frames.take())
    while not exchange.done:
        frames.feed(socket.recv(65536))
    answer_of(exchange)
"""

import struct
import urllib.parse
from collections import deque
from collections.abc import Mapping
from typing import Any

import grpc
import hpack

DATA, HEADERS, _, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
MOST_STREAMS, INITIAL_WINDOW, FRAME_SIZE = 3, 4, 5  # settings
ENABLE_PUSH = 2
REFUSED, CANCEL = 0x7, 0x8  # reasons of a reset
NO_TABLE = b"\x20"  # our table of header fields has no room (RFC 7541, 6.3)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LARGEST = 2**31 - 1  # of a window, and of a stream's number
DEFAULT_WINDOW, DEFAULT_FRAME = 65535, 16384
MOST_KNOWN = 100  # blocks of headers whose meaning is kept
REPLENISH = 2**30  # received bytes after which the connection's window is opened again
STATUS = {code.value[0]: code for code in grpc.StatusCode}
HEAD = struct.Struct(">HBBBI")  # of a frame: size in 24 bits, kind, flags, stream


class NotHttp2(OSError):
    """What the other side sends cannot be understood; the connection is of no use."""


class CallFailed(grpc.RpcError):
    """A call that did not end well, with the face of gRPC's own errors."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(code, details)
        self._code, self._details, self._metadata = code, details, tuple((metadata or {}).items())

    def code(self) -> grpc.StatusCode:
        """The status."""
        return self._code

    def details(self) -> str:
        """The server's words, or ours."""
        return self._details

    def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        """None of their own: see trailing_metadata."""
        return ()

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """Headers and trailers together."""
        return self._metadata


class Exchange:
    """One call: what is still to be sent of it, and what has come."""

    __slots__ = (
        *("block", "body", "done", "failure", "headers", "reset", "stream"),
        *("trailers", "unprocessed", "unsent", "waiter", "window"),
    )

    def __init__(self, block: bytes, message: bytes) -> None:
        self.block, self.unsent = block, memoryview(message)
        self.stream = 0  # while it waits for one
        self.window = 0
        self.headers: Mapping[bytes, bytes] | None = None
        self.trailers: Mapping[bytes, bytes] = {}
        self.body: bytes | bytearray = b""
        self.reset: int | None = None
        self.failure = ""
        """Why there will be no answer, where it is not the server that says so."""
        self.unprocessed = False
        self.done = False
        self.waiter: Any = None
        """Its caller's."""


class Frames:
    """The client's side of one connection."""

    def __init__(self) -> None:
        self.closing = False
        """No further call can begin here."""
        self._out = bytearray(PREFACE)
        self._put(SETTINGS, 0, 0, struct.pack(">HIHI", ENABLE_PUSH, 0, INITIAL_WINDOW, LARGEST))
        self._put(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST - DEFAULT_WINDOW))
        self._decoder = hpack.Decoder()
        self._known: dict[bytes, Mapping[bytes, bytes]] = {}
        self._streams: dict[int, Exchange] = {}
        self._waiting: deque[Exchange] = deque()
        self._blocked: dict[int, Exchange] = {}  # by stream: no window has room for the rest
        self._next = 1
        self._window, self._initial, self._size, self._most = DEFAULT_WINDOW, DEFAULT_WINDOW, DEFAULT_FRAME, LARGEST
        self._received = 0
        self._rest = b""  # of a frame that has not come whole
        self._greeted = False
        self._opened: tuple[int, int, bytes] | None = None  # headers that CONTINUATION goes on with

    def take(self) -> bytes:
        """What is to be sent, in order; it is then forgotten."""
        out, self._out = self._out, bytearray()
        return bytes(out)

    def put_back(self, rest: bytes) -> None:
        """Of what was taken, that which could not be sent yet."""
        self._out = bytearray(rest) + self._out

    def begin(self, block: bytes, message: bytes) -> Exchange:
        """A call, now or when the server's limit on streams allows it; done at once where none can begin any more."""
        exchange = Exchange(block, message)
        if self.closing:
            exchange.done = exchange.unprocessed = True
            exchange.failure = "the connection takes no more calls"
        elif len(self._streams) < self._most and not self._waiting:
            self._start(exchange)
        else:
            self._waiting.append(exchange)
        return exchange

    def cancel(self, exchange: Exchange) -> None:
        """Nobody waits for it any more."""
        if exchange.done:
            return
        if exchange.stream in self._streams:
            self._put(RST_STREAM, 0, exchange.stream, struct.pack(">I", CANCEL))
            self._end(exchange, [])
        elif exchange in self._waiting:
            self._waiting.remove(exchange)

    def abandon(self, why: str) -> list[Exchange]:
        """The connection broke: all calls that had no answer."""
        self.closing = True
        for exchange in self._waiting:
            exchange.unprocessed = True
        left = [*self._streams.values(), *self._waiting]
        self._streams.clear()
        self._waiting.clear()
        for exchange in left:
            exchange.done, exchange.failure = True, why
        return left

    def feed(self, data: bytes) -> list[Exchange]:
        """The calls that ended by this. Raises NotHttp2."""
        if self._rest:
            data = self._rest + data
        ended: list[Exchange] = []
        at, available = 0, len(data)
        while available - at >= HEAD.size:
            high, low, kind, flags, stream = HEAD.unpack_from(data, at)
            size = high << 8 | low
            if size > DEFAULT_FRAME or not (self._greeted or kind == SETTINGS):
                raise NotHttp2(f"it does not speak HTTP/2: {data[at : at + 24]!r}")
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
        self._out += HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream)
        self._out += payload

    def _start(self, exchange: Exchange) -> None:
        exchange.stream = stream = self._next
        self._next += 2
        self.closing = self.closing or self._next > LARGEST
        self._streams[stream] = exchange
        exchange.window = self._initial
        # A server may have a smaller table than the usual one, and has to be told that ours is none (RFC 7541, 4.2).
        block, size = NO_TABLE * (stream == 1) + exchange.block, self._size
        self._put(HEADERS, END_HEADERS if len(block) <= size else 0, stream, block[:size])
        for start in range(size, len(block), size):
            self._put(
                CONTINUATION, END_HEADERS if start + size >= len(block) else 0, stream, block[start : start + size]
            )
        self._go_on(exchange)

    def _go_on(self, exchange: Exchange) -> None:
        """Sends as much of the message as the windows have room for."""
        while (left := len(exchange.unsent)) > 0:
            room = min(self._window, exchange.window, self._size, left)
            if room <= 0:
                self._blocked[exchange.stream] = exchange
                return
            self._put(DATA, END_STREAM if room == left else 0, exchange.stream, exchange.unsent[:room])
            exchange.unsent = exchange.unsent[room:]
            exchange.window -= room
            self._window -= room
        self._blocked.pop(exchange.stream, None)

    def _unblock(self) -> None:
        for exchange in list(self._blocked.values()):
            self._go_on(exchange)

    def _end(self, exchange: Exchange, ended: list[Exchange]) -> None:
        """It needs its stream no longer; who waits for one has it now."""
        del self._streams[exchange.stream]
        self._blocked.pop(exchange.stream, None)
        exchange.done = True
        ended.append(exchange)
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self._waiting and len(self._streams) < self._most and not self.closing:
            self._start(self._waiting.popleft())

    # -- receiving -------------------------------------------------------------------------------

    def _take_data(self, flags: int, stream: int, payload: bytes, ended: list[Exchange]) -> None:
        self._received += len(payload)
        exchange = self._streams.get(stream)
        if exchange is None:  # it was cancelled
            return
        payload = _unpadded(payload) if flags & PADDED else payload
        if not exchange.body:
            exchange.body = payload  # nearly always all of it
        elif isinstance(exchange.body, bytes):
            exchange.body = bytearray(exchange.body) + payload
        else:
            exchange.body += payload
        if flags & END_STREAM:
            self._end(exchange, ended)

    def _take_headers(self, kind: int, flags: int, stream: int, payload: bytes, ended: list[Exchange]) -> None:
        if kind == CONTINUATION:
            if self._opened is None or self._opened[1] != stream:
                raise NotHttp2("headers that go on without a beginning")
            ends, _, begun = self._opened
            payload, flags = begun + payload, flags | ends
        else:
            payload = _unpadded(payload) if flags & PADDED else payload
            payload = payload[5:] if flags & WITH_PRIORITY else payload
        self._opened = None if flags & END_HEADERS else (flags & END_STREAM, stream, payload)
        if self._opened is not None:
            return
        found = self._decoded(payload)  # of a cancelled stream, too: the table goes on
        exchange = self._streams.get(stream)
        if exchange is None or found.get(b":status", b"").startswith(b"1"):
            return
        if exchange.headers is None:
            exchange.headers = found
        else:
            exchange.trailers = found
        if flags & END_STREAM:
            if exchange.unsent:  # it was answered before it was sent
                self._put(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
            self._end(exchange, ended)

    def _decoded(self, block: bytes) -> Mapping[bytes, bytes]:
        """Headers by name. The same block means the same again, until one changes the table."""
        found = self._known.get(block)
        if found is None:
            before = self._table()
            try:
                found = dict(self._decoder.decode(block, raw=True))
            except hpack.HPACKError as error:
                raise NotHttp2(f"headers that cannot be read: {error}") from None
            if self._table() != before or len(self._known) >= MOST_KNOWN:
                self._known.clear()
            else:
                self._known[block] = found
        return found

    def _table(self) -> tuple[int, int, Any]:
        """What tells one state of the table from the next: it only grows at its front, or is cut."""
        entries = self._decoder.header_table.dynamic_entries
        return self._decoder.header_table.maxsize, len(entries), entries[0] if entries else None

    def _take_control(self, kind: int, flags: int, stream: int, payload: bytes, ended: list[Exchange]) -> None:
        try:
            if kind == WINDOW_UPDATE:
                self._widen(stream, struct.unpack(">I", payload)[0])
            elif kind == PING and not flags & ACK:
                self._put(PING, ACK, 0, payload)
            elif kind == SETTINGS and not flags & ACK:
                self._greeted = True
                for name, value in struct.iter_unpack(">HI", payload):
                    self._set(name, value)
                self._put(SETTINGS, ACK, 0, b"")
            elif kind == GOAWAY:
                self._go_away(struct.unpack_from(">I", payload)[0], ended)
            elif kind == RST_STREAM and stream in self._streams:
                exchange = self._streams[stream]
                exchange.reset = struct.unpack(">I", payload)[0]
                exchange.unprocessed = exchange.reset == REFUSED
                self._end(exchange, ended)
        except struct.error as error:
            raise NotHttp2(f"a frame of the wrong size: {error}") from None
        if kind == PUSH_PROMISE:
            raise NotHttp2("a push, which was forbidden")

    def _widen(self, stream: int, more: int) -> None:
        if stream == 0:
            self._window += more
        elif stream in self._streams:
            self._streams[stream].window += more
        if self._blocked:
            self._unblock()

    def _set(self, name: int, value: int) -> None:
        if name == INITIAL_WINDOW:
            for exchange in self._streams.values():
                exchange.window += value - self._initial
            self._initial = value
            self._unblock()
        elif name == FRAME_SIZE:
            self._size = value
        elif name == MOST_STREAMS:
            self._most = value
            self._start_waiting()

    def _go_away(self, last: int, ended: list[Exchange]) -> None:
        """The server looks at no later stream than `last`."""
        self.closing = True
        left = [each for number, each in self._streams.items() if number > last]
        for exchange in left:
            self._end(exchange, ended)
        ended += self._waiting
        for exchange in (*left, *self._waiting):
            exchange.unprocessed = exchange.done = True
            exchange.failure = "the server goes away"
        self._waiting.clear()


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise NotHttp2("padding that is longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def header_block(headers: Mapping[str, str]) -> bytes:
    """Header fields as literals that leave the server's table alone, so that they may be sent in any order."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers.items())


def _text(text: str) -> bytes:
    """A string with its length, in seven bits and more (RFC 7541, 5.1 and 5.2)."""
    data = text.encode("latin-1")
    if len(data) < 0x7F:
        return bytes((len(data),)) + data
    size, rest = bytearray(b"\x7f"), len(data) - 0x7F
    while rest >= 0x80:
        size.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes(size) + bytes((rest,)) + data


def framed(request: bytes) -> bytes:
    """A message as gRPC has it: not compressed, its length, itself."""
    return b"\x00" + len(request).to_bytes(4, "big") + request


def answer_of(exchange: Exchange) -> bytes:
    """The message of a call that ended. Raises CallFailed."""
    if exchange.failure:
        raise CallFailed(grpc.StatusCode.UNAVAILABLE, exchange.failure)
    headers = exchange.headers or {}
    said = exchange.trailers.get(b"grpc-status", headers.get(b"grpc-status"))
    if said == b"0":
        body = exchange.body
        if len(body) < 5 or len(body) != 5 + int.from_bytes(body[1:5], "big"):
            raise CallFailed(grpc.StatusCode.INTERNAL, f"an answer of {len(body)} bytes that is no message")
        if body[0]:
            raise CallFailed(grpc.StatusCode.INTERNAL, "a compressed answer, which was not asked for")
        return bytes(memoryview(body)[5:])
    told = {name.decode("latin-1"): value.decode("latin-1") for name, value in {**headers, **exchange.trailers}.items()}
    if said is not None:
        code = STATUS.get(int(said) if said.isdigit() else 2, grpc.StatusCode.UNKNOWN)
        raise CallFailed(code, urllib.parse.unquote(told.get("grpc-message", "")), told)
    if exchange.reset is not None:
        raise CallFailed(grpc.StatusCode.UNAVAILABLE, f"the stream was reset (HTTP/2 error {exchange.reset})", told)
    status = told.get(":status", "none")
    raise CallFailed(grpc.StatusCode.UNKNOWN, f"Received http2 header with status: {status}", told)
