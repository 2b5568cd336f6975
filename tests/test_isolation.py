"""Functions in a child process: values, errors, and crashes of native code."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import GateFailed, InputError, InvalidMeasurement
from export.artifact import refusal
from export.runtimes.isolation import Crashed, in_child, made_alone


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


class TwoPartError(Exception):
    """Cannot be rebuilt from its `args`, as pickle does."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node}: {reason}")


def test_an_error_that_cannot_be_rebuilt_keeps_its_text_and_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"TwoPartError.+Conv_1: no kernel") as caught:
        in_child("work", lambda: raises(TwoPartError("Conv_1", "no kernel")))
    assert "test_isolation.py" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT], ids=lambda how: how.name)
def test_a_crash_is_one_line_and_has_its_own_type(how: signal.Signals) -> None:
    with pytest.raises(Crashed, match=rf"^TensorRT crashed \({how.name}\)$"):
        in_child("TensorRT", lambda: ends_by(how))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: raises(GateFailed("no layer to quantize")), "no layer to quantize"),
        (lambda: ends_by(signal.SIGSEGV), "int8 crashed (SIGSEGV)"),
        (lambda: ends_by(signal.SIGKILL), "whether memory ran out; to try again: rm {path}"),
    ],
    ids=["gate", "crash", "killed"],
)
def test_only_the_failure_of_a_candidate_is_recorded_in_place_of_its_artifact(
    make: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises((GateFailed, InvalidMeasurement)):
        made_alone("int8", path, make, candidate=False)
    assert not path.exists()
    assert made_alone("int8", path, make, candidate=True)["refused"] == refusal(path)
    assert str(refusal(path)).endswith(reason.format(path=path))
