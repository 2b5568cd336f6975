"""A content-addressed cache of artifacts, shared by branches and clones.

Contract: an entry is a folder named by a key, the digest of all inputs of its files (`export.stage_inputs`).
`$DEEPSEEK_CACHE` is the cache's folder (default: `~/.cache/deepseek-deploy`; `off` turns the cache off),
`$DEEPSEEK_CACHE_GIB` its maximum size (default: 10). Least recently used entries are evicted first. Entries appear by a
rename, and their digests are checked on every read: a killed build or a damaged file costs a rebuild, never a wrong
artifact. If two builds need the same entry at once, one makes it and the other waits.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from deepseek.spec import GateFailed, InputError
from deepseek.spec.files.folders import scratch_in
from export.artifact import human_bytes, publish, sha256

LOCKS = ".lock"
INDEX = "entry.json"  # digests of the entry's files; its mtime is when the entry was last used
NOTE = "note.json"  # the only file of an entry that points to another entry
GIB = "DEEPSEEK_CACHE_GIB"
STAGE_KEYS = "DEEPSEEK_STAGE_KEYS"  # JSON: keys by part, "" for the stage itself


def root() -> Path | None:
    """Folder of the cache; None if it is off or the user has no home."""
    place = os.environ.get("DEEPSEEK_CACHE") or "~/.cache/deepseek-deploy"
    try:
        return None if place == "off" else Path(place).expanduser()
    except RuntimeError:
        return None


def limit_bytes() -> int:
    """Maximum size of the cache; raises InputError if `$DEEPSEEK_CACHE_GIB` is not a number >= 0."""
    value = os.environ.get(GIB) or "10"  # as the option's default, for commands without that option
    try:
        size = float(value)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise InputError(f"CACHE_GIB: seen {value!r}; a number of GiB >= 0 is needed (CACHE=off turns the cache off)")
    return int(size * 2**30)


def stage_key(part: str = "") -> str | None:
    """The key of the stage that this process runs, or of a part of it; None if run by hand or the cache is off.

    `deepseek engine` sets it for each stage that it runs.
    """
    keys = json.loads(os.environ.get(STAGE_KEYS) or "{}")
    return keys.get(part) if root() is not None else None


def _entry(key: str) -> Path:
    """Folder of a key's entry. A stage has a key only if the cache is on."""
    place = root()
    assert place is not None
    return place / key


