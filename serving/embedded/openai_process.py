"""The process of the OpenAI routes (`serving.openai`) beside the embedded server.

Contract: this process listens, and the routes inherit the socket. Callers wait while the routes restart after a crash.
`look` reports a failure if they crash repeatedly. They end before the server, once requests in flight have
their answers (at most `OPENAI_DRAIN_S`), and also if this process is killed.
"""

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deepseek.spec import InputError
from deepseek.spec.files.repository import CONFIG, model_folders
from deepseek.spec.processes.children import ends_with_us
from serving.embedded.flags import OPENAI_DRAIN_S
from serving.embedded.ports import ReservedPorts
from serving.embedded.supervisor import MOST_TIMES, WITHIN_S
from serving.repository.checks import Finding, config_at

NAME = "OpenAI"
KILL_AFTER_S = 2.0  # beyond OPENAI_DRAIN_S
PACKAGES = ("aiohttp", "deepseek_client", "orjson", "uvloop")


class OpenAIProcess:
    """Runs the routes inside the `with` block. `port` 0 picks a free port, which the attribute then holds."""

    def __init__(
        self,
        repository: Path,
        *,
        address: str,
        port: int,
        http_port: int,
        say: Callable[[str], None],
    ) -> None:
        self._ports = ReservedPorts(address, {NAME: port})
        self.port = self._ports.numbers[NAME]
        self.url = f"http://{self._ports.address}:{self.port}/v1"
        self._say = say
        host = "127.0.0.1" if self._ports.address == "0.0.0.0" else self._ports.address
        self._flags = [
            f"--http-url={host}:{http_port}",
            f"--repository={repository}",
            f"--drain-s={OPENAI_DRAIN_S}",
        ]
        self._restarted_s: list[float] = []
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "OpenAIProcess":
        try:
            self._start()
        except BaseException:
            self._ports.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ports.release()  # else callers would wait in the socket's backlog until all is over
        if self._process is not None:
            self._process.terminate()
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(OPENAI_DRAIN_S + KILL_AFTER_S)
            finally:  # a second Ctrl-C
                self._process.kill()
                self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def look(self) -> str | None:
        """Restarts the process if it ended; returns the reason if that does not help."""
        status = self._process.poll() if self._process else None
        if status is None:
            return None
        now_s = time.monotonic()
        self._restarted_s = [each for each in self._restarted_s if now_s - each < WITHIN_S]
        if len(self._restarted_s) >= MOST_TIMES:
            self._ports.release()
            return f"the OpenAI routes ended {MOST_TIMES + 1} times within {WITHIN_S} s, last with exit status {status}"
        self._say(f"died      the OpenAI routes: exit status {status}; restarting them")
        self._restarted_s.append(now_s)
        self._start()
        return None

    def _start(self) -> None:
        listener = self._ports.listen(NAME)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.openai", f"--socket={listener.fileno()}", *self._flags],
            stdin=subprocess.DEVNULL,
            pass_fds=(listener.fileno(),),
            start_new_session=True,  # Ctrl-C does not reach it directly: it ends before the server
            preexec_fn=ends_with_us(),
        )


def takes(folder: Path, parameter: str) -> bool:
    """Whether a readable configuration of the models in a folder has this parameter: TEXT or VOCABULARY."""
    for model in model_folders(folder):
        with contextlib.suppress(InputError):
            if parameter in config_at(model / CONFIG).parameters:
                return True
    return False


def missing_packages() -> Finding | None:
    """A warning if the routes cannot run here."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    what = f"off: {' and '.join(missing)} not installed here"
    return Finding(level="warning", where="OpenAI routes", what=what, fix="install: make setup")
