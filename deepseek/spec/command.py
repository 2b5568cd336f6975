"""Shared by every command: errors with exit codes, and the function that runs a command."""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    PASS = 0
    GATE_FAILED = 1
    """Accuracy, parity or the SLO failed."""
    BAD_INPUT = 2
    """One line says what is wrong, the value seen and what is allowed."""
    INVALID = 3
    """The measurement is invalid or inconclusive."""
    INTERRUPTED = 130


# OS errors caused by a path that the user chose, and what to do about each.
_PLACES = "(BUILD=, REPOSITORY=, MODELS=, CACHE=, ENV_FILE=, TMPDIR=)"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PLACE_ERRORS = {
    **dict.fromkeys(_DISK, f"free some space, or use another disk {_PLACES}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"change its owner, or use another path {_PLACES}"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), f"use another path {_PLACES}"),
}


class InputError(ValueError):
    """The user's input is wrong: one line says what is wrong, the value seen, what is allowed and what to do."""

    exit_code = ExitCode.BAD_INPUT


class GateFailed(Exception):
    """A gate failed: accuracy, parity or SLO."""

    exit_code = ExitCode.GATE_FAILED


class InvalidMeasurement(Exception):
    """The measurement is invalid or inconclusive."""

    exit_code = ExitCode.INVALID


@contextlib.contextmanager
def kept_for_json(as_json: bool) -> Iterator[None]:
    """With --json, only the result goes to standard output; whatever the model's code prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Also what libraries and processes write to file descriptor 1 goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def one_line(message: object) -> str:
    """Another library's message in one line without terminal codes: the beginning and the end of a long one."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(message)).split())
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-200:]}"


def end_at_sigterm() -> None:
    """Makes SIGTERM end the command as Ctrl-C does. A second one is ignored: make and timeout send it twice."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN, which new processes would inherit
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def exit_code(main: Callable[[], int | None]) -> int:
    """Runs a command, prints an error in one line if there is one, and returns the exit code."""
    try:
        code = main() or ExitCode.PASS
        sys.stdout.flush()
    except (InputError, GateFailed, InvalidMeasurement) as error:
        code = _say(error, error.exit_code)
    except KeyboardInterrupt:
        code = _say("interrupted", ExitCode.INTERRUPTED)
    except OSError as error:
        named = error.filename or error.errno in _DISK  # standard output has no file name
        if error.errno not in PLACE_ERRORS or not named:
            raise
        where = error.filename2 or error.filename or "the folder written to"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 its buffer may be what did not fit on the disk
        code = _say(f"{where}: {error.strerror}; {PLACE_ERRORS[error.errno]}", ExitCode.BAD_INPUT)
    return code


def _say(message: object, code: int) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code
