"""Models fetched from a real server: checked before they are unpacked, and unpacked only into the folder."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import socket
import ssl
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepseek.spec import GateFailed, InputError
from serving.repository.archive import pack
from serving.repository.fetch import fetch
from serving.stack.certificate import ensure_certificate
from tests.add_one import write_add_one
from tests.conftest import RunHere
from tests.failing_servers import accepting
from tests.fake_kserve import http_answer


class Store:
    """Answers each path with the bytes in `answers`, or with what makes them; keeps each path and its authorization."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Callable[[socket.socket], bytes]] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.address = ""
        self.tls: ssl.SSLContext | None = None

    def url(self, path: str) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}{path}"

    def speak_tls(self, folder: Path) -> None:
        ensure_certificate(folder, [])
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(folder / "tls.crt", folder / "tls.key")

    def serve(self, connection: socket.socket) -> None:
        with self.tls.wrap_socket(connection, server_side=True) if self.tls else connection as stream:
            head = stream.recv(65536).decode()
            given = re.search(r"\r\nAuthorization: (.*)\r\n", head)
            self.seen.append((head.split()[1], given[1] if given else None))
            answer = self.answers[head.split()[1]]
            stream.sendall(answer if isinstance(answer, bytes) else answer(stream))


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    with accepting(made.serve) as made.address:
        yield made


@pytest.fixture
def archive(tmp_path: Path) -> tuple[bytes, str]:
    """A packed repository, and its sha256."""
    write_add_one(tmp_path / "repository")
    sha256, _ = pack(tmp_path / "repository", tmp_path / "models.tar.gz")
    return (tmp_path / "models.tar.gz").read_bytes(), sha256


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def test_a_packed_repository_arrives_unchanged(store: Store, archive: tuple[bytes, str], into: Path) -> None:
    store.answers["/m.tar.gz"] = http_answer(archive[0])
    found = fetch(store.url("/m.tar.gz"), archive[1], into, "Bearer x")
    assert found == {"size_bytes": len(archive[0]), "models": ["add_one"]}
    source = into.parent / "repository"
    names = sorted(path.relative_to(source) for path in source.rglob("*"))
    assert sorted(path.relative_to(into) for path in into.rglob("*")) == names
    assert (into / "add_one/1/model.py").read_bytes() == (source / "add_one/1/model.py").read_bytes()
    assert store.seen == [("/m.tar.gz", "Bearer x")]


def test_over_https_the_stores_certificate_must_be_trusted(
    store: Store, archive: tuple[bytes, str], into: Path, tmp_path: Path, run_here: RunHere
) -> None:
    store.speak_tls(tmp_path)
    store.answers["/m.tar.gz"] = http_answer(archive[0])
    arguments = ("--url", store.url("/m.tar.gz"), "--sha256", archive[1], "--into", str(into))
    stranger = run_here("fetch", *arguments)
    assert (stranger.returncode, stranger.stderr.count("\n")) == (1, 1)
    assert "CERTIFICATE_VERIFY_FAILED" in stranger.stderr
    assert store.seen == []
    run = run_here("fetch", *arguments, SSL_CERT_FILE=str(tmp_path / "ca.crt"))
    assert run.returncode == 0, run.stderr
    assert (into / "add_one" / "config.pbtxt").is_file()


def test_the_same_files_pack_into_the_same_bytes(archive: tuple[bytes, str], tmp_path: Path) -> None:
    config = tmp_path / "repository" / "add_one" / "config.pbtxt"
    (config.parent / "1" / "__pycache__").mkdir()
    (config.parent / ".part").write_text("half")
    config.touch()
    assert pack(tmp_path / "repository", tmp_path / "again.tar.gz")[0] == archive[1]
    config.write_text(config.read_text() + "\n")
    assert pack(tmp_path / "repository", tmp_path / "again.tar.gz")[0] != archive[1]


def test_an_archive_with_another_checksum_is_not_unpacked(store: Store, archive: tuple[bytes, str], into: Path) -> None:
    store.answers["/m.tar.gz"] = http_answer(archive[0] + b"x")
    with pytest.raises(GateFailed, match="nothing was unpacked"):
        fetch(store.url("/m.tar.gz"), archive[1], into)
    assert list(into.iterdir()) == []


