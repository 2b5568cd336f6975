"""Other rooms' commands, run as a user runs them, and a load on a server while its version changes.

Contract: a command's exit code becomes the error that it stands for; what it printed is its answer. Commands end with
this process, however that ends.

Example:
    found = ask("loadtests.slo", "--run", folder, "--json").checked()
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deepseek.spec import GateFailed, InputError, InvalidMeasurement
from deepseek.spec.children import ends_with_us

_ROOT = str(Path(__file__).resolve().parent.parent)
_ERRORS: dict[int, type[Exception]] = {1: GateFailed, 2: InputError, 3: InvalidMeasurement}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command said."""

    name: str
    code: int
    data: Any
    """Its JSON; None where it printed none."""
    reason: str
    """The last line of its errors."""

    def checked(self, *allowed: int) -> Any:
        """The data; where the exit code is neither 0 nor allowed, the error that it stands for."""
        if self.code == 0 and self.data is None:
            raise InvalidMeasurement(
                f"{self.name} ended with status 0, but what it printed is no JSON: something that it runs prints, too; "
                "let that print to standard error"
            )
        if self.code == 0 or self.code in allowed:
            return self.data
        raise error_of(self.code, self.name, self.reason)


def error_of(code: int, name: str, reason: str) -> Exception:
    """The error that an exit code stands for; one that none of ours has is a failure of the command itself."""
    known = _ERRORS.get(code)
    return known(reason) if known and reason else InvalidMeasurement(f"{name} ended with status {code}: {reason}")


def ask(name: str, *flags: str, build: str | None = None) -> Answer:
    """Runs `python -m name`, which prints JSON; in the build folder `build` where it is given, else in ours."""
    run = subprocess.run(
        [sys.executable, "-m", name, *flags],
        capture_output=True,
        text=True,
        env=_environment(build),
        preexec_fn=ends_with_us(),
    )
    try:
        data = json.loads(run.stdout)
    except ValueError:
        data = None
    return Answer(name=name, code=run.returncode, data=data, reason=_last_line(run.stderr))


class SteadyLoad:
    """`loadtests.steady` around a change: `begin`, `change`, then what is to be done, then `result`.

    What it sends lies in the build folder `build`, where it is given, else in ours.
    """

    def __init__(self, *flags: str, build: str | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtests.steady", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # a line or a traceback: less than a pipe holds
            text=True,
            env=_environment(build),
            preexec_fn=ends_with_us(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate()

    def begin(self) -> int | None:
        """Waits until the load runs; the version that the server gives."""
        return self._read()["version"]

    def change(self) -> None:
        """What follows is the change."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Waits for the end of the load; its figures."""
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        _, errors = self._process.communicate()
        raise error_of(self._process.returncode, "loadtests.steady", _last_line(errors))


def _environment(build: str | None) -> dict[str, str]:
    """In which our own modules are found from anywhere."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))}
    return found if build is None else {**found, "BUILD": build}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""
