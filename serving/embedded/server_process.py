"""The process `tritonserver` with its log and scratch folder; nothing of it outlives this process.

Contract: even if this process is killed, the server, its stubs, its scratch folder and its shared memory go away: a
shell waits for this process to end and cleans up.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepseek.spec.processes.children import ends_with_us
from serving.embedded.triton_log import CrashDetector, copy_log
from serving.embedded.wheel import scratch_place

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# Reads the server's process id and waits until this process ends, then until the server does, which ends with it. Then
# kills the rest: a stub of 2.51 waits forever for a message from a dead server. $1: seconds, $2: the scratch folder.
_CLEAN_UP = """
read -r server && read -r _
if [ -n "$server" ]; then
    while kill -0 "$server" && [ "$1" -gt 0 ]; do sleep 1; set -- $(($1 - 1)) "$2"; done
    kill -s KILL -- "-$server"  # dash knows no -- after -KILL
fi
rm -rf -- "$2" "/dev/shm/${2##*/}"*
"""
_LIBC = ctypes.CDLL(None, use_errno=True)


class ServerProcess:
    """Starts and stops the server. The log goes to `log_path`; with `echo_log` to standard output after the start."""

    def __init__(self, log_path: Path, *, exit_timeout_s: int, echo_log: bool) -> None:
        self.log_path = log_path
        self.popen: subprocess.Popen[bytes] | None = None
        self.crashed = CrashDetector(log_path)
        self.ready = threading.Event()
        """Set once the server is up: from then on an echoed log is not written to the file."""
        self._longest_stop_s, self._echo_log = exit_timeout_s + 5, echo_log
        self._echo: threading.Thread | None = None
        # Short and private: the path is on the stub's command line, the prefix in /dev/shm.
        self.scratch = Path(tempfile.mkdtemp(prefix="embedded-triton-", dir=scratch_place()))
        # systemd-tmpfiles removes what nothing changed for days, except from a locked folder.
        self._lock = os.open(self.scratch, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._cleaner = subprocess.Popen(
            ["/bin/sh", "-c", _CLEAN_UP, "after", str(self._longest_stop_s), str(self.scratch)],
            stdin=subprocess.PIPE,  # closes when this process ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self, command: Sequence[str], environment: Mapping[str, str], *, secret: str) -> subprocess.Popen[bytes]:
        """Starts the server; `secret` is masked in the log."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            if self.log_path.is_file():
                self.log_path.chmod(0o600)  # a file of an earlier run keeps its mode
            log.write(f"{' '.join(command)}\n".replace(secret, "<secret>").encode())
            log.flush()
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # this process reaps stubs orphaned by a crash
            self.popen = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._echo_log else log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C does not reach it directly, and the group can be killed
                preexec_fn=ends_with_us(),
            )
        assert self._cleaner.stdin is not None
        self._cleaner.stdin.write(f"{self.popen.pid}\n".encode())
        self._cleaner.stdin.flush()
        if self.popen.stdout is not None:
            copied = (self.popen.stdout, self.log_path, self.crashed, self.ready)
            self._echo = threading.Thread(target=copy_log, args=copied, daemon=True)
            self._echo.start()
        return self.popen

    def poll(self) -> int | None:
        """The exit status of a server that ended by itself; None while it runs or before the start."""
        return None if self.popen is None else self.popen.poll()

    def end(self) -> None:
        """Lets requests in flight finish, then ends the server and its stubs."""
        if self.popen is None:
            return
        if self.popen.poll() is None:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(self._longest_stop_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # stubs too
        self.popen.wait()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-self.popen.pid, 0):  # stubs that the server left behind
                pass
        if self._echo is not None:
            self._echo.join()  # ends with the last process that wrote to it
        self.popen = None

    def remove_files(self) -> None:
        """Removes the scratch folder and the shared memory of a server that has ended."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for region in Path("/dev/shm").glob(f"{self.scratch.name}*"):
            region.unlink(missing_ok=True)
        self._cleaner.kill()
        self._cleaner.communicate()
        os.close(self._lock)
