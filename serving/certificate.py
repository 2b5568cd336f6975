"""A certificate authority for trying, and the gateway's certificate signed by it.

Contract: `ensure_certificate` leaves `ca.crt`, `tls.crt` and `tls.key` in the gateway's folder. A certificate of
another authority that somebody put there stays as it is, and needs its key; what root put there is given to the stack's
user, who is the folder's owner. One of our own is renewed a month before it ends, or where its key is not there, by the
same authority, so that callers keep their `ca.crt`; that is never replaced. The authority's key lies beside the folder,
which alone is mounted in the gateway.
"""

from __future__ import annotations

import ipaddress
import os
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

# Containers are not run as root: where root made the folder, it is given to this user (docs/operate.md).
STAND_IN = 10001
SERVICE = "gateway"  # its name inside the stack
OURS = "deepseek-deploy "  # how the names of what is made here begin
VALID_DAYS = 397  # the most that browsers take
RENEW_DAYS = 30
AUTHORITY_DAYS = 3650


def owner(folder: Path) -> tuple[int, int]:
    """User and group of the stack over the gateway's folder: ours; where we are root, the folder's."""
    if os.getuid():
        return os.getuid(), os.getgid()
    found = folder.stat() if folder.is_dir() else None
    return (found.st_uid, found.st_gid) if found and found.st_uid else (STAND_IN, STAND_IN)


def write_private(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Writes a file beside its place and renames it; readable by its folder's owner alone from its first byte on."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    give(part, path.parent)
    part.replace(path)


def give(path: Path, folder: Path) -> None:
    """Hands a file or folder, not what a link leads to, over to the user of the stack over `folder`."""
    if os.getuid() == 0:
        os.chown(path, *owner(folder), follow_symlinks=False)


def ensure_certificate(folder: Path, hosts: list[str]) -> bool:
    """Makes what is missing, or ends within a month, or lacks one of `hosts`; whether anything was made.

    A certificate that is made anew keeps the names that it had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    give(folder, folder)
    for own in (folder / "tls.crt", folder / "tls.key"):
        if own.is_file():
            give(own, folder)
    if (folder / "tls.crt").is_file() and _still_good(folder, hosts):
        return False
    authority, key = _authority(folder)
    kept = _names(_read(folder / "tls.crt")[0]) if (folder / "tls.crt").is_file() else ()
    asked = ["localhost", SERVICE, "127.0.0.1", "::1", socket.gethostname(), *hosts]
    names = dict.fromkeys([*map(_name, asked), *kept])
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(f"{OURS}gateway", authority.subject, leaf_key, VALID_DAYS)
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


def is_signed_by(chain: Path, authorities: Path) -> bool:
    """Whether one of a file's certificates names one of the other file's as its issuer."""
    return not {link.issuer for link in _read(chain)}.isdisjoint(each.subject for each in _read(authorities))


def _read(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError:
        raise InputError(f"{path} is not a PEM certificate; put one there, or remove it for a new") from None


def name_of(folder: Path) -> str:
    """A name that the gateway's certificate is for: `gateway` where it can be."""
    leaf, *_ = _read(folder / "tls.crt")
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return SERVICE
    names = [name.replace("*", SERVICE, 1) for name in found.get_values_for_type(x509.DNSName)]
    return SERVICE if SERVICE in names or not names else names[0]


def _still_good(folder: Path, hosts: list[str]) -> bool:
    leaf, *_ = _read(folder / "tls.crt")
    flaw = _flaw_of_key(folder / "tls.key", leaf)
    authority = folder / "ca.crt"
    if not authority.is_file() or leaf.issuer != (ca := _read(authority)[0].subject) or not _is_ours(leaf, ca):
        if flaw:
            raise InputError(f"{folder / 'tls.key'} {flaw}; put it there, or remove tls.crt for a new certificate")
        return True  # somebody's own
    if flaw:
        return False
    left = leaf.not_valid_after_utc - datetime.now(UTC)
    return left > timedelta(days=RENEW_DAYS) and all(_name(host) in _names(leaf) for host in hosts)


def _is_ours(leaf: x509.Certificate, authority: x509.Name) -> bool:
    """Whether it was made here: that of somebody else may have come with its ca.crt."""
    return all(name.rfc4514_string().startswith(f"CN={OURS}") for name in (leaf.subject, authority))


def _names(leaf: x509.Certificate) -> x509.SubjectAlternativeName:
    """What a certificate of ours is for."""
    return leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _flaw_of_key(path: Path, certificate: x509.Certificate, name: str = "tls.crt") -> str:
    """What keeps the key at `path` from being that of the certificate in the file `name`; "" if nothing does."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (TypeError, ValueError, UnsupportedAlgorithm):  # TypeError: it asks for a password
        return "is not an unencrypted PEM key"
    return "" if key.public_key() == certificate.public_key() else f"is not the key of {name}"


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority, made where it is missing: never in place of one that callers may trust."""
    key_path = folder.with_name(f"{folder.name}-authority") / "ca.key"
    path = folder / "ca.crt"
    if path.is_file():
        authority, *_ = _read(path)
        if flaw := _flaw_of_key(key_path, authority, "ca.crt"):
            raise InputError(
                f"{key_path} {flaw}; put it back, or remove {path} and tls.crt for a new authority and hand it on"
            )
        key = load_pem_private_key(key_path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return authority, key
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{OURS}{os.urandom(4).hex()}")])
    builder = _builder(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value, subject, key, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = dict.fromkeys(
        ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"], False
    )
    usage |= {"key_cert_sign": True, "crl_sign": True, "encipher_only": False, "decipher_only": False}
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    certificate = builder.sign(key, SHA256())
    key_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key_path.unlink(missing_ok=True)
    with os.fdopen(os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(_pem(key))
    if os.getuid() == 0:  # it stays with whoever renews by it
        found = key_path.parent.stat()
        os.chown(key_path, found.st_uid, found.st_gid)
    write_private(path, certificate.public_bytes(Encoding.PEM), 0o644)
    return certificate, key


def _builder(
    name: str | bytes, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(serial_number=x509.random_serial_number(), public_key=key.public_key())
    builder = builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(name))])).issuer_name(issuer)
    builder = builder.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise InputError(f"host {host!r} cannot stand in a certificate; name a host or an address") from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