def refined(key: str | None, **also: str) -> str | None:
    """A key that also depends on `also`: values that only the running stage knows, such as digests of samples.

    Stores a note under `key`, so that `deepseek engine --explain` finds the entry.
    """
    if key is None:
        return None
    entry = hashlib.sha256(json.dumps([key, also], sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / NOTE).write_text(json.dumps({"entry": entry, "also": also}))
        drop(key)
        store(key, Path(folder))
    return entry


def predicted(key: str) -> dict[str, str] | None:
    """Digests, by name, of the files that a stage would take from the cache; None without an entry."""
    if root() is None or not os.path.isfile(_entry(key) / INDEX):
        return None
    try:
        files: dict[str, str] = json.loads((_entry(key) / INDEX).read_text())
        if NOTE not in files:
            return files
        note = json.loads((_entry(key) / NOTE).read_text())
        found = predicted(note["entry"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if found is None else {**note["also"], **found}


def put_in_place(
    key: str | None, artifact: Path, make: Callable[[Path], object], check: Callable[[Path], object] | None = None
) -> None:
    """Publishes `artifact` and the files beside it, from the cache entry `key` or else from `make(folder)`.

    An entry that fails `check` (GateFailed) is dropped and made again.
    """
    with scratch_in(artifact.parent) as scratch:
        fill(scratch, key, make, check)
        publish(scratch, artifact)


def fill(
    folder: Path, key: str | None, make: Callable[[Path], object], check: Callable[[Path], object] | None = None
) -> None:
    """Fills an empty folder from the cache entry; without one, runs `make` and stores its files."""
    with alone_with(key):
        if key is None or not fetch(key, folder, check):
            make(folder)
            if key is not None:
                store(key, folder)


def fetch(key: str, destination: Path, check: Callable[[Path], object] | None = None) -> bool:
    """Copies the entry's files into the folder `destination`; False if it is missing, damaged or fails `check`."""
    entry = _entry(key)
    if not os.path.isfile(entry / INDEX):  # Path.is_file raises if another user's entry may not be read
        return False
    try:
        files: Mapping[str, str] = json.loads((entry / INDEX).read_text())
        for name, digest in files.items():
            if name.startswith("/") or ".." in name.split("/"):  # outside the folder
                raise ValueError(name)
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry / name, destination / name)
            if sha256(destination / name) != digest:
                raise ValueError(name)
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(entry / INDEX)
        if check is not None:
            check(destination)
    except (OSError, ValueError, AttributeError, GateFailed) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # of the build's disk: the entry is intact
            raise
        drop(key)
        for path in destination.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False
    return True


@contextlib.contextmanager
def alone_with(key: str | None) -> Iterator[None]:
    """Lets one process at a time make the entry of a key; others print that they wait, and then find it.

    The lock is one byte of a shared file, at an offset derived from the key, and ends with its process. A cache that
    cannot be written has none.
    """
    with contextlib.ExitStack() as held:
        if key is not None:
            place, offset = _entry(key).parent, int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)
            with contextlib.suppress(OSError):
                file = _lock_file(place)
                _lock(file, offset, place)
                held.callback(fcntl.lockf, file, fcntl.LOCK_UN, 1, offset)
        yield


@functools.cache
def _lock_file(place: Path) -> int:
    """A descriptor of the file of locks, open until the process ends.

    Closing any descriptor of the file would end all locks of this process in it. So a part of a stage would end the
    stage's lock.
    """
    place.mkdir(parents=True, exist_ok=True)
    return os.open(place / LOCKS, os.O_WRONLY | os.O_CREAT, 0o666)


def _lock(file: int, offset: int, place: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except BlockingIOError:
        print(f"waiting for another build of the same entry in {place} (CACHE=off skips the cache)", file=sys.stderr)
        fcntl.lockf(file, fcntl.LOCK_EX, 1, offset)


def store(key: str, files: Path) -> None:
    """Adds all files under the folder `files`. Write errors are ignored: the build has succeeded."""
    entry = _entry(key)
    with contextlib.suppress(OSError):
        names = sorted(str(path.relative_to(files)) for path in files.rglob("*") if path.is_file())
        if (entry / INDEX).is_file() or sum((files / name).stat().st_size for name in names) > limit_bytes():
            return
        if entry.exists():  # a partial entry
            _remove(entry)
        with scratch_in(entry.parent) as scratch:
            made = scratch / key
            for name in names:
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(files / name, made / name)
            (made / INDEX).write_text(json.dumps({name: sha256(made / name) for name in names}))
            os.rename(made, entry)  # fails if another build has just added the entry
        trim(entry.parent, limit_bytes())


def drop(key: str) -> None:
    """Removes an unusable entry."""
    _remove(_entry(key))


def _remove(entry: Path) -> None:
    """Renames an entry away, then deletes it: a kill leaves no partial entry."""
    with contextlib.suppress(OSError), scratch_in(entry.parent) as scratch:
        os.rename(entry, scratch / entry.name)


def entries(place: Path) -> dict[Path, int]:
    """Size of each entry in bytes, least recently used first."""
    found = []
    for index in place.glob(f"*/{INDEX}"):
        with contextlib.suppress(OSError):  # just removed by another build
            size = sum(path.stat().st_size for path in index.parent.rglob("*") if path.is_file())
            found.append((index.stat().st_mtime_ns, index.parent, size))
    return {path: size for _, path, size in sorted(found)}


def trim(place: Path, limit: int) -> None:
    """Evicts least recently used entries until the rest fits in `limit` bytes."""
    sizes = entries(place)
    total = sum(sizes.values())
    for path, size in sizes.items():
        if total <= limit:
            return
        _remove(path)
        total -= size


def clear(options: argparse.Namespace) -> None:
    place = root()
    if place is None:
        print("cache     off (CACHE=off)")
        return
    size = sum(entries(place).values())
    trim(place, 0)
    left = sum(entries(place).values())
    kept = f", {human_bytes(left)} could not be removed" if left else ""
    print(f"{place}: {human_bytes(size - left)} removed{kept}")
