"""Turns at computing: as many processes at a time as the cores have room for.

Contract: `with Turns(path, slots):` holds one of the slots that the processes of one server share for the file `path`.
The longest waiting is next, and gets whichever slot is left first. A process that is killed leaves its own. A part of
the Python backend, laid beside its model.py by `export.to_triton`: so it imports nothing of ours.

Slots are byte-range locks of a pipe, which end with their process however it ends. Whoever leaves one writes into the
pipe, on which one process listens at a time. One that was killed writes nothing: hence the pause.
"""

import contextlib
import fcntl
import os
import select
import tempfile

PAUSE_S = 0.05


class Turns:
    """The slots; not for several threads of one process."""

    def __init__(self, path: str, slots: int) -> None:
        file = os.stat(path)
        # The server's own: it is the parent of the processes that run its models.
        name = f"turns-{os.getppid()}-{file.st_dev:x}-{file.st_ino:x}"
        pipe = os.path.join(tempfile.gettempdir(), name)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(pipe, 0o600)
        self._pipe = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        self._slots = slots
        self._slot = 0

    def __enter__(self) -> None:
        fcntl.flock(self._pipe, fcntl.LOCK_EX)
        try:
            while not self._taken():
                select.select([self._pipe], [], [], PAUSE_S)
        finally:
            fcntl.flock(self._pipe, fcntl.LOCK_UN)

    def _taken(self) -> bool:
        """Whether a slot was free, which then is ours."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._pipe, select.PIPE_BUF)  # of slots left until now, which the next lines find
        for slot in range(self._slots):
            with contextlib.suppress(BlockingIOError):
                fcntl.lockf(self._pipe, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                self._slot = slot
                return True
        return False

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._pipe, fcntl.LOCK_UN, 1, self._slot)
        with contextlib.suppress(BlockingIOError):  # full: nobody has waited for long
            os.write(self._pipe, b".")
