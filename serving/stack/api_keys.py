"""The command `keys`: API keys of the gateway as files, made, listed and revoked while it runs.

Contract: a key is `dsk_` and 256 random bits and is not stored. `<folder>/keys/<sha256 of the key>.json` keeps its
name, an optional expiry and rate, and whether it is for bulk requests. The gateway looks there at each request, so
changes take effect at once. SHA-256 without salt or stretching is enough: those protect passwords that people choose,
not 256 random bits. The first use also creates a certificate authority for trying and a certificate
(`serving.stack.certificate`).
"""

import argparse
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import InputError
from deepseek.spec.files.folders import alone_in
from serving.stack.certificate import write_private
from serving.stack.gateway_folder import ensure_folder, gateway_folder

PREFIX = "dsk_"  # secret scanners can search for it
ID_DIGITS = 8
DAY_S = 86_400
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A stored key entry; times in seconds since 1970."""

    id: str
    name: str
    created: float
    expires: float | None
    rate_rps: float | None
    """Requests/s; None: the stack's default."""
    bulk: bool = False
    """Whether its requests wait behind those of other keys."""

    @property
    def state(self) -> str:
        return "expired" if self.expires is not None and self.expires <= time.time() else "valid"


def digest(key: str) -> str:
    """The name of a key's file: its SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InputError(f"key name {name!r}: use 1 to 64 letters, digits, dots, dashes and underscores")


def new_key(
    folder: Path, name: str, *, expires_s: float | None = None, rate_rps: float | None = None, bulk: bool = False
) -> str:
    """Makes a key that is valid at once; earlier keys of the same name stay valid. Raises InputError for a bad name."""
    check_name(name)
    key = PREFIX + secrets.token_urlsafe(32)
    now = time.time()
    entry = {
        "name": name,
        "created": now,
        "expires": None if expires_s is None else now + expires_s,
        "rate_rps": rate_rps,
        "bulk": bulk,
    }
    write_private(folder / "keys" / f"{digest(key)}.json", json.dumps(entry).encode())
    return key


def keys_in(folder: Path) -> list[ApiKey]:
    """All stored keys, by name, newest first."""
    found, place = [], folder / "keys"
    for path in place.iterdir() if place.is_dir() else ():  # unlike glob, iterdir says that it may not read the folder
        if path.suffix != ".json":
            continue
        try:
            found.append(ApiKey(id=path.stem[:ID_DIGITS], **json.loads(path.read_bytes())))
        except (ValueError, TypeError):
            raise InputError(f"{path} is not a key entry; remove it") from None
    return sorted(found, key=lambda key: (key.name, -key.created))


def revoke(folder: Path, which: str) -> list[ApiKey]:
    """Revokes all keys with a name, or the one with an id; returns them."""
    keys = keys_in(folder)
    ended = [key for key in keys if which in (key.name, key.id)]
    if not ended:
        names = ", ".join(dict.fromkeys(key.name for key in keys)) or "none"
        raise InputError(f"no key {which!r} in {folder / 'keys'}; the names are: {names}")
    for key in ended:
        for path in (folder / "keys").glob(f"{key.id}*.json"):
            path.unlink()
    return ended


def _print_table(keys: list[ApiKey]) -> None:
    table = Table("name", "id", "created (UTC)", "expires (UTC)", "requests/s", "", box=box.SIMPLE_HEAD)
    for key in keys:
        created, expires = (
            "never" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
            for seconds in (key.created, key.expires)
        )
        rate = "default" if key.rate_rps is None else f"{key.rate_rps:g}"
        state = "bulk" if key.bulk and key.state == "valid" else key.state
        table.add_row(key.name, key.id, created, expires, rate, state)
    Console(markup=False).print(table)


def _make_output_private() -> None:
    """A file that gets the output, as in `make keys NAME=shop >build/key`, can only be read by this user."""
    with suppress(OSError):  # another user's file
        if stat.S_ISREG(mode := os.fstat(1).st_mode):
            os.fchmod(1, mode & 0o700)


def main(options: argparse.Namespace) -> None:
    folder = options.folder or gateway_folder()
    if options.name is not None and options.revoke is not None:
        raise InputError("--name makes a key and --revoke revokes one; use one of them")
    for name in ("expires_days", "rate_rps", "bulk"):
        if options.name is None and getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')}: seen without --name; name the caller of the new key (NAME=)")
    if options.revoke is not None:
        ended = revoke(folder, options.revoke)
        lines = "\n".join(f"revoked   {key.name} {key.id}" for key in ended)
        print(json.dumps([asdict(key) for key in ended], indent=2) if options.json else lines)
    elif options.name is not None:
        expires_s = None if options.expires_days is None else options.expires_days * DAY_S
        check_name(options.name)  # before the folder is made
        with alone_in(folder):
            ensure_folder(folder, options.host)
        key = new_key(folder, options.name, expires_s=expires_s, rate_rps=options.rate_rps, bulk=options.bulk)
        _make_output_private()
        result = {"name": options.name, "key": key, "id": digest(key)[:ID_DIGITS]}
        print(json.dumps(result) if options.json else key)
        print("this key cannot be shown again; callers send it as Authorization: Bearer <key>", file=sys.stderr)
    else:
        keys = keys_in(folder)
        if options.json:
            print(json.dumps([asdict(key) for key in keys], indent=2))
        else:
            _print_table(keys)
