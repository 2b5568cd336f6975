"""Reads one HTTP/1.1 answer from a stream, blocking or not.

Contract: `read_answer(receive)` takes what it needs and nothing of a second answer; bytes beyond the first make the
connection useless (`keep` is false). Raises http.client's exceptions: BadStatusLine where this is no HTTP,
RemoteDisconnected where the stream ends or breaks before the first byte, IncompleteRead where it ends in the middle.

The standard library's parser wants a file that blocks, so that asyncio cannot use it; the tests compare the two.
"""

import functools
import http.client
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

LONGEST_HEAD_BYTES = 65536
MOST_HEADS = 32  # whose meaning is kept
Receive = Callable[[int], Awaitable[bytes | bytearray]]
"""Some bytes, of as many as are wanted (0: not known); none at the end of the stream."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Status, headers (names in lower case) and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray
    keep: bool
    """Whether the connection may be used again."""


class _Reader:
    """What has been received and not yet used."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.buffer = bytearray()

    async def more(self, wanted: int = 0) -> None:
        """Raises IncompleteRead at the end of the stream."""
        data = await self._receive(wanted)
        if not data:
            raise http.client.IncompleteRead(bytes(self.buffer))
        self.buffer += data

    async def until(self, mark: bytes) -> bytes:
        """All before `mark`, which is dropped."""
        start = 0
        while (end := self.buffer.find(mark, start)) < 0:
            if len(self.buffer) > LONGEST_HEAD_BYTES:
                raise http.client.LineTooLong("head of the answer")
            start = max(0, len(self.buffer) - len(mark) + 1)
            await self.more()
        found = bytes(self.buffer[:end])
        del self.buffer[: end + len(mark)]
        return found

    async def exactly(self, size: int) -> bytes | bytearray:
        """The next `size` bytes."""
        while len(self.buffer) < size:
            missing = size - len(self.buffer)
            try:
                await self.more(missing)
            except http.client.IncompleteRead as error:
                raise http.client.IncompleteRead(error.partial, missing) from None
        if len(self.buffer) == size:  # nearly always: no copy
            found, self.buffer = self.buffer, bytearray()
            return found
        found = self.buffer[:size]
        del self.buffer[:size]
        return found


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What stands before a body."""

    status: int
    headers: Mapping[str, str]
    size: int | None
    """Of the body; None: in chunks, or to the end of the stream."""
    chunked: bool
    keep: bool
    """Whether the connection may be used after the body, if that tells its own end."""


async def read_answer(receive: Receive) -> Answer:
    """The answer to a GET or a POST."""
    reader = _Reader(receive)
    head = await _head(reader)
    while head.status < 200:  # "continue" and its like come before the answer
        head = await _head(reader)
    keep = head.keep
    body: bytes | bytearray
    if head.size is not None:
        body = await reader.exactly(head.size)
    elif head.chunked:
        body = await _chunks(reader)
    else:
        body, keep = await _to_the_end(reader), False
    return Answer(status=head.status, headers=head.headers, body=body, keep=keep and not reader.buffer)


async def _head(reader: _Reader) -> _Head:
    try:
        while len(reader.buffer) < 5:
            await reader.more()
    except http.client.IncompleteRead as error:
        if not error.partial:
            raise http.client.RemoteDisconnected("closed without an answer") from None
        raise
    except ConnectionError as error:
        if not reader.buffer:
            raise http.client.RemoteDisconnected(f"no answer: {error}") from None
        raise
    if not reader.buffer.startswith(b"HTTP/"):
        raise http.client.BadStatusLine(repr(bytes(reader.buffer[:40])))
    return _parsed(await reader.until(b"\r\n\r\n"))


@functools.lru_cache(MOST_HEADS)  # a server's answers to one request are headed alike
def _parsed(head: bytes) -> _Head:
    first, *lines = head.split(b"\r\n")
    match = re.match(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: |$)", first)
    if match is None:
        raise http.client.BadStatusLine(repr(first[:40]))
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or name != name.strip():  # a folded line, too: nobody may send one any more
            raise http.client.HTTPException(f"a header that cannot be read: {line[:40]!r}")
        name = name.lower()
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    status = int(match[2])
    size, chunked = _body_framing(status, headers)
    tokens = {token.strip() for token in headers.get("connection", "").lower().split(",")}
    keep = "close" not in tokens and (match[1] == b"1" or "keep-alive" in tokens)
    confused = chunked and "content-length" in headers  # somebody between us is
    return _Head(status=status, headers=headers, size=size, chunked=chunked, keep=keep and not confused)


def _body_framing(status: int, headers: Mapping[str, str]) -> tuple[int | None, bool]:
    """The size, where it is told, and whether it comes in chunks."""
    if status < 200 or status in (204, 304):
        return 0, False
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"].lower() != "chunked":
            raise http.client.UnknownTransferEncoding(headers["transfer-encoding"])
        return None, True
    if "content-length" in headers:
        sizes = {size.strip() for size in headers["content-length"].split(",")}
        size = sizes.pop()
        if sizes or not re.fullmatch(r"[0-9]{1,18}", size):
            raise http.client.HTTPException(f"Content-Length: {headers['content-length']}")
        return int(size), False
    return None, False


async def _to_the_end(reader: _Reader) -> bytearray:
    while True:
        try:
            await reader.more()
        except http.client.IncompleteRead:
            body, reader.buffer = reader.buffer, bytearray()
            return body


async def _chunks(reader: _Reader) -> bytearray:
    body = bytearray()
    while True:
        line = (await reader.until(b"\r\n")).partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", line):
            raise http.client.HTTPException(f"a chunk of the size {line[:20]!r}")
        size = int(line, 16)
        if size == 0:
            break
        body += await reader.exactly(size)
        if await reader.exactly(2) != b"\r\n":
            raise http.client.HTTPException("a chunk longer than its size")
    while await reader.until(b"\r\n"):  # trailers
        pass
    return body
