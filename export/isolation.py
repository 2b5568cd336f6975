"""A function in a process of its own: where native code crashes, that is an answer, not the end of the build.

Contract: `in_child` returns what the function returns and raises what it raises, `Crashed` where the child is ended by
a signal of its own making (ONNX Runtime, TensorRT and ModelOpt are native code, and a graph can bring them down), and
`InvalidMeasurement` where a signal came from outside: that says nothing of the graph (`Killed`: memory may have run
out). The child is a fork, without the threads of torch or of a session: call it before this process has such.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

from deepseek.spec import GateFailed, InvalidMeasurement

Result = TypeVar("Result")
# What a fault inside the process raises; any other signal came from outside, such as SIGKILL where memory ran out.
_OWN_FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


class Crashed(GateFailed):
    """Native code ended the process; `signal_name` says how."""

    def __init__(self, what: str, signal_name: str) -> None:
        super().__init__(f"{what} crashed ({signal_name})")
        self.what, self.signal_name = what, signal_name

    def __reduce__(self) -> tuple[type[Crashed], tuple[str, str]]:
        return Crashed, (self.what, self.signal_name)


class Killed(InvalidMeasurement):
    """The process was ended by SIGKILL, as Linux does where memory runs out."""


def in_child(what: str, function: Callable[[], Result]) -> Result:
    """Runs `function` in a forked child; `what` names it where it crashes."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent, (read, write) = os.getpid(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of forks beside threads: see the contract
        child = os.fork()
    if child == 0:
        os.close(read)
        faulthandler.disable()  # a crash is told in one line, by the parent
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)  # it does not outlive us
        if os.getppid() != parent:  # killed before that was asked for
            os._exit(1)
        _answer(write, function)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        data = answer.read()
    _, status = os.waitpid(child, 0)
    if data and os.waitstatus_to_exitcode(status) == 0:
        succeeded, value = pickle.loads(data)
        if succeeded:
            return value
        raise value
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        raise RuntimeError(f"{what}: its process ended with {code} and no answer")
    name = signal.Signals(-code).name
    if -code in _OWN_FAULTS:
        raise Crashed(what, name)
    raise (Killed if -code == signal.SIGKILL else InvalidMeasurement)(
        f"{what} was ended from outside ({name}); of SIGKILL the kernel's log says whether memory ran out"
    )


def _answer(write: int, function: Callable[[], object]) -> None:
    """The child's side: sends what became of the function and ends, with none of the parent's clean-up."""
    try:
        outcome: tuple[bool, object] = (True, function())
    except BaseException as error:
        if not isinstance(error, GateFailed | KeyboardInterrupt):
            error.add_note(f"in a child process:\n{traceback.format_exc()}")
        outcome = (False, error)
    try:
        data = pickle.dumps(outcome)
    except Exception as error:  # an exception type that holds what cannot be sent
        data = pickle.dumps((False, RuntimeError(f"{outcome[1]!r} cannot be sent on: {error}")))
    with os.fdopen(write, "wb") as answer:
        answer.write(data)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
