"""Triton's own log: why a model did not load, and why the server ended, each in one line."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

# What Triton says before it writes where it crashed, which takes it a minute where the cores are busy.
CRASHED = re.compile(rb"^Signal \((?:4|6|7|8|11)\) received", re.MULTILINE)
# What Triton says of a process of the Python backend that was killed, where it notices.
KILLED = "is not healthy"


def load_failures(log_path: Path) -> str:
    """Triton's own reason for each model that did not load, in one line."""
    log = log_path.read_text(errors="replace")
    line_end = r'"?\n(?=[IWE]\d{4}|\+|$)'
    found = re.finditer(rf"(?:failed to (?:load|stat|poll)|Poll failed for)\b(.*?){line_end}", log, re.DOTALL)
    # A Python model's own reason, without its stack.
    reasons = {" ".join(match[1].partition(r"\n\nAt:")[0].split()) for match in found}
    syntax = re.findall(r"Error parsing text-format [\w.]+: (.*)", log)  # of a config.pbtxt, said before its failure
    # Some lines only name the model: they say nothing where another has its reason.
    told = [each for each in reasons if not any(other != each and other.startswith(each) for other in reasons)]
    failures = [f"failed to load {reason}" for reason in sorted(told) if "all models" not in reason]
    return "; ".join([*failures, *syntax])


class CrashWatch:
    """Whether a server's log says that it has crashed."""

    def __init__(self, log_path: Path) -> None:
        self._log_path, self._seen, self._read = log_path, False, 0

    def read(self, line: bytes) -> None:
        """A line that does not go to the file."""
        self._seen = self._seen or CRASHED.match(line) is not None

    def __call__(self) -> bool:
        """Reads what was added to the file."""
        with contextlib.suppress(OSError), self._log_path.open("rb") as log:
            log.seek(self._read)
            added = log.read()
            self._read += added.rfind(b"\n") + 1  # half a line is read again
            self._seen = self._seen or CRASHED.search(added) is not None
        return self._seen


def failure(log_path: Path, status: int) -> str:
    """Why the server ended, and what to do."""
    reason = load_failures(log_path)
    if reason:
        return f"{reason}; rebuild the model with make engine, or take its folder out of the repository"
    lines = log_path.read_text(errors="replace").strip().splitlines()
    errors = [
        re.sub(r"^\[libprotobuf ERROR [^]]*\] ", "", line)
        for line in lines
        if re.match(r"error|\[libprotobuf ERROR", line)
    ]
    return f"tritonserver {how_it_ended(status)}: {'; '.join(errors) or 'no reason given'} (log: {log_path})"


def how_it_ended(status: int) -> str:
    """An exit status, or a signal below 0, in words."""
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (as the kernel does where memory runs out)"
    if status < 0:
        names = {each.value: each.name for each in signal.Signals}  # not all of them have one
        return f"was ended by {names.get(-status, f'signal {-status}')}"
    return f"ended with status {status}"
