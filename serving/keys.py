"""API keys of the gateway: made, listed and ended while it runs.

Contract: a key is `dsk_` and 256 random bits; it is printed once and kept nowhere. What is kept is
`<folder>/keys/<sha256 of the key>.json` with a name, an optional end and an optional rate. The gateway looks there at
each request, so that a new key counts and an ended one does not from the next request on. SHA-256 without salt or
stretching is enough: those slow down guessing what people choose, and nobody guesses 256 random bits. On first use a
certificate authority for trying and a certificate are made, too (`serving.certificate`).

Examples:
    python -m serving.keys --name shop                                   # prints a new key, once
    python -m serving.keys --name shop --expires-days 90 --rate-rps 50
    python -m serving.keys --revoke shop                                 # all keys of that name
    python -m serving.keys --revoke 3f2a91c0                             # one of them, by its id
    python -m serving.keys --json                                        # list them
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import InputError, Parser, run_command
from serving.certificate import ensure_certificate, give, write_private

PREFIX = "dsk_"  # what scanners for leaked secrets can look for
ID_DIGITS = 8
DAY_S = 86_400
LONGEST_S = 100 * 365 * DAY_S
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is kept of a key; times in seconds since 1970."""

    id: str
    name: str
    created: float
    expires: float | None
    rate_rps: float | None
    """Requests in any second; None: the default of the stack."""

    @property
    def state(self) -> str:
        """Whether it counts."""
        return "expired" if self.expires is not None and self.expires <= time.time() else "valid"


def gateway_folder() -> Path:
    """Where certificate, keys and limits lie: `$BUILD/gateway`."""
    return Path(os.environ.get("BUILD", "build")) / "gateway"


def ensure_folder(folder: Path, hosts: list[str]) -> None:
    """The gateway's folder with a certificate and a place for keys."""
    if ensure_certificate(folder, hosts):
        names = f" for {', '.join(hosts)}" if hosts else ""
        print(f"gateway   new certificate{names}; callers trust it by {folder / 'ca.crt'}", file=sys.stderr)
    (folder / "keys").mkdir(mode=0o700, exist_ok=True)
    for path in (folder / "keys", *(folder / "keys").glob("*.json")):
        with suppress(FileNotFoundError):  # ended meanwhile
            give(path, folder)


def digest(key: str) -> str:
    """What a key is found by."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_wish(name: str, *, expires_s: float | None = None, rate_rps: float | None = None) -> None:
    """Raises InputError where no such key can be made."""
    if not NAME.fullmatch(name):
        raise InputError(f"key name {name!r}: letters, digits, dots, dashes and underscores, 1 to 64 of them")
    if rate_rps is not None and not (1 <= rate_rps < float("inf") and rate_rps % 1 == 0):  # counted by the second
        raise InputError(f"rate {rate_rps:g}: it must be a whole number of requests a second, 1 or more")
    if expires_s is not None and not 0 < expires_s <= LONGEST_S:
        raise InputError(f"expiry {expires_s / DAY_S:g} days: it must be more than 0, and at most {LONGEST_S // DAY_S}")


def new_key(folder: Path, name: str, *, expires_s: float | None = None, rate_rps: float | None = None) -> str:
    """Makes a key that counts from now on; earlier ones of the same name go on counting."""
    check_wish(name, expires_s=expires_s, rate_rps=rate_rps)
    key = PREFIX + secrets.token_urlsafe(32)
    now = time.time()
    entry = {
        "name": name,
        "created": now,
        "expires": None if expires_s is None else now + expires_s,
        "rate_rps": rate_rps,
    }
    write_private(folder / "keys" / f"{digest(key)}.json", json.dumps(entry).encode())
    return key


def keys_in(folder: Path) -> list[Key]:
    """All that are kept, by name, newest first."""
    found = []
    for path in (folder / "keys").glob("*.json"):
        try:
            found.append(Key(id=path.stem[:ID_DIGITS], **json.loads(path.read_bytes())))
        except (ValueError, TypeError):
            raise InputError(f"{path} is no key's entry; remove it") from None
    return sorted(found, key=lambda key: (key.name, -key.created))


def revoke(folder: Path, which: str) -> list[Key]:
    """Ends all keys of a name, or the one of an id; returns them."""
    ended = [key for key in keys_in(folder) if which in (key.name, key.id)]
    if not ended:
        names = ", ".join(sorted({key.name for key in keys_in(folder)})) or "none"
        raise InputError(f"no key {which!r} in {folder / 'keys'}; there are keys of: {names}")
    for key in ended:
        for path in (folder / "keys").glob(f"{key.id}*.json"):
            path.unlink()
    return ended


def _shown(seconds: float | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(" ", "minutes")[:16]


def _print_table(keys: list[Key]) -> None:
    table = Table("name", "id", "made (UTC)", "ends (UTC)", "requests/s", "", box=box.SIMPLE_HEAD)
    for key in keys:
        rate = "default" if key.rate_rps is None else f"{key.rate_rps:g}"
        table.add_row(key.name, key.id, _shown(key.created), _shown(key.expires), rate, key.state)
    Console(markup=False).print(table)


def main() -> None:
    """Makes, ends or lists keys."""
    parser = Parser(__doc__, prog="python -m serving.keys")
    parser.add_argument("--name", help="make a key for this caller and print it")
    parser.add_argument("--expires-days", type=float, help="days until it ends (default: it does not)")
    parser.add_argument("--rate-rps", type=float, help="requests in any second (default: the stack's, see limits.conf)")
    parser.add_argument("--revoke", metavar="NAME|ID", help="end all keys of a name, or the one of an id")
    parser.add_argument("--host", action="append", default=[], help="name of the gateway for its certificate; repeat")
    parser.add_argument("--folder", type=Path, help="the gateway's folder (default: gateway/ in $BUILD)")
    parser.add_argument("--json", action="store_true", help="print what was made, ended or found as JSON")
    args = parser.parse_args()
    folder = args.folder or gateway_folder()
    if args.name is not None and args.revoke is not None:
        parser.error("--name makes a key, --revoke ends one: one at a time")
    if args.revoke is not None:
        ended = revoke(folder, args.revoke)
        lines = "\n".join(f"ended     {key.name} {key.id}" for key in ended)
        print(json.dumps([asdict(key) for key in ended], indent=2) if args.json else lines)
    elif args.name is not None:
        expires_s = None if args.expires_days is None else args.expires_days * DAY_S
        check_wish(args.name, expires_s=expires_s, rate_rps=args.rate_rps)  # before anything is made
        ensure_folder(folder, args.host)
        key = new_key(folder, args.name, expires_s=expires_s, rate_rps=args.rate_rps)
        result = {"name": args.name, "key": key, "id": digest(key)[:ID_DIGITS]}
        print(json.dumps(result) if args.json else key)
        print("the key is kept nowhere: hand it on now, as Authorization: Bearer <key>", file=sys.stderr)
    else:
        keys = keys_in(folder)
        if args.json:
            print(json.dumps([asdict(key) for key in keys], indent=2))
        else:
            _print_table(keys)


if __name__ == "__main__":
    run_command(main)
