"""A content-addressed cache of artifacts, shared by branches and clones.

Contract: an entry is a folder named by the digest of all that its files were made from: sources, settings, the
Python that is loaded (ours and the model's) and the versions of what it imports. `$CACHE` says where (by default
`~/.cache/deepseek-deploy`; `off` turns it off), `$CACHE_GIB` how much it may hold (10); the entries used longest
ago go first. Entries come into place by a rename and are checked by their digests when taken out: a killed build
or a damaged file cost a build, never a wrong artifact. Of two builds at once one makes what both need, the other waits.

Examples:
    python -m export.cache
    python -m export.cache --clear
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepseek.spec import GateFailed, InputError, Parser, run_command
from deepseek.spec.folders import scratch_in
from export.artifact import human_bytes, sha256, tool_versions

LOCKS = ".lock"
INDEX = "entry.json"  # digests of the entry's files; its time is when the entry was last used


def root() -> Path | None:
    """Folder of the cache, None where it is off, or the user has no home."""
    place = os.environ.get("CACHE") or "~/.cache/deepseek-deploy"
    try:
        return None if place == "off" else Path(place).expanduser()
    except RuntimeError:
        return None


def limit_bytes() -> int:
    """What the cache may hold."""
    value = os.environ.get("CACHE_GIB") or "10"
    try:
        size = float(value)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise InputError(f"CACHE_GIB: seen {value!r}; a number of GiB >= 0 is needed (CACHE=off turns the cache off)")
    return int(size * 2**30)


def key_of(stage: str, **made_from: Any) -> str:
    """Digest of what an artifact is made from: `made_from` (JSON), the code that is loaded, and its versions."""
    limit_bytes()  # InputError before anything is built, not after
    facts = {"stage": stage, "code": _code(), "versions": _versions(), **made_from}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _code() -> dict[str, str]:
    """Digest by module of all Python that is loaded and not installed: ours, and the model's with what it imports."""
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    found = {}
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path and path.endswith(".py") and not path.startswith(installed):  # __main__, the stage itself, too
            with contextlib.suppress(OSError):  # a module made up at run time
                found[name] = sha256(Path(path))
    return found


def _versions() -> dict[str, str]:
    """Of Python, of the tools, and of each distribution that is loaded."""
    loaded = {name.partition(".")[0] for name in sys.modules}
    owners = importlib.metadata.packages_distributions()
    names = {owner for package in loaded for owner in owners.get(package, ())}
    found = {name: importlib.metadata.version(name) for name in names}
    return {**found, **tool_versions(), "python": platform.python_version()}


def files_in(folder: Path) -> dict[str, str]:
    """Digest of each file in a model folder: what its functions read beside Python that is loaded.

    Links are followed; what is hidden (.git, .venv) is no source of a model. The Makefile looks at the same files.
    """
    found = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        folders[:] = [name for name in folders if _is_source(name) and not _leads_back(here / name)]
        files = [here / name for name in names if _is_source(name) and (here / name).is_file()]
        found.update({str(path.relative_to(folder)): sha256(path) for path in files})
    return found


def _is_source(name: str) -> bool:
    return name != "__pycache__" and not name.startswith(".")


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def data_digest() -> str | None:
    """Digest of the file that DATA names; None without one."""
    path = Path(os.environ.get("DATA", ""))
    return sha256(path) if path.is_file() else None


def cpu() -> str:
    """What computes here, as far as results depend on it: another instruction set rounds, and saturates, otherwise."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags.partition(':')[2].strip()}"


def fetch(key: str, destination: Path) -> bool:
    """Copies the entry's files into the folder `destination`; False where there is none that is whole."""
    place = root()
    if place is None or not _is_file(place / key / INDEX):
        return False
    try:
        files: Mapping[str, str] = json.loads((place / key / INDEX).read_text())
        for name, digest in files.items():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place / key / name, destination / name)
            if sha256(destination / name) != digest:
                raise ValueError(name)
        with contextlib.suppress(OSError):  # another user's entry: it may be read, and not touched
            os.utime(place / key / INDEX)
    except (OSError, ValueError, AttributeError) as error:
        if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):  # damaged, or making room for others
            _remove(place / key)
        _empty(destination)
        return False
    return True


