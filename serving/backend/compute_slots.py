"""Compute slots: limit how many processes compute at once to what the cores can run.

Contract: `with ComputeSlots(path, slots):` holds one of the slots that the processes of one server share for the file
`path`. Slots go to waiting processes in order of arrival. A killed process frees its slot. This file is published
beside the backend's model.py, so it imports nothing of the project.

A slot is a byte-range lock on a pipe, which the kernel releases when its process ends. A process that leaves a slot
writes to the pipe to wake the one waiter that listens. A killed process writes nothing, so the waiter also polls.
"""

import contextlib
import fcntl
import os
import select
import tempfile

PAUSE_S = 0.05


class ComputeSlots:
    """The slots, shared between processes; not safe for several threads of one process."""

    def __init__(self, path: str, slots: int) -> None:
        file = os.stat(path)
        # One pipe for each server: the server is the parent of the processes that run its models.
        name = f"compute-slots-{os.getppid()}-{file.st_dev:x}-{file.st_ino:x}"
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
        """Takes a free slot; False if all are taken."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._pipe, select.PIPE_BUF)  # wake-ups for slots already free: the loop below finds those
        for slot in range(self._slots):
            with contextlib.suppress(BlockingIOError):
                fcntl.lockf(self._pipe, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                self._slot = slot
                return True
        return False

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._pipe, fcntl.LOCK_UN, 1, self._slot)
        with contextlib.suppress(BlockingIOError):  # pipe full: nobody is waiting
            os.write(self._pipe, b".")
