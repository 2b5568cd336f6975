"""API keys and the certificate: keys are printed once, stored as a hash, revoked at once; bad input is one line."""

from __future__ import annotations

import errno
import json
import os
import re
import ssl
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

import pytest
from cryptography import x509

from cli.main import values_of
from deepseek.spec import InputError
from serving.stack import api_keys, certificate
from serving.stack.api_keys import digest, keys_in, new_key, revoke
from serving.stack.certificate import ensure_certificate, owner
from serving.stack.gateway_folder import ensure_folder
from tests.conftest import run_module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ensure_folder(tmp_path / "gateway", [])
    return tmp_path / "gateway"


def test_a_key_is_printed_alone_and_stored_as_a_hash_for_the_stacks_user_alone(tmp_path: Path) -> None:
    run = run_module("cli", "keys", "--name", "shop", DEEPSEEK_BUILD=str(tmp_path))
    key = run.stdout.strip()
    assert re.fullmatch(r"dsk_\S{43}", key)
    assert all(key.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    folder = tmp_path / "gateway"
    (entry,) = (folder / "keys").glob("*.json")
    assert entry.stem == digest(key)
    assert json.loads(entry.read_text())["name"] == "shop"
    for path in (folder / "tls.key", entry):
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert (found.st_uid, found.st_gid) == owner(folder)
    assert 0 not in owner(folder)
    assert not (folder / "ca.key").exists()  # the folder is mounted in the gateway


def test_a_file_that_gets_the_key_is_for_its_user_alone(folder: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "cli", "keys", "--name", "shop", "--folder", str(folder))
    with (tmp_path / "key").open("w") as file:
        subprocess.run(command, check=True, stdout=file)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert (folder / "keys" / f"{digest((tmp_path / 'key').read_text().strip())}.json").is_file()


def test_revoke_ends_all_keys_of_a_name_or_one_by_its_id(folder: Path) -> None:
    keys = [new_key(folder, name) for name in ("shop", "shop", "till")]
    assert [key.name for key in revoke(folder, digest(keys[0])[:8])] == ["shop"]
    assert [key.id for key in keys_in(folder)] == [digest(key)[:8] for key in keys[1:]]
    revoke(folder, "shop")
    assert [key.name for key in keys_in(folder)] == ["till"]


def test_keys_are_listed_as_valid_expired_or_bulk(folder: Path, tmp_path: Path) -> None:
    new_key(folder, "old", expires_s=1e-9)
    new_key(folder, "new", expires_s=60, rate_rps=5)
    new_key(folder, "nightly", bulk=True)
    lines = run_module("cli", "keys", DEEPSEEK_BUILD=str(tmp_path)).stdout.splitlines()
    rows = {line.split()[0]: line.split()[-1] for line in lines if line.strip()}
    assert (rows["old"], rows["new"], rows["nightly"]) == ("expired", "valid", "bulk")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--name", "a b"), "key name 'a b': use 1 to 64 letters, digits"),
        (("--revoke", "nobody"), "no key 'nobody' in"),
        (("--name", "a", "--revoke", "b"), "use one of them"),
        (("--bulk",), "--bulk: seen without --name; name the caller of the new key"),
        (("--rate-rps", "50"), "--rate-rps: seen without --name"),
        (("--revoke", "a", "--expires-days", "9"), "--expires-days: seen without --name"),
        (("--name", "shop", "--host", "bü.example"), "is not a host name or address"),
        (("--name", "shop", "--host", "https://api.example.com"), "is not a host name or address"),
        (("--name", "shop", "--host", "api.example.com:8443"), "is not a host name or address"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        api_keys.main(values_of("keys", "--folder", str(tmp_path / "gateway"), *arguments))


def test_the_certificate_is_signed_by_the_authority_for_the_hosts_asked_for(folder: Path) -> None:
    assert ensure_certificate(folder, ["api.example.com", "192.0.2.7"])
    leaf(folder).verify_directly_issued_by(x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()))
    names = leaf(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "gateway", "api.example.com"} <= set(names.get_values_for_type(x509.DNSName))
    assert not ensure_certificate(folder, ["192.0.2.7"])  # the certificate has it
    assert ensure_certificate(folder, ["b.example.com"])
    assert not ensure_certificate(folder, ["api.example.com", "b.example.com"])  # names accumulate


def test_a_certificate_about_to_end_is_renewed_by_the_same_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "VALID_DAYS", 29)
    ensure_certificate(tmp_path, ["api.example.com"])
    authority = (tmp_path / "ca.crt").read_bytes()
    monkeypatch.undo()
    assert ensure_certificate(tmp_path, [])
    assert not ensure_certificate(tmp_path, ["api.example.com"])  # it keeps its names
    assert leaf(tmp_path).not_valid_after_utc - datetime.now(UTC) > timedelta(days=390)
    assert (tmp_path / "ca.crt").read_bytes() == authority


