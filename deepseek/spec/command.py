"""What every command shares: the errors that become exit codes, the parser of its flags, and the run itself.

Exit codes: 0 holds, 1 a gate failed, 2 the user's input is wrong, 3 the measurement is invalid.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn

# What is wrong with a place that the user named, not with the program, and what to do about it.
_PLACES = "(BUILD=, REPOSITORY=, CACHE=)"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PLACE_ERRORS = {
    **dict.fromkeys(_DISK, f"make room, or name another disk {_PLACES}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"make it yours, or name another place {_PLACES}"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), f"name another place {_PLACES}"),
}


class InputError(ValueError):
    """The user's input is wrong: one line that says what, seen, allowed and what to do. Exit 2."""


class GateFailed(Exception):
    """A gate did not hold: accuracy, parity, SLO. Exit 1."""


class InvalidMeasurement(Exception):
    """Nothing can be concluded from what was measured. Exit 3."""


class Parser(argparse.ArgumentParser):
    """argparse with help from the module's docstring and errors in one line, exit code 2."""

    def __init__(self, doc: str | None, **kwargs: Any) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and --models, as every command that works on one model takes them."""
    parser.add_argument("--model", default="recommender", help="name of the model folder (default: %(default)s)")
    parser.add_argument("--models", default="models", help="folder of model folders (default: %(default)s)")


@contextlib.contextmanager
def kept_for_json(as_json: bool) -> Iterator[None]:
    """With --json, standard output is the result's alone: what a model's own code prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def quiet_interrupts() -> None:
    """Ctrl-C is one line from here on: also while a command still imports what it needs, before `run_command`."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _say("interrupted", 130)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and ends the process with the exit code that its outcome has."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        code = _say(error, 2)
    except GateFailed as error:
        code = _say(error, 1)
    except InvalidMeasurement as error:
        code = _say(error, 3)
    except KeyboardInterrupt:
        code = _say("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        named = error.filename or error.errno in _DISK  # standard output is a place without a name
        if error.errno not in PLACE_ERRORS or not named:
            raise
        where = error.filename2 or error.filename or "the folder written to"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 what it still holds may be what did not fit
        code = _say(f"{where}: {error.strerror}; {PLACE_ERRORS[error.errno]}", 2)
    sys.exit(code)


def _say(message: object, code: int) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code
