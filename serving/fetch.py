"""Fetches a model repository as one archive, checks it, and unpacks it where Triton is to read it.

Contract: for an init container. The archive (`.tar.gz`, as `serving.kubernetes` packs it) is at an http or https URL,
such as that of an object store; nothing is unpacked before its sha256 is the one that was expected. Members that would
land outside the folder, links and devices are refused. $MODELS_AUTHORIZATION is sent as the header Authorization where
it is set, and only to the URL itself: not to where that redirects. Over https the server's certificate must be of an
authority of the system, or in $SSL_CERT_FILE. A connection that fails is tried again for a minute.

Exit codes: 0 unpacked; 1 not the archive that was expected, or unreachable; 2 wrong input.

Examples:
    python -m serving.fetch --url https://models.example.com/models.tar.gz --sha256 3f2a… --into /models
    MODELS_URL=https://… MODELS_SHA256=3f2a… python -m serving.fetch --into /models
"""

from __future__ import annotations

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
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any

from deepseek.spec import GateFailed, InputError, Parser, run_command

BLOCK_BYTES = 2**20
TIMEOUT_S = 30  # without a byte
RETRY_S = 60


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https alone, without the header that was meant for the first server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.remove_header("Authorization")
        return new


def fetch(url: str, sha256: str, into: Path, authorization: str = "", retry_s: float = RETRY_S) -> dict[str, Any]:
    """Unpacks the archive at `url` into a folder; returns its size and the names of the models."""
    if not re.fullmatch(r"https?://[^/\s]+/\S*", url):
        raise InputError(f"URL {url!r}: it must begin with https:// or http:// and name a file")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InputError(f"sha256 {sha256!r}: it must be 64 hexadecimal digits; sha256sum models.tar.gz prints them")
    if not into.is_dir():
        raise InputError(f"{into}: no such folder")
    with tempfile.TemporaryFile(dir=into) as archive:
        found = _download(url, authorization, archive, time.monotonic() + retry_s)
        if found != sha256:
            raise GateFailed(f"{_shown(url)}: sha256 {found}, expected {sha256}; nothing was unpacked")
        size_bytes = archive.tell()
        archive.seek(0)
        _unpack(archive, into)
    return {"size_bytes": size_bytes, "models": sorted(path.parent.name for path in into.glob("*/config.pbtxt"))}


def _download(url: str, authorization: str, archive: IO[bytes], deadline: float) -> str:
    """Writes what is at the URL; its sha256."""
    request = urllib.request.Request(url, headers={"Authorization": authorization} if authorization else {})
    opener = urllib.request.build_opener(_Redirects)
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
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            # A certificate that is not trusted: no later try will trust it.
            final = isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError)
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                final = error.code < 500 and error.code != 429
            if final or time.monotonic() > deadline:
                raise GateFailed(f"{_shown(url)}: {error or type(error).__name__}") from None
            time.sleep(1)


def _shown(url: str) -> str:
    """Without its query, which may be a signature that lets anyone in."""
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


def main() -> None:
    """Fetches, checks, unpacks."""
    parser = Parser(__doc__, prog="python -m serving.fetch")
    parser.add_argument("--url", default=os.environ.get("MODELS_URL", ""), help="of the archive (default: $MODELS_URL)")
    parser.add_argument("--sha256", default=os.environ.get("MODELS_SHA256", ""), help="(default: $MODELS_SHA256)")
    parser.add_argument("--into", type=Path, required=True, help="folder that becomes the model repository")
    parser.add_argument("--json", action="store_true", help="print what was fetched as JSON")
    args = parser.parse_args()
    found = fetch(args.url, args.sha256, args.into, os.environ.get("MODELS_AUTHORIZATION", ""))
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"fetched   {', '.join(found['models'])}, {found['size_bytes'] / 2**20:.1f} MiB, into {args.into}")


if __name__ == "__main__":
    run_command(main)
