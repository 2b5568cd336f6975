"""Copies and reads Triton's log: why a model did not load, and why the server ended, each in one line."""

import contextlib
import re
import signal
import sys
import threading
from pathlib import Path
from typing import IO

# Triton writes this before its stack trace, which takes a minute if the cores are busy.
CRASHES = (signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)
CRASHED = re.compile(rb"^Signal \((?:%s)\) received" % b"|".join(b"%d" % each for each in CRASHES), re.MULTILINE)
# What Triton says when it notices that a process of the Python backend was killed.
KILLED = "is not healthy"


def load_failures(log_path: Path) -> str:
    """Triton's reason for each model that did not load, in one line; empty if it gave none."""
    log = log_path.read_text(errors="replace")
    line_end = r'"?\n(?=[IWE]\d{4}|\+|$)'
    found = re.finditer(rf"(?:failed to (?:load|stat|poll)|Poll failed for)\b(.*?){line_end}", log, re.DOTALL)
    # A Python model's own reason, without its stack trace.
    reasons = {" ".join(match[1].partition(r"\n\nAt:")[0].split()) for match in found}
    syntax = re.findall(r"Error parsing text-format [\w.]+: (.*)", log)  # errors in a config.pbtxt
    # Some lines only name the model: drop them if another line has the reason.
    told = [each for each in reasons if not any(other != each and other.startswith(each) for other in reasons)]
    failures = [f"failed to load {reason}" for reason in sorted(told) if "all models" not in reason]
    return "; ".join([*failures, *syntax])


class CrashDetector:
    def __init__(self, log_path: Path) -> None:
        self._log_path, self._seen, self._read = log_path, False, 0

    def read(self, line: bytes) -> None:
        """Reads a line that is not written to the file."""
        self._seen = self._seen or CRASHED.match(line) is not None

    def __call__(self) -> bool:
        """Reads new lines of the file; True once the log shows a crash."""
        with contextlib.suppress(OSError), self._log_path.open("rb") as log:
            log.seek(self._read)
            added = log.read()
            self._read += added.rfind(b"\n") + 1  # an unfinished line is read again
            self._seen = self._seen or CRASHED.search(added) is not None
        return self._seen


def copy_log(lines: IO[bytes], log_path: Path, crashed: CrashDetector, ready: threading.Event) -> None:
    """Copies the log to standard output, and to the file only until the server is up, so that it does not grow."""
    with lines, log_path.open("ab") as log:
        for line in lines:
            crashed.read(line)
            with contextlib.suppress(OSError):  # the reader has gone: the server keeps running
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            if not ready.is_set():
                log.write(line)
                log.flush()


def failure(log_path: Path, status: int) -> str:
    """Why the server ended before it was ready, and what to do."""
    reason = load_failures(log_path)
    if reason:
        return f"{reason}; rebuild the model with make engine, or move its folder out of the repository"
    lines = log_path.read_text(errors="replace").strip().splitlines()
    errors = [
        re.sub(r"^\[libprotobuf ERROR [^]]*\] ", "", line)
        for line in lines
        if re.match(r"error|\[libprotobuf ERROR", line)
    ]
    return f"tritonserver {how_it_ended(status)}: {'; '.join(errors) or 'no reason given'} (log: {log_path})"


def how_it_ended(status: int) -> str:
    """An exit status in words; negative ones are signals."""
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (the kernel does this if memory runs out)"
    if status < 0:
        names = {each.value: each.name for each in signal.Signals}  # not all signals have a name
        return f"was ended by {names.get(-status, f'signal {-status}')}"
    return f"ended with status {status}"