def fetch_checked(key: str, destination: Path, check: Callable[[], object]) -> bool:
    """As `fetch`, of an entry that still passes `check`; one that raises GateFailed is dropped.

    A key cannot tell what a model reads outside its folder.
    """
    if not fetch(key, destination):
        return False
    try:
        check()
    except GateFailed:
        drop(key)
        _empty(destination)
        return False
    return True


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_file(path: Path) -> bool:
    """Whether it is there, as far as we may look."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextlib.contextmanager
def alone_with(key: str | None) -> Iterator[None]:
    """One process at a time makes the entry of a key: the next waits, says so, and then finds it made.

    The lock is a byte of one file, at the place that the key tells, and ends with its process. Where there is no cache,
    or none that can be written, nobody waits.
    """
    lock = _lock_of(key)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock_of(key: str | None) -> int | None:
    """A descriptor that holds the lock until it is closed; None where there is none to hold."""
    place = root()
    if place is None or key is None:
        return None
    descriptor, offset = None, int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / LOCKS, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except BlockingIOError:
            print(f"waiting for another build that makes the same into {place} (CACHE=off: not)", file=sys.stderr)
            fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, offset)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def store(key: str, files: Path) -> None:
    """Adds all files under the folder `files`. A cache that cannot be written is no error: the build has succeeded."""
    place = root()
    if place is None:
        return
    with contextlib.suppress(OSError):
        _store(place, key, files)


def drop(key: str) -> None:
    """Removes an entry that turned out to be of no use."""
    place = root()
    if place is not None:
        _remove(place / key)


def _remove(entry: Path) -> None:
    """Takes an entry away at once for others, then deletes it: a kill leaves no half of it."""
    with contextlib.suppress(OSError), scratch_in(entry.parent) as scratch:
        os.rename(entry, scratch / entry.name)


def _store(place: Path, key: str, files: Path) -> None:
    names = sorted(str(path.relative_to(files)) for path in files.rglob("*") if path.is_file())
    if _is_file(place / key / INDEX) or sum((files / name).stat().st_size for name in names) > limit_bytes():
        return
    if (place / key).exists():  # half of one, however it came about
        _remove(place / key)
    with scratch_in(place) as scratch:
        entry = scratch / key
        for name in names:
            (entry / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files / name, entry / name)
        (entry / INDEX).write_text(json.dumps({name: sha256(entry / name) for name in names}))
        os.rename(entry, place / key)  # fails where another build has just added the same
    trim(place, limit_bytes())


def entries(place: Path) -> dict[Path, int]:
    """Bytes of each entry, the one used longest ago first."""
    found = []
    for index in place.glob(f"*/{INDEX}"):
        with contextlib.suppress(OSError):  # just removed by another build
            size = sum(path.stat().st_size for path in index.parent.rglob("*") if path.is_file())
            found.append((index.stat().st_mtime_ns, index.parent, size))
    return {path: size for _, path, size in sorted(found)}


def trim(place: Path, limit: int) -> None:
    """Removes the entries used longest ago until `limit` bytes hold the rest."""
    sizes = entries(place)
    total = sum(sizes.values())
    for path, size in sizes.items():
        if total <= limit:
            return
        _remove(path)
        total -= size


def main() -> None:
    """Says what the cache holds, or empties it."""
    parser = Parser(__doc__, prog="python -m export.cache")
    parser.add_argument("--clear", action="store_true", help="remove all entries")
    args = parser.parse_args()
    place = root()
    if place is None:
        print("cache     off (CACHE=off)")
        return
    limit = limit_bytes()
    if args.clear and place.is_dir():
        trim(place, -1)
    sizes = entries(place)
    print(f"{place}: {len(sizes)} artifacts, {human_bytes(sum(sizes.values()))} of at most {human_bytes(limit)}")


if __name__ == "__main__":
    run_command(main)
