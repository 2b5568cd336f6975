"""Folders of one process: its own to work in, or one that it alone may change; files that appear whole or not at all.

Contract: both kinds of folder end with their process, however it ends. Locks are `flock` on the folder itself, so
nothing is left of them, and no process is taken for another that has its number.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SCRATCH = ".scratch-"  # how the name of what is not finished begins


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, removed at the end, as are those that killed processes left.

    Its owner holds a lock on it, which ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{SCRATCH}*"):
        with suppress(OSError):
            lock = _lock(stale, fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)
    scratch, lock = _own_folder(folder)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _own_folder(folder: Path) -> tuple[Path, int]:
    """A new folder and its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
        with suppress(FileNotFoundError):
            lock = _lock(path)
            if path.exists():  # else another process took it for a stale one before it was locked
                return path, lock
            os.close(lock)


def _lock(folder: Path, flags: int = 0) -> int:
    """A descriptor that holds the folder's lock until it is closed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, whose place it takes when the block ends well; else nothing is left of it.

    It has the same suffix. The folders above are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> Path:
    """Makes or replaces a file, whole or not at all, and the folders above it; its path."""
    with beside(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def onto_disk(place: Path) -> None:
    """A file, or a folder and what is in it, is on the disk when this returns: a rename then outlasts a power cut."""
    found = [Path(folder, name) for folder, _, names in os.walk(place) for name in (*names, "")]
    for path in found or [place]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has no such thing for folders
                raise
        finally:
            os.close(descriptor)


def let_all_read(folder: Path) -> None:
    """What root writes, others serve: containers run as another user, and root's umask may keep it from them."""
    if os.geteuid() == 0:
        found = [Path(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)]
        for path in (folder, *found):
            with suppress(FileNotFoundError):  # another publisher's, which it has just moved
                mode = path.lstat().st_mode
                wanted = mode | (0o755 if stat.S_ISDIR(mode) else 0o644)
                if not stat.S_ISLNK(mode) and wanted != mode:  # as it is, it may be on a disk that is read alone
                    path.chmod(wanted)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`, which is made; the next waits, and says so. The lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(folder, fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process in {folder}", file=sys.stderr, flush=True)
        lock = _lock(folder)
    try:
        yield
    finally:
        os.close(lock)