@pytest.mark.parametrize("damages_tls", [False, True], ids=["it ends early", "a damaged TLS record"])
def test_a_connection_that_breaks_is_tried_again(
    store: Store, archive: tuple[bytes, str], into: Path, damages_tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damages_tls:
        store.speak_tls(into.parent)
        monkeypatch.setenv("SSL_CERT_FILE", str(into.parent / "ca.crt"))

    def broken_then_whole(stream: socket.socket) -> bytes:
        whole = http_answer(archive[0])
        if len(store.seen) == 1:
            stream.sendall(whole[:200])
            if damages_tls:
                os.write(stream.fileno(), b"no TLS record")
            return b""
        return whole

    store.answers["/m.tar.gz"] = broken_then_whole
    assert fetch(store.url("/m.tar.gz"), archive[1].upper(), into)["models"] == ["add_one"]
    assert len(store.seen) == 2


def test_a_full_disk_is_not_the_stores_fault(
    store: Store, archive: tuple[bytes, str], into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    store.answers["/m.tar.gz"] = http_answer(archive[0])
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    with pytest.raises(OSError, match="No space left on device"):
        fetch(store.url("/m.tar.gz"), archive[1], into)
    assert len(store.seen) == 1


def test_a_missing_archive_fails_at_once_and_a_broken_store_is_retried(store: Store, into: Path) -> None:
    store.answers["/gone?signature=x"] = http_answer(b"", status="404 Not Found")
    with pytest.raises(GateFailed, match="404") as error:
        fetch(store.url("/gone?signature=x"), "0" * 64, into)
    assert "signature" not in str(error.value)
    assert len(store.seen) == 1
    store.answers["/broken"] = http_answer(b"", status="503 Busy")
    with pytest.raises(GateFailed, match="503"):
        fetch(store.url("/broken"), "0" * 64, into, retry_s=0.5)
    assert len(store.seen) == 3


def test_the_authorization_goes_to_the_url_and_not_to_where_it_redirects(
    store: Store, archive: tuple[bytes, str], into: Path
) -> None:
    store.answers["/m.tar.gz"] = http_answer(b"", f"Location: {store.url('/elsewhere')}", status="302 Found")
    store.answers["/elsewhere"] = http_answer(archive[0])
    fetch(store.url("/m.tar.gz"), archive[1], into, "Bearer x")
    assert store.seen == [("/m.tar.gz", "Bearer x"), ("/elsewhere", None)]


def packed(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    """An archive with one member; links point to /etc."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (packed("../outside"), "archive: '../outside' would be extracted to "),
        (packed("a/../../outside"), "archive: 'a/../../outside' would be extracted to "),
        (packed("add_one", tarfile.SYMTYPE), "archive: 'add_one' is neither a file nor a folder"),
        (packed("add_one", tarfile.LNKTYPE), "archive: 'add_one' is neither a file nor a folder"),
        (packed("add_one", tarfile.FIFOTYPE), "archive: 'add_one' is neither a file nor a folder"),
        (b"hello", "archive: cannot be read as .tar.gz"),
    ],
    ids=["up", "through", "symlink", "link", "fifo", "no archive"],
)
def test_members_outside_the_folder_links_devices_and_other_files_are_refused(
    store: Store, into: Path, content: bytes, said: str
) -> None:
    store.answers["/m"] = http_answer(content)
    with pytest.raises(GateFailed, match=re.escape(said)):
        fetch(store.url("/m"), hashlib.sha256(content).hexdigest(), into)
    assert not (into.parent / "outside").exists()


@pytest.mark.parametrize(
    ("url", "sha256", "message"),
    [
        ("s3://b/m", "0" * 64, "must begin with https://"),
        ("https://me:secret@h/m", "0" * 64, "^URL: seen a user name before @; put it into the Secret models-access"),
        ("http://h/m", "12", "64 hexadecimal digits"),
    ],
)
def test_wrong_input_is_one_line(into: Path, url: str, sha256: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fetch(url, sha256, into)
