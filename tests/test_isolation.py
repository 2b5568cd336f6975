"""Functions in a child process: values, errors, and crashes of native code."""

from __future__ import annotations

import os
import signal

import pytest

from deepseek.spec import InputError, InvalidMeasurement
from export.runtimes.isolation import Crashed, in_child


def raises(error: Exception) -> None:
    """Raises an exception, in an expression."""
    raise error


def ends_by(how: signal.Signals) -> None:
    """Ends the process like a fault in native code: no clean-up, no answer."""
    os.kill(os.getpid(), how)


def test_a_value_is_returned_from_another_process() -> None:
    value, process = in_child("work", lambda: ({"rows": [1.5] * 100_000}, os.getpid()))
    assert len(value["rows"]) == 100_000
    assert process != os.getpid()


def test_an_error_in_the_child_is_raised_in_the_parent() -> None:
    with pytest.raises(InputError, match="no such file"):
        in_child("work", lambda: raises(InputError("no such file")))


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        in_child("work", lambda: 1 // 0)
    assert "test_isolation.py" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT], ids=lambda how: how.name)
def test_a_crash_is_one_line_and_has_its_own_type(how: signal.Signals) -> None:
    with pytest.raises(Crashed, match=rf"^TensorRT crashed \({how.name}\)$"):
        in_child("TensorRT", lambda: ends_by(how))


def test_a_process_killed_from_outside_has_not_crashed() -> None:
    with pytest.raises(
        InvalidMeasurement, match=r"work was killed from outside \(SIGKILL\); .* whether memory ran out"
    ):
        in_child("work", lambda: ends_by(signal.SIGKILL))


def test_a_crash_in_a_grandchild_reaches_the_parent() -> None:
    with pytest.raises(Crashed, match="inner crashed"):
        in_child("outer", lambda: in_child("inner", lambda: ends_by(signal.SIGSEGV)))