def break_key(folder: Path, how: str) -> None:
    """Leaves no key, no PEM, or the key of another certificate."""
    (folder / "tls.key").unlink()
    if how == "no PEM":
        (folder / "tls.key").write_text("nothing")
    if how == "another":
        ensure_certificate(folder.parent / "other", [])
        (folder.parent / "other" / "tls.key").rename(folder / "tls.key")


@pytest.mark.parametrize(
    ("how", "said"),
    [("none", "cannot be read"), ("no PEM", "is not an unencrypted PEM key"), ("another", "is not the key of tls.crt")],
)
def test_a_certificate_without_its_key_is_renewed_unless_it_is_the_users_own(
    folder: Path, how: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    break_key(folder, how)
    assert ensure_certificate(folder, [])
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "tls.crt", folder / "tls.key")  # they are a pair
    (folder / "ca.crt").unlink()
    before = (folder / "tls.crt").read_bytes()
    ensure_folder(folder, ["api.example.com"])
    assert "tls.crt is your own certificate, which keeps its names" in capsys.readouterr().err
    break_key(folder, how)
    with pytest.raises(InputError, match=f"tls.key {said}.*; replace it, or remove tls.crt"):
        ensure_certificate(folder, [])
    assert (folder / "tls.crt").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gateway/tls.crt", "is not a PEM certificate; replace it, or remove it to get a new one"),
        ("gateway/ca.crt", "is not a PEM certificate; replace it, or remove it to get a new one"),
        ("gateway-authority/ca.key", "is not an unencrypted PEM key; put it back, or remove .*ca.crt and tls.crt"),
    ],
)
def test_a_damaged_file_is_one_line(folder: Path, name: str, said: str) -> None:
    (folder.parent / name).write_text("nothing")
    with pytest.raises(InputError, match=f"{name} {said}"):
        ensure_certificate(folder, ["api.example.com"])


def test_what_another_user_owns_is_not_reported_as_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError, match="keys"):  # main.py makes it a line
        keys_in(folder)
    reads = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path) if path.suffix == ".key" else reads(path))
    with pytest.raises(PermissionError, match="key"):
        ensure_certificate(folder, ["api.example.com"])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_what_root_puts_into_the_folder_belongs_to_its_owner(folder: Path) -> None:
    new_key(folder, "shop")
    os.chown(folder, 1234, 1235)
    for path in folder.rglob("*"):
        os.chown(path, 0, 0)
    (folder.parent / "linked").touch()
    (folder / "keys" / "linked.json").symlink_to(folder.parent / "linked")
    ensure_folder(folder, [])
    new_key(folder, "till")
    assert (folder.parent / "gateway-authority" / "ca.key").stat().st_uid == 0  # the stack cannot sign
    files = [path for path in folder.rglob("*") if path.name != "ca.crt"]  # everybody may read that
    assert {(each.lstat().st_uid, each.lstat().st_gid) for each in files} == {(1234, 1235)} == {owner(folder)}
    assert (folder.parent / "linked").stat().st_uid == 0


def test_an_authority_whose_key_is_missing_is_never_replaced(folder: Path) -> None:
    before = (folder / "ca.crt").read_bytes()
    (folder.parent / "gateway-authority" / "ca.key").unlink()
    assert not ensure_certificate(folder, [])  # the certificate is still good
    said = "ca.key cannot be read .*; put it back, or remove .*ca.crt and tls.crt: make keys then makes a new authority"
    with pytest.raises(InputError, match=said):
        ensure_certificate(folder, ["api.example.com"])
    assert (folder / "ca.crt").read_bytes() == before
    (folder / "ca.crt").unlink()
    (folder / "tls.crt").unlink()
    assert ensure_certificate(folder, [])


def leaf(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
