"""Runs other rooms' commands as a user would, and a load on a server while its version changes.

Contract: a command's JSON becomes the result and its exit code the matching error. Commands end with this process, even
if it is killed.
"""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from deepseek.spec import GateFailed, InputError, InvalidMeasurement
from deepseek.spec.processes.children import ends_with_us, last_line, our_environment

SWITCH_OVER_LOAD = "switch-over-load"
_ERRORS: dict[int, type[Exception]] = {1: GateFailed, 2: InputError, 3: InvalidMeasurement}


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    name: str
    code: int
    data: Any
    """Its JSON; None if it printed none."""
    reason: str
    """The last line of its standard error."""

    def checked(self, *allowed: int) -> Any:
        """Returns the data, or raises the error for an exit code that is neither 0 nor allowed."""
        if self.code == 0 and self.data is None:
            raise InvalidMeasurement(
                f"{self.name} ended with status 0, but its output is not JSON: code that it runs prints to standard "
                "output; make that print to standard error"
            )
        if self.code == 0 or self.code in allowed:
            return self.data
        raise error_of(self.code, self.name, self.reason)


def error_of(code: int, name: str, reason: str) -> Exception:
    """The error for an exit code; InvalidMeasurement for unknown codes: the command itself failed."""
    known = _ERRORS.get(code)
    return known(reason) if known and reason else InvalidMeasurement(f"{name} ended with status {code}: {reason}")


def run_json(name: str, *flags: str, build: str | None = None) -> CommandResult:
    """Runs `deepseek <name>`, which prints JSON; `build` is its build folder (default: this process's)."""
    run = subprocess.run(
        [sys.executable, "-m", "cli", name, *flags],
        capture_output=True,
        text=True,
        env=_environment(build),
        preexec_fn=ends_with_us(),
    )
    try:
        data = json.loads(run.stdout)
    except ValueError:
        data = None
    return CommandResult(name=name, code=run.returncode, data=data, reason=last_line(run.stderr))


class SteadyLoad:
    """`deepseek switch-over-load` around a change: call `begin`, `change`, make the change, then call `result`.

    `build` is the build folder with the inputs that it sends (default: this process's).
    """

    def __init__(self, *flags: str, build: str | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cli", SWITCH_OVER_LOAD, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # a line or a traceback: less than a pipe holds
            text=True,
            env=_environment(build),
            preexec_fn=ends_with_us(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate()

    def begin(self) -> None:
        """Waits until the load runs."""
        self._read()

    def change(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the load has ended: `result` says why
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        _, errors = self._process.communicate()
        raise error_of(self._process.returncode, SWITCH_OVER_LOAD, last_line(errors))


def _environment(build: str | None) -> dict[str, str]:
    return our_environment() if build is None else our_environment(DEEPSEEK_BUILD=build)
