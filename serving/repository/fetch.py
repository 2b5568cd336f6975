"""Downloads a model repository as one archive, checks it, and unpacks it for Triton.

Contract: for an init container. The archive (`.tar.gz`, as `deepseek kubernetes` packs it) is at an http or https URL,
such as an object store's. Nothing is unpacked unless its sha256 is the expected one. Links, devices and members that
would land outside the folder are refused. If $DEEPSEEK_MODELS_AUTHORIZATION is set, it is sent as the header
Authorization to the URL itself, but not to redirects. Over https the server's certificate must be signed by an
authority of the system or of $SSL_CERT_FILE. Failed connections are retried for a minute.

Exit codes: 0 unpacked, 1 wrong archive or unreachable, 2 bad input.
"""

import argparse
import errno
import hashlib
import json
import os
import re
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from deepseek.spec import GateFailed, InputError

BLOCK_BYTES = 2**20
TIMEOUT_S = 30  # without a byte
RETRY_S = 60


def fetch(url: str, sha256: str, into: Path, authorization: str = "", retry_s: float = RETRY_S) -> dict[str, Any]:
    """Unpacks the archive at `url` into a folder; returns its size in bytes and the names of the models.

    Raises InputError for bad arguments, GateFailed for a wrong archive or a server that stays unreachable.
    """
    check_url("URL", url)
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise InputError(f"sha256 {sha256!r}: it must be 64 hexadecimal digits; sha256sum models.tar.gz prints them")
    if not into.is_dir():
        raise InputError(f"{into}: no such folder")
    with tempfile.TemporaryFile(dir=into) as archive:
        found = _download(url, authorization, archive, time.monotonic() + retry_s)
        if found != sha256.lower():
            raise GateFailed(f"{_shown(url)}: sha256 {found}, expected {sha256}; nothing was unpacked")
        size_bytes = archive.tell()
        archive.seek(0)
        _unpack(archive, into)
    return {"size_bytes": size_bytes, "models": sorted(path.parent.name for path in into.glob("*/config.pbtxt"))}


def check_url(option: str, url: str) -> None:
    """Raises InputError unless it is the URL of a file, without a password: that would stand in manifests and logs."""
    if re.match(r"[^/]*//[^/?#]*@", url):
        raise InputError(
            f"{option}: seen a user name before @; put it into the Secret models-access, "
            "which is sent as the header Authorization (DEEPSEEK_MODELS_AUTHORIZATION)"
        )
    if not re.fullmatch(r"https?://[^/\s\"]+/[^\s\"]*", url):
        raise InputError(f"{option} {url!r}: it must begin with https:// or http:// and name a file")


def _download(url: str, authorization: str, archive: IO[bytes], deadline: float) -> str:
    request = urllib.request.Request(url)
    if authorization:
        request.add_unredirected_header("Authorization", authorization)
    opener = urllib.request.build_opener()
    while True:
        try:
            archive.seek(0)
            archive.truncate()
            digest = hashlib.sha256()
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                while block := answer.read(BLOCK_BYTES):
                    digest.update(block)
                    archive.write(block)
                if archive.tell() < int(answer.headers.get("Content-Length", 0)):
                    raise ConnectionError("the connection ended early")
            return digest.hexdigest()
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # of `archive`
                raise
            # An untrusted certificate: retrying does not help.
            final = isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError)
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                final = error.code < 500 and error.code != 429
            if final or time.monotonic() > deadline:
                raise GateFailed(f"{_shown(url)}: {error or type(error).__name__}") from None
            time.sleep(1)


def _shown(url: str) -> str:
    """The URL without its query, which may be a signature that grants access."""
    return url.partition("?")[0]


def _unpack(archive: IO[bytes], into: Path) -> None:
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            members = tar.getmembers()
            for member in members:
                if not (member.isfile() or member.isdir()):
                    raise GateFailed(f"archive: {member.name!r} is neither a file nor a folder")
            tar.extractall(into, members, filter="data")
    except tarfile.FilterError as error:
        raise GateFailed(f"archive: {error}") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise GateFailed(f"archive: cannot be read as .tar.gz ({error})") from None


def main(options: argparse.Namespace) -> None:
    found = fetch(options.url, options.sha256, options.into, os.environ.get("DEEPSEEK_MODELS_AUTHORIZATION", ""))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"fetched   {', '.join(found['models'])}, {found['size_bytes'] / 2**20:.1f} MiB, into {options.into}")
