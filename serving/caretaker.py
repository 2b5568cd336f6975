"""What is done about a running server's models: new versions are loaded, and so is what lost one of its processes.

Contract: `start` looks after the server in the background until `stop`. With `poll_s` it follows the repository: what
Triton does not load is taken back out of its view, and what was served goes on. A model of which a process died
(`serving.stubs`) is unloaded, so that its requests are refused as not available in place of failing, and loaded anew.
Where that does not help, or not for long, the server is told to end and `failure` says why: from then on it is not
ready, and whoever supervises it starts it again. A server that has crashed is given `CRASH_S` to write where. Each of
these is a line for `say`.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from serving.control import Action, ModelControl
from serving.stubs import LOOK_S, StubWatch, end
from serving.triton_log import KILLED
from serving.view import ApprovedView

CRASH_S = 3.0
MOST_TIMES, WITHIN_S = 3, 60  # of one model, in a row; a supervisor waits between two starts, we do not


class Caretaker:
    """Looks after the models of a server that is up.

    `as_seen` turns Triton's words into those of the repository. No request takes longer than `drain_s`.
    """

    def __init__(
        self,
        server: subprocess.Popen[bytes],
        *,
        stubs: StubWatch,
        control: ModelControl,
        view: ApprovedView,
        crashed: Callable[[], bool],
        as_seen: Callable[[str], str],
        say: Callable[[str], None],
        drain_s: float,
    ) -> None:
        self.failure: str | None = None
        """Why the server was told to end."""
        self._server, self._stubs, self._control, self._view = server, stubs, control, view
        self._crashed, self._as_seen, self._say, self._drain_s = crashed, as_seen, say, drain_s
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._turn = threading.Lock()  # one change at a time of what Triton has loaded
        self._changing = ""
        self._mending: set[str] = set()
        self._mended: dict[str, tuple[int, float]] = {}  # model -> how often in a row, and when it was done

    def start(self, poll_s: float | None = None) -> None:
        """From now on; follows the repository, too, where there is a `poll_s`."""
        self._in_background(self._watch)
        if poll_s is not None:
            self._in_background(self._follow, poll_s)

    def prepare_to_stop(self) -> None:
        """From now on the server's end is meant: it is nobody's death."""
        self._stopping.set()

    def stop(self) -> None:
        """Returns once nothing is done any more; soon where the server has ended."""
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
                for change in self._view.changes():
                    reason = self._change(change.model, change.action)
                    if reason and not self._stopping.is_set():
                        self._view.take_back(change, reason)

    def _change(self, model: str, action: Action) -> str | None:
        """Has Triton load or unload a model; returns its reason where it did not."""
        self._changing = model
        with self._stubs.loading():
            reason = self._control.change(model, action)
            if reason and KILLED in reason:  # which says nothing about the model: it gets a second try
                reason = self._control.change(model, action)
        return self._as_seen(reason) if reason else None

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S) and self._server.poll() is None:
            if self._crashed():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._server.wait(CRASH_S)
                    return
                self._give_up("tritonserver crashed and does not end; its log says more", at_once=True)
                return
            self._stubs.look()
            if what := self._stubs.stuck():
                self._give_up(
                    f"{self._changing}: {what} while it loaded, and Triton waits for it for ever", at_once=True
                )
                return
            with contextlib.suppress(OSError):  # too busy to say what it serves: at the next look
                for model, what in self._stubs.broken().items():
                    if model not in self._mending:
                        self._mending.add(model)
                        self._in_background(self._mend, model, what)

    def _mend(self, model: str, what: str) -> None:
        """Has a model loaded anew; gives up where that does not help, or not for long."""
        began_s = time.monotonic()
        times, ended_s = self._mended.get(model, (0, 0.0))
        times = times + 1 if began_s - ended_s < WITHIN_S else 1
        if times > MOST_TIMES:
            self._give_up(f"{model}: {what}; it was loaded anew {MOST_TIMES} times, for less than {WITHIN_S} s each")
            return
        self._say(f"died      {model}: {what}; the model is loaded anew")
        with self._turn:
            left = self._stubs.leave(model)
            gone = not (self._view.folder / model).exists()  # it was taken out of the repository meanwhile
            reason = None if gone else self._change(model, "unload") or self._change(model, "load")
        self._mended[model] = (times, time.monotonic())
        if reason:
            self._give_up(f"{model}: {what}, and Triton does not load it anew: {reason}")
        elif not gone and not self._stopping.is_set():
            self._say(f"          {model}: serves again after {time.monotonic() - began_s:.1f} s")
        self._mending.discard(model)
        # Triton never lets go of a request that it lost with a process, nor of the model's other processes therefore.
        self._stopping.wait(self._drain_s)
        if not self._stopping.is_set():
            end(left)

    def _give_up(self, why: str, *, at_once: bool = False) -> None:
        """Ends the server: with time for its requests, or `at_once` where it would not end by itself."""
        if not self._stopping.is_set():
            self.failure = why
            self._server.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
