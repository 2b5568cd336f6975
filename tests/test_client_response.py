"""HTTP/1.1 responses of all kinds, whole and in pieces, compared with the standard library's parser."""

from __future__ import annotations

import http.client
import io

import pytest
from deepseek_client.concurrency import run
from deepseek_client.http.response import Response, read_response

BODY = '{"outputs": []}'
ANSWERS = [
    pytest.param(f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}", True, id="length"),
    pytest.param(f"HTTP/1.1 200 OK\r\ncontent-LENGTH:{len(BODY)}\r\nConnection: close\r\n\r\n{BODY}", False, id="close"),
    pytest.param("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\n", True, id="chunks"),
    pytest.param("HTTP/1.1 204 No Content\r\n\r\n", True, id="no content"),
    pytest.param(f"HTTP/1.0 200 OK\r\n\r\n{BODY}", False, id="to the end"),
    pytest.param("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n", True, id="continue"),
    pytest.param("HTTP/1.1 429\r\nContent-Length: 0\r\n\r\n", True, id="no reason"),
    pytest.param("HTTP/1.1 200 OK\r\nRetry-After: 1\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n", True, id="twice"),
]  # fmt: skip


def read(data: bytes, piece: int) -> Response:
    pieces = iter([data[start : start + piece] for start in range(0, len(data), piece)])

    async def receive(wanted: int) -> bytes:
        return next(pieces, b"")

    return run(read_response(receive, 1 << 20))


@pytest.mark.parametrize("piece", [1, 7, 10_000])
@pytest.mark.parametrize(("text", "keep"), ANSWERS)
def test_responses_parse_as_in_the_standard_library(text: str, keep: bool, piece: int) -> None:
    class Stream:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(text.encode())

    theirs = http.client.HTTPResponse(Stream(), method="POST")  # type: ignore[arg-type]
    theirs.begin()
    ours = read(text.encode(), piece)
    assert (ours.status, ours.body, ours.keep) == (theirs.status, theirs.read(), keep)
    assert ours.headers.get("retry-after") == theirs.getheader("Retry-After")


@pytest.mark.parametrize("piece", [1, 100, 100_000])
@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("", http.client.RemoteDisconnected, id="nothing"),
        pytest.param("HTTP/1.1 200 OK\r\nContent-Le", http.client.IncompleteRead, id="half a head"),
        pytest.param("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", http.client.IncompleteRead, id="half a body"),
        pytest.param("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", http.client.IncompleteRead, id="half of the chunks"),
        pytest.param("HTTP/2 200\r\n\r\n", http.client.BadStatusLine, id="another version"),
        pytest.param("SSH-2.0-OpenSSH\r\n", http.client.BadStatusLine, id="no HTTP"),
        pytest.param("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", http.client.HTTPException, id="two lengths"),
        pytest.param("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc", http.client.HTTPException, id="encoding"),
        pytest.param("HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", http.client.HTTPException, id="upgrade"),
        pytest.param("HTTP/1.1 200 OK\r\nA: " + 70_000 * "b", http.client.LineTooLong, id="endless head"),
        pytest.param(5000 * "HTTP/1.1 100 Continue\r\n\r\n", http.client.LineTooLong, id="endless continue"),
    ],
)  # fmt: skip
def test_malformed_responses_are_errors(text: str, error: type[Exception], piece: int) -> None:
    with pytest.raises(error):
        read(text.encode(), piece)


@pytest.mark.parametrize("beyond", [b"x", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["stray", "a second one"])
@pytest.mark.parametrize("connection", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
def test_bytes_after_a_response_close_the_connection(beyond: bytes, connection: bytes) -> None:
    response = read(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n" + connection + b"\r\nabc" + beyond, 10_000)
    assert (response.status, response.body, response.keep) == (200, b"abc", False)
