"""Supervises a running server: loads new versions, and reloads a model that lost one of its processes.

Contract: `start` watches the server in the background until `stop`. With `poll_s` it follows the repository: if Triton
refuses a version, the old one keeps serving. A model that lost a process (`serving.embedded.stub_processes`) is
unloaded, so that its requests are refused instead of failing, and loaded again. If that does not help for long, the
supervisor stops the server and `failure` says why; a container platform then restarts it. A crashed server gets
`CRASH_S` to write its stack trace. Each event is one line through `say`.
"""

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from serving.embedded.model_control import Action, ModelControl
from serving.embedded.stub_processes import LOOK_S, StubMonitor, end
from serving.embedded.triton_log import KILLED
from serving.embedded.verified_repository import VerifiedRepository

CRASH_S = 3.0
MOST_TIMES, WITHIN_S = 3, 60  # reloads of one model in a row


class Supervisor:
    """Watches the models of a running server.

    `reworded` puts the repository's paths into Triton's messages. `drain_s`: no request takes longer.
    """

    def __init__(
        self,
        server: subprocess.Popen[bytes],
        *,
        stubs: StubMonitor,
        control: ModelControl,
        verified: VerifiedRepository,
        crashed: Callable[[], bool],
        reworded: Callable[[str], str],
        say: Callable[[str], None],
        drain_s: float,
    ) -> None:
        self.failure: str | None = None
        """Why the supervisor stopped the server; None if it did not."""
        self._server, self._stubs, self._control, self._verified = server, stubs, control, verified
        self._crashed, self._reworded, self._say, self._drain_s = crashed, reworded, say, drain_s
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._turn = threading.Lock()  # one load or unload at a time
        self._reloading: set[str] = set()
        self._reloads: dict[str, tuple[int, float]] = {}  # model -> reloads in a row, end of the last one

    def start(self, poll_s: float | None = None) -> None:
        """Starts watching; with `poll_s` also follows the repository."""
        self._in_background(self._watch)
        if poll_s is not None:
            self._in_background(self._follow, poll_s)

    def prepare_to_stop(self) -> None:
        """From now on an end of the server is not a failure."""
        self._stopping.set()

    def stop(self) -> None:
        """Waits for the threads, which end soon after the server."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _in_background(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]
        thread.start()

    def _follow(self, poll_s: float) -> None:
        while not self._stopping.wait(poll_s):
            with self._turn:
                for change in self._verified.changes():
                    reason = self._change(change.model, change.action)
                    if reason and not self._stopping.is_set():
                        self._verified.take_back(change, reason)

    def _change(self, model: str, action: Action) -> str | None:
        """Makes Triton load or unload a model; returns the reason if it refuses."""
        reason = self._control.change(model, action)
        if reason and KILLED in reason:  # not the model's fault: retry once
            reason = self._control.change(model, action)
        self._stubs.list_all()
        return self._reworded(reason) if reason else None

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S) and self._server.poll() is None:
            if self._crashed():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._server.wait(CRASH_S)
                    return
                self._give_up("tritonserver crashed but does not exit; see its log", at_once=True)
                return
            self._stubs.look()
            with contextlib.suppress(OSError):  # the server is too busy to answer: try at the next look
                for model, what in self._stubs.broken().items():
                    if model not in self._reloading:
                        self._reloading.add(model)
                        self._in_background(self._reload, model, what)

    def _reload(self, model: str, what: str) -> None:
        """Reloads a model; stops the server if that does not help for long."""
        began_s = time.monotonic()
        times, ended_s = self._reloads.get(model, (0, 0.0))
        times = times + 1 if began_s - ended_s < WITHIN_S else 1
        if times > MOST_TIMES:
            self._give_up(
                f"{model}: {what}; it was reloaded {MOST_TIMES} times and served for less than {WITHIN_S} s each time"
            )
            return
        self._say(f"died      {model}: {what}; reloading the model")
        with self._turn:
            left = self._stubs.leave(model)
            gone = not (self._verified.folder / model).exists()  # removed from the repository in the meantime
            reason = None if gone else self._change(model, "unload") or self._change(model, "load")
        self._reloads[model] = (times, time.monotonic())
        if reason:
            self._give_up(f"{model}: {what}, and Triton cannot reload it: {reason}")
        elif not gone and not self._stopping.is_set():
            self._say(f"          {model}: serves again after {time.monotonic() - began_s:.1f} s")
        self._reloading.discard(model)
        # Triton waits forever for a request that it lost with a process, and so keeps the model's other processes.
        self._stopping.wait(self._drain_s)
        if not self._stopping.is_set():
            end(left)

    def _give_up(self, why: str, *, at_once: bool = False) -> None:
        """Stops the server: gracefully, or `at_once` if it would not stop by itself."""
        if not self._stopping.is_set():
            self.failure = why
            self._server.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
