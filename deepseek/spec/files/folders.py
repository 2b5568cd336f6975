"""Scratch folders, locked folders and atomic file writes.

Contract: scratch folders and locks are released when their process ends, even if it is killed. A lock is `flock` on the
folder itself: it leaves no lock file behind, and a reused process number cannot confuse it.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deepseek.spec.command import InputError

SCRATCH = ".scratch-"  # prefix of the names of unfinished folders
TIME, TIME_NAME = "%Y-%m-%dT%H-%M-%S.%f", re.compile(r"(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{3})Z")


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, removed at the end. Also removes those that killed processes left behind.

    The owner holds a lock on it until the process ends.
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
            if path.exists():  # else another process removed it as stale before it was locked
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
    """A draft file beside `path`, which replaces `path` if the block succeeds and is deleted otherwise.

    The draft has the suffix of `path`. Missing parent folders are created. A device or a pipe, such as /dev/stdout, is
    its own draft: to replace it would destroy it.
    """
    if path.parts[:2] == ("/", "dev") or (path.exists() and not path.is_file()):
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        if error.filename == str(draft):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        with suppress(OSError):
            draft.unlink()


def write_whole(path: Path, text: str) -> Path:
    """Writes a file atomically, creates missing parent folders, and returns the path."""
    with beside(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def time_name(*folders: Path) -> str:
    """A name from the time in UTC, to the millisecond. It sorts after the names of this kind in `folders`.

    If the clock was set back, it is a millisecond later than the last of them.
    """
    now = datetime.now(UTC).replace(tzinfo=None)
    found = (TIME_NAME.match(path.name) for folder in folders if folder.is_dir() for path in folder.iterdir())
    if last := max((match[1] for match in found if match), default=None):
        with suppress(ValueError, OverflowError):  # such as month 13
            now = max(now, datetime.strptime(last, TIME) + timedelta(milliseconds=1))
    return f"{now.strftime(TIME)[:-3]}Z"


def onto_disk(place: Path) -> None:
    """Flushes a file, or a folder with its contents, to disk: a rename that follows survives a power cut."""
    found = [Path(folder, name) for folder, _, names in os.walk(place) for name in (*names, "")]
    for path in found or [place]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # this file system cannot fsync folders
                raise
        finally:
            os.close(descriptor)


def let_all_read(place: Path) -> None:
    """Makes a file, or a folder with its contents, that root wrote readable to all.

    Containers run as another user, and root's umask may shut them out.
    """
    if os.geteuid() == 0:
        found = [Path(above, name) for above, folders, files in os.walk(place) for name in (*folders, *files)]
        for path in (place, *found):
            with suppress(FileNotFoundError):  # another publisher has just moved its file
                mode = path.lstat().st_mode
                wanted = mode | (0o755 if stat.S_ISDIR(mode) else 0o644)
                if not stat.S_ISLNK(mode) and wanted != mode:  # no needless chmod: the disk may be read-only
                    path.chmod(wanted)


@contextmanager
def alone_in(folder: Path, *, refusal: str = "") -> Iterator[int]:
    """Lets one process at a time into `folder`, which it creates; the next one says that it waits, and waits.

    With `refusal` it raises InputError with that text instead. Yields the descriptor of the lock, which lasts until the
    last process that inherits it ends.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(folder, fcntl.LOCK_NB)
        except BlockingIOError:
            if refusal:
                raise InputError(refusal) from None
            print(f"waiting for another process in {folder}", file=sys.stderr, flush=True)
            lock = _lock(folder)
        if folder.is_dir() and os.path.samestat(os.fstat(lock), folder.stat()):
            break
        os.close(lock)  # the other process removed the folder
    try:
        yield lock
    finally:
        os.close(lock)
