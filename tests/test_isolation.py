"""A function in a child process: its value, its errors, and a crash of native code as an answer."""

from __future__ import annotations

import os
import signal

import pytest

from deepseek.spec import InputError, InvalidMeasurement
from export.isolation import Crashed, in_child


def raises(error: Exception) -> None:
    """As an expression."""
    raise error


def ends_by(how: signal.Signals) -> None:
    """As a fault in native code does: no clean-up, no answer."""
    os.kill(os.getpid(), how)


def test_a_value_comes_back_and_the_work_was_done_elsewhere() -> None:
    value, process = in_child("work", lambda: ({"rows": [1.5] * 100_000}, os.getpid()))
    assert len(value["rows"]) == 100_000
    assert process != os.getpid()


def test_an_error_is_raised_here_as_it_was_there() -> None:
    with pytest.raises(InputError, match="no such file"):
        in_child("work", lambda: raises(InputError("no such file")))


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        in_child("work", lambda: 1 // 0)
    assert "test_isolation.py" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT], ids=lambda how: how.name)
def test_a_crash_is_one_line_that_a_caller_can_tell_from_other_failures(how: signal.Signals) -> None:
    with pytest.raises(Crashed, match=rf"^TensorRT crashed \({how.name}\)$"):
        in_child("TensorRT", lambda: ends_by(how))


def test_what_was_killed_from_outside_has_not_crashed() -> None:
    with pytest.raises(InvalidMeasurement, match=r"work was ended from outside \(SIGKILL\); .* whether memory ran out"):
        in_child("work", lambda: ends_by(signal.SIGKILL))


def test_a_crash_inside_a_child_of_a_child_reaches_the_first() -> None:
    with pytest.raises(Crashed, match="inner crashed"):
        in_child("outer", lambda: in_child("inner", lambda: ends_by(signal.SIGSEGV)))
