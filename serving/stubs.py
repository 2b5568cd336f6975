"""The processes of Triton's Python backend: which of them died, and whose they were.

Triton runs each instance of a Python model in a process of its own, a stub. Triton 2.51 does not miss one that is
killed: its model stays ready while that instance's requests fail (docs/triton.md). A death is told from an end that is
Triton's own doing like this:

- Triton waits for each stub that it ends. One that nobody waited for, a zombie at two looks in a row, died.
- A model is broken where Triton calls a version of it ready and, after that, fewer of its stubs live than it has
  instances. Triton calls a version ready once all of them run, and ends the first of them at least a second after it
  has stopped calling it so: what is loaded, replaced or unloaded meanwhile is not taken for broken.
- A load is stuck where a stub that began with it has been a zombie for longer than Triton takes to notice: for a stub's
  first word Triton waits without a limit.

Contract: Linux alone; reads /proc of one server's children, and asks the server only once something died.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.control import ModelControl
from serving.triton_log import how_it_ended

LOOK_S = 0.5  # between two looks at the stubs that are known
LIST_S = 5.0  # between two looks for others, while none of these died and no load is known of
STUCK_S = 6.0  # Triton asks for a sign of life each second, and takes two more to be sure
# Fields of /proc/<pid>/stat behind the name: proc(5) counts them as 3, 22 and 52.
_STATE, _STARTED, _STATUS = 0, 19, 49
Left = dict[int, str]  # process id -> when it started, so that no other is taken for it


@dataclass(frozen=True, kw_only=True)
class Stub:
    """One instance's process."""

    model: str
    version: int
    instance: str

    @classmethod
    def of(cls, arguments: list[str], models: Path) -> Stub | None:
        """Whose a process is, by its command line; None where it is no stub of a model below `models`."""
        try:
            model, version = Path(arguments[1]).relative_to(models).parts[:2]
            number = re.compile(rf"{re.escape(model)}_\d+_\d+")  # group and number, where the group has no name
            instance = next((each for each in arguments if number.fullmatch(each)), model)
            return cls(model=model, version=int(version), instance=instance)
        except (IndexError, ValueError):
            return None


@dataclass(frozen=True, kw_only=True)
class Death:
    """A process of the server's that ended by itself."""

    pid: int
    stub: Stub | None
    """None: it died before anybody looked."""
    how: str
    seen_s: float

    def __str__(self) -> str:
        return f"process {self.pid}{f' of {self.stub.instance}' if self.stub else ''} {self.how}"


class StubWatch:
    """Looks after the stubs of the server with the process id `server`, whose models lie below `models`."""

    def __init__(self, server: int, models: Path, control: ModelControl) -> None:
        self._server, self._models, self._control = server, models, control
        self._stubs: dict[int, Stub] = {}  # all that were seen alive and are still there
        self._living: list[Stub] = []
        self._deaths: dict[int, Death] = {}
        self._before: set[int] | None = None  # the processes that were there when a load began
        self._left: Left = {}
        self._listed_s = 0.0
        self._lock = threading.Lock()

    def look(self) -> None:
        """Reads what lives and what died; to be called each LOOK_S."""
        now_s = time.monotonic()
        # Triton has a hundred threads and more, each with a list of what it started: they are not read twice a second.
        quiet = not self._deaths and self._before is None and all(map(_lives, self._stubs))
        if not quiet or now_s - self._listed_s >= LIST_S:
            with self._lock:
                self._list(now_s)

    def _list(self, now_s: float) -> None:
        living: dict[int, Stub] = {}
        deaths: dict[int, Death] = {}
        for pid in _children(self._server):
            seen = _seen(pid)
            if seen is None or _is(pid, self._left):
                continue
            state, status, arguments = seen
            if state in "ZX":
                known = self._deaths.get(pid)
                deaths[pid] = known or Death(
                    pid=pid,
                    stub=self._stubs.get(pid),
                    how=how_it_ended(os.waitstatus_to_exitcode(status)),
                    seen_s=now_s,
                )
            elif stub := Stub.of(arguments, self._models):
                living[pid] = stub
        self._listed_s = now_s
        self._deaths = deaths
        self._living = list(living.values())
        self._stubs = {pid: stub for pid, stub in self._stubs.items() if pid in deaths} | living

    def broken(self) -> dict[str, str]:
        """Each model that is served by fewer processes than it has instances, and what happened to them.

        Raises OSError where the server does not say what it serves.
        """
        if not self._old(LOOK_S / 2):
            return {}
        wanted = {(model, version): self._control.instances(model, version) for model, version in self._control.ready()}
        self.look()  # only now: what is still called ready has all of its processes for a second more
        living = Counter((stub.model, stub.version) for stub in self._living)
        short = {model for (model, version), count in wanted.items() if living[model, version] < count}
        return {model: self._of(model) for model in short}

    def leave(self, model: str) -> Left:
        """Counts all processes of a model as no matter any more, and returns them: it is about to be loaded anew."""
        with self._lock:
            own = [pid for pid, stub in self._stubs.items() if stub.model == model]
            own += [pid for pid, death in self._deaths.items() if death.stub is None]
            left = {pid: fields[_STARTED] for pid in own if (fields := _stat(pid))}
            self._left = {pid: when for pid, when in self._left.items() if _is(pid, self._left)} | left
        return left

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around a load of a model: `stuck` tells then whether it will never end."""
        self._before = set(_children(self._server))
        try:
            yield
        finally:
            with self._lock:
                self._list(time.monotonic())  # so that the new ones are known by name
            self._before = None

    def stuck(self) -> str | None:
        """What happened to a process that Triton waits for in vain, in the load that is under way."""
        before = self._before
        if before is None:
            return None
        return next((str(death) for death in self._old(STUCK_S) if death.pid not in before), None)

    def _of(self, model: str) -> str:
        """What happened to a model's processes: those that are known to be its, or else may be."""
        deaths = self._old(0)
        own = [death for death in deaths if death.stub and death.stub.model == model]
        return ", ".join(map(str, own or [death for death in deaths if death.stub is None])) or "its processes ended"

    def _old(self, age_s: float) -> list[Death]:
        """The deaths that were first seen so long ago."""
        return [death for death in self._deaths.values() if time.monotonic() - death.seen_s >= age_s]


def _children(parent: int) -> Iterator[int]:
    """Process ids below a process, zombies included; each belongs to the thread that started it."""
    with contextlib.suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{parent}/task"):
            with contextlib.suppress(OSError):  # the thread has
                yield from map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())


def end(left: Left) -> None:
    """Kills what still lives of them."""
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
    """State, exit status and command line of a process; None where it has gone."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    fields = _stat(pid)
    return (fields[_STATE], int(fields[_STATUS]), [os.fsdecode(each) for each in arguments]) if fields else None


def _stat(pid: int) -> list[str] | None:
    """The fields of its stat behind the name, which may hold anything."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat[stat.rindex(")") + 2 :].split()
