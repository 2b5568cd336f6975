"""Monitors the processes of Triton's Python backend: which died, and which model they ran.

Triton runs each instance of a Python model in its own process, a stub. Triton 2.51 does not notice when a stub is
killed: its model stays ready while that instance's requests fail (docs/triton.md). This module distinguishes a death
from a stub that Triton ended:

- Triton waits for each stub that it ends. So a stub that is a zombie at two looks in a row died by itself.
- A model is broken if Triton calls a version of it ready and, after that, fewer of its stubs live than it has
  instances. Triton calls a version ready once all its stubs run, and ends the first one at least a second after it
  stopped calling the version ready. So a model that is being loaded, replaced or unloaded does not count as broken.

Contract: Linux only; reads /proc of one server's children, and queries the server only after a death.
"""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.embedded.model_control import ModelControl
from serving.embedded.triton_log import how_it_ended

LOOK_S = 0.5  # between two looks at the known stubs
LIST_S = 5.0  # between two looks for new stubs, while no known one died
# Fields of /proc/<pid>/stat after the name: numbers 3, 22 and 52 in proc(5).
_STATE, _STARTED, _STATUS = 0, 19, 49
Left = dict[int, str]  # process id -> start time, which tells a reused id apart


@dataclass(frozen=True, kw_only=True)
class StubProcess:
    model: str
    version: int

    @classmethod
    def of(cls, arguments: list[str], models: Path) -> "StubProcess | None":
        """Parses a stub's command line; None if it is not a stub of a model below `models`."""
        try:
            model, version = Path(arguments[1]).relative_to(models).parts[:2]
            return cls(model=model, version=int(version))
        except (IndexError, ValueError):
            return None


@dataclass(frozen=True, kw_only=True)
class StubDeath:
    """A process of the server that ended by itself."""

    pid: int
    stub: StubProcess | None
    """None if it died before the first look."""
    how: str
    seen_s: float

    def __str__(self) -> str:
        return f"process {self.pid} {self.how}"


class StubMonitor:
    """Watches the stubs of the server with process id `server` and models below `models`."""

    def __init__(self, server: int, models: Path, control: ModelControl) -> None:
        self._server, self._models, self._control = server, models, control
        self._stubs: dict[int, StubProcess] = {}  # seen alive, not yet reaped
        self._living: list[StubProcess] = []
        self._deaths: dict[int, StubDeath] = {}
        self._left: Left = {}
        self._listed_s = 0.0
        self._lock = threading.Lock()

    def look(self) -> None:
        """Updates which stubs live and which died; call it every LOOK_S."""
        # Triton has over a hundred threads, each with its own list of children: too many to read twice a second.
        quiet = not self._deaths and all(map(_lives, self._stubs))
        if not quiet or time.monotonic() - self._listed_s >= LIST_S:
            self.list_all()

    def list_all(self) -> None:
        """Looks for all stubs; call it after a load too, so that new stubs are known by name."""
        with self._lock:
            self._list()

    def _list(self) -> None:
        living: dict[int, StubProcess] = {}
        deaths: dict[int, StubDeath] = {}
        for pid in _children(self._server):
            seen = _seen(pid)
            if seen is None or _is(pid, self._left):
                continue
            state, status, arguments = seen
            if state in "ZX":
                known = self._deaths.get(pid)
                deaths[pid] = known or StubDeath(
                    pid=pid,
                    stub=self._stubs.get(pid),
                    how=how_it_ended(os.waitstatus_to_exitcode(status)),
                    seen_s=time.monotonic(),
                )
            elif stub := StubProcess.of(arguments, self._models):
                living[pid] = stub
        self._listed_s = time.monotonic()
        self._deaths = deaths
        self._living = list(living.values())
        self._stubs = {pid: stub for pid, stub in self._stubs.items() if pid in deaths} | living

    def broken(self) -> dict[str, str]:
        """Models that run in fewer processes than they have instances, each with what happened to the processes.

        Raises OSError if the server does not answer what it serves.
        """
        if not any(time.monotonic() - death.seen_s >= LOOK_S / 2 for death in self._deaths.values()):
            return {}
        wanted = {(model, version): self._control.instances(model, version) for model, version in self._control.ready()}
        self.look()  # after the query: a version that was ready has all its processes for a second more
        living = Counter((stub.model, stub.version) for stub in self._living)
        short = {model for (model, version), count in wanted.items() if living[model, version] < count}
        return {model: self._of(model) for model in short}

    def leave(self, model: str) -> Left:
        """Ignores all processes of a model that will be reloaded, and returns them."""
        with self._lock:
            own = [pid for pid, stub in self._stubs.items() if stub.model == model]
            own += [pid for pid, death in self._deaths.items() if death.stub is None]
            left = {pid: fields[_STARTED] for pid in own if (fields := _stat(pid))}
            self._left = {pid: when for pid, when in self._left.items() if _is(pid, self._left)} | left
        return left

    def _of(self, model: str) -> str:
        """Describes the deaths of a model's processes: those known to be its own, else those that could be."""
        deaths = list(self._deaths.values())
        own = [death for death in deaths if death.stub and death.stub.model == model]
        return ", ".join(map(str, own or [death for death in deaths if death.stub is None])) or "its processes ended"


def _children(parent: int) -> Iterator[int]:
    """Ids of a process's children, zombies included; Linux lists them by the thread that started them."""
    with contextlib.suppress(OSError):  # the process has ended
        for thread in os.listdir(f"/proc/{parent}/task"):
            with contextlib.suppress(OSError):  # the thread has ended
                yield from map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())


def end(left: Left) -> None:
    for pid in left:
        if _is(pid, left) and _lives(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is(pid: int, left: Left) -> bool:
    fields = _stat(pid) if pid in left else None
    return fields is not None and fields[_STARTED] == left[pid]


def _lives(pid: int) -> bool:
    return (_stat(pid) or "Z")[_STATE] not in "ZX"


def _seen(pid: int) -> tuple[str, int, list[str]] | None:
    """State, exit status and command line of a process; None if it is gone."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    fields = _stat(pid)
    return (fields[_STATE], int(fields[_STATUS]), [os.fsdecode(each) for each in arguments]) if fields else None


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat after the name, which may contain any character."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat[stat.rindex(")") + 2 :].split()
