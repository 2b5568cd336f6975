"""Reads one HTTP/1.1 response from a blocking or asynchronous stream; httptools parses it.

Contract: `read_response(receive, limit)` raises http.client's exceptions: BadStatusLine if this is not HTTP,
RemoteDisconnected if the stream ends or breaks before the first byte, IncompleteRead if it ends in the middle,
ResponseTooLarge if it is larger than `limit`, HTTPException for anything else. `keep` is False if the connection cannot
be reused, for example after stray bytes.
"""

import http.client
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import httptools

LARGEST_HEAD_BYTES = 65536
Receive = Callable[[int], Awaitable[bytes | bytearray]]
"""The next bytes, at most the number wanted if that is above 0; empty at the end of the stream."""


class ResponseTooLarge(http.client.HTTPException):
    """More bytes than the caller allows."""


@dataclass(slots=True, kw_only=True)
class Response:
    """Status, headers (names in lower case) and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray
    keep: bool
    """Whether the connection can be reused."""


class _Reader:
    """Collects what the parser reports. Responses with a status below 200, such as 100 Continue, are skipped."""

    def __init__(self, limit: int) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._limit = limit
        self._body: bytes | bytearray = b""
        self._in_body = False
        self._received = 0
        self.headers: dict[str, str] = {}
        self.missing = 0
        """Bytes of the body still to come, if known."""
        self.response: Response | None = None

    def feed(self, data: bytes | bytearray) -> None:
        """Parses the bytes. Raises HTTPException."""
        self._received += len(data)
        if max(self._received, self.missing) > self._limit + LARGEST_HEAD_BYTES:
            raise ResponseTooLarge(f"an answer larger than max_response_bytes={self._limit}; allow more")
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.response is None:
                raise self._unreadable(data, error) from None
            self.response.keep = False  # stray bytes after the response
        if not self._in_body and self.response is None and self._received > LARGEST_HEAD_BYTES:
            raise http.client.LineTooLong("head of the response")

    def end(self) -> None:
        """Called at the end of the stream. Raises IncompleteRead unless the body is complete."""
        if self._in_body and not self.headers.keys() & {"content-length", "transfer-encoding"}:
            self._complete(keep=False)
        else:
            raise http.client.IncompleteRead(bytes(self._body[:80]), self.missing or None)

    def close(self) -> None:
        """Breaks the reference cycle with the parser, so that the garbage collector need not find it."""
        del self._parser

    def _unreadable(self, data: bytes | bytearray, error: Exception) -> http.client.HTTPException:
        if self.headers or self._in_body or self._parser.get_status_code():
            return http.client.HTTPException(f"a response that cannot be read: {error.__context__ or error}")
        return http.client.BadStatusLine(repr(bytes(data[:40])))

    def _complete(self, keep: bool) -> None:
        status = self._parser.get_status_code()
        self.response = Response(status=status, headers=self.headers, body=self._body, keep=keep)

    # -- callbacks of the parser -----------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.response is not None:  # a second response without a request
            raise ValueError("more than one response")
        self.headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # otherwise a trailer
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        if self.headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise ValueError(f"Transfer-Encoding: {self.headers['transfer-encoding']}")
        self._in_body = self._parser.get_status_code() >= 200
        self.missing = int(self.headers.get("content-length", 0))

    def on_body(self, data: bytes) -> None:
        if not self._body:
            self._body = data  # usually the only piece: no copy
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += data
        self.missing -= len(data)

    def on_message_complete(self) -> None:
        if self._in_body:
            self._complete(keep=self._parser.should_keep_alive())


async def read_response(receive: Receive, limit: int) -> Response:
    """Reads the response to a GET or a POST: a body of at most `limit` bytes, its framing included."""
    try:
        data = await receive(0)
    except ConnectionError as error:
        raise http.client.RemoteDisconnected(f"no answer: {error}") from None
    if not data:
        raise http.client.RemoteDisconnected("closed without an answer")
    reader = _Reader(limit)
    try:
        reader.feed(data)
        while reader.response is None:
            data = await receive(max(0, reader.missing))
            if data:
                reader.feed(data)
            else:
                reader.end()
        return reader.response
    finally:
        reader.close()
