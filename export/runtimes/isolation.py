"""Runs a function in a child process, so that a crash of native code does not end the build.

Contract: `in_child` returns what the function returns and raises what it raises. It raises `Crashed` if a fault in the
child ends it (a graph can crash ONNX Runtime, TensorRT and ModelOpt, which are native code). It raises
`InvalidMeasurement` if a signal came from outside, which says nothing about the graph (`Killed`: memory may have run
out). `made_alone` is for artifacts of one of several candidates: a failure is recorded and the build continues. The
child is a fork, without the threads of torch or of a session: call it before this process has any.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from deepseek.spec import GateFailed, InvalidMeasurement
from deepseek.spec.processes.children import end_with
from export.artifact import refuse

Result = TypeVar("Result")
# Signals of a fault inside the process; any other came from outside, such as SIGKILL if memory ran out.
_OWN_FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
FORK = multiprocessing.get_context("fork")


class Crashed(GateFailed):
    """Native code ended the process."""


class Killed(InvalidMeasurement):
    """SIGKILL ended the process, as Linux does if memory runs out."""


def in_child(what: str, function: Callable[[], Result]) -> Result:
    """Runs `function` in a forked child; `what` names it in errors."""
    answers, answer = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_answer, args=(answer, function, os.getpid()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about forks beside threads
        child.start()
    answer.close()
    try:
        succeeded, value = answers.recv()
    except (EOFError, OSError):
        child.join()
        raise _without_answer(what, child.exitcode or 0) from None
    child.join()
    if succeeded:
        return value
    raise value


def made_alone(what: str, artifact: Path, make: Callable[[], dict[str, Any]], *, candidate: bool) -> dict[str, Any]:
    """The result of `make` in a child process; if a candidate fails, its refusal is recorded in place of `artifact`."""
    try:
        return in_child(what, make)
    except (GateFailed, Killed) as error:
        if not candidate:
            raise
        reason = f"{error}; to try again: rm {artifact}" if isinstance(error, Killed) else str(error)
        refuse(artifact, reason)
        return {"path": str(artifact), "refused": reason}


def _without_answer(what: str, code: int) -> Exception:
    """The exception for a child that sent nothing."""
    if code >= 0:
        return RuntimeError(f"{what}: its process ended with exit code {code} and no answer")
    name = signal.Signals(-code).name
    if -code in _OWN_FAULTS:
        return Crashed(f"{what} crashed ({name})")
    return (Killed if -code == signal.SIGKILL else InvalidMeasurement)(
        f"{what} was killed from outside ({name}); for SIGKILL, see in the kernel's log whether memory ran out"
    )


def _answer(answer: Connection, function: Callable[[], object], parent: int) -> None:
    """The child's side: sends the function's result or exception."""
    faulthandler.disable()  # the parent reports a crash in one line
    end_with(parent)
    try:
        outcome: tuple[bool, object] = (True, function())
    except BaseException as error:
        sent = _sendable(error)
        if not isinstance(sent, GateFailed | KeyboardInterrupt):
            sent.add_note(f"in a child process:\n{traceback.format_exc()}")
        outcome = (False, sent)
    answer.send(outcome)


def _sendable(error: BaseException) -> BaseException:
    """The exception itself if the parent can rebuild it; pickle calls its class with `args` alone."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error
