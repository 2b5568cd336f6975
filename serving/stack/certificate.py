"""A certificate authority for trying, and the gateway's certificate signed by it.

Contract: `ensure_certificate` leaves `ca.crt`, `tls.crt` and `tls.key` in the gateway's folder. A user's certificate
from another authority stays unchanged, and needs its key. Our own is renewed a month before it expires, or if its key
is missing, by the same authority, so that callers keep their `ca.crt`; the authority is never replaced. Files that root
put there are given to the stack's user, who owns the folder. The authority's key lies beside the folder; only the
folder is mounted in the gateway.
"""

import ipaddress
import os
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deepseek.spec import InputError

# Containers do not run as root: if root made the folder, this user gets it (docs/operate.md).
STAND_IN = 10001
SERVICE = "gateway"  # its name inside the stack
OURS = "deepseek-deploy "  # prefix of the common names made here
VALID_DAYS = 397  # the most that browsers accept
RENEW_DAYS = 30
AUTHORITY_DAYS = 3650


def owner(folder: Path) -> tuple[int, int]:
    """User and group of the stack: ours, or, if we are root, the owner of the gateway's folder."""
    if os.getuid():
        return os.getuid(), os.getgid()
    found = folder.stat() if folder.is_dir() else None
    return (found.st_uid, found.st_gid) if found and found.st_uid else (STAND_IN, STAND_IN)


def write_private(path: Path, content: bytes, mode: int = 0o600, *, to_stack: bool = True) -> None:
    """Writes a file under another name and renames it; only the stack's user, or this one, can ever read it."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    if to_stack:
        give(part, path.parent)
    part.replace(path)


def give(path: Path, folder: Path) -> None:
    """Gives a file, folder or link (not its target) to the stack's user."""
    if os.getuid() == 0:
        os.chown(path, *owner(folder), follow_symlinks=False)


def ensure_certificate(folder: Path, hosts: list[str]) -> bool:
    """Makes a certificate if it is missing, expires within a month or lacks one of `hosts`; True if it made one.

    A renewed certificate keeps its names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    give(folder, folder)
    for own in (folder / "tls.crt", folder / "tls.key"):
        if own.is_file():
            give(own, folder)
    if (folder / "tls.crt").is_file() and _still_good(folder, hosts):
        return False
    authority, key = _authority(folder)
    kept = _names(_read(folder / "tls.crt")) if (folder / "tls.crt").is_file() else ()
    asked = ["localhost", SERVICE, "127.0.0.1", "::1", socket.gethostname(), *hosts]
    names = dict.fromkeys([*map(_name, asked), *kept])
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_subject(f"{OURS}gateway"), authority.subject, leaf_key, VALID_DAYS)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    certificate = builder.sign(key, SHA256())
    write_private(folder / "tls.key", _pem(leaf_key))
    write_private(folder / "tls.crt", certificate.public_bytes(Encoding.PEM), 0o644)
    return True


def _read(path: Path) -> x509.Certificate:
    """The first certificate of a chain."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except ValueError:
        raise InputError(f"{path} is not a PEM certificate; replace it, or remove it to get a new one") from None


def name_of(folder: Path) -> str:
    """A name in the gateway's certificate: `gateway`, if it is one."""
    try:
        found = _read(folder / "tls.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return SERVICE
    names = [name.replace("*", SERVICE, 1) for name in found.get_values_for_type(x509.DNSName)]
    return SERVICE if SERVICE in names or not names else names[0]


def is_made_here(folder: Path) -> bool:
    """Whether the authority for trying signed the certificate; if not, it is the user's own."""
    authority = folder / "ca.crt"
    return authority.is_file() and _read(folder / "tls.crt").issuer == _read(authority).subject


def _still_good(folder: Path, hosts: list[str]) -> bool:
    leaf = _read(folder / "tls.crt")
    flaw = _flaw_of_key(folder / "tls.key", leaf)
    if not is_made_here(folder):
        if flaw:
            raise InputError(f"{folder / 'tls.key'} {flaw}; replace it, or remove tls.crt to get a new one")
        return True
    if flaw:
        return False
    left = leaf.not_valid_after_utc - datetime.now(UTC)
    return left > timedelta(days=RENEW_DAYS) and all(_name(host) in _names(leaf) for host in hosts)


def _names(leaf: x509.Certificate) -> x509.SubjectAlternativeName:
    return leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _flaw_of_key(path: Path, certificate: x509.Certificate, name: str = "tls.crt") -> str:
    """Why the key at `path` does not fit the certificate in the file `name`; "" if it fits."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except PermissionError:
        raise  # nothing is wrong with the key: another user owns it
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (TypeError, ValueError, UnsupportedAlgorithm):  # TypeError: it asks for a password
        return "is not an unencrypted PEM key"
    return "" if key.public_key() == certificate.public_key() else f"is not the key of {name}"


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority; made if missing, never replaced, since callers may trust it."""
    key_path = folder.with_name(f"{folder.name}-authority") / "ca.key"
    path = folder / "ca.crt"
    if path.is_file():
        authority = _read(path)
        if flaw := _flaw_of_key(key_path, authority, "ca.crt"):
            raise InputError(
                f"{key_path} {flaw}; put it back, or remove {path} and tls.crt: make keys then makes a new authority, "
                "and callers need its ca.crt"
            )
        key = load_pem_private_key(key_path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return authority, key
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(f"{OURS}{os.urandom(4).hex()}")
    builder = _builder(subject, subject, key, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = dict.fromkeys(
        ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"], False
    )
    usage |= {"key_cert_sign": True, "crl_sign": True, "encipher_only": False, "decipher_only": False}
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    certificate = builder.sign(key, SHA256())
    key_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(key_path, _pem(key), to_stack=False)  # the gateway must not be able to sign
    write_private(path, certificate.public_bytes(Encoding.PEM), 0o644)
    return certificate, key


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host):
        return x509.DNSName(host)
    raise InputError(f"host {host!r} is not a host name or address, which a certificate needs, such as api.example.com")


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
