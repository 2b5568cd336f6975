"""Fills the repository's disk while a version is published."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from deepseek.spec.files.repository import versions_of
from tests.bench.failure.setting import MIB, Row, Service, Setting, lost
from tests.conftest import run_module

RATE = 20  # requests/s of each stream
SERVED_S = 20.0
SPARE_BYTES = 64 * 1024  # free space on the full disk: less than any version needs


def disk_full(setting: Setting) -> list[Row]:
    """Publishes a new version into a repository on a full tmpfs."""
    what = "disk full in the repository: publishing a version"
    if os.geteuid() != 0:
        return [Row(what=what, seen="not run: only root may mount a tmpfs")]
    place = setting.folder / "disk"
    try:
        with _small_disk(place):
            return _disk_full(setting, place, what)
    except subprocess.CalledProcessError as error:
        return [Row(what=what, seen=f"not run: no tmpfs can be mounted here ({error.stderr.strip()})")]


def _disk_full(setting: Setting, place: Path, what: str) -> list[Row]:
    repository = place / "repository"
    shutil.copytree(setting.repository / setting.model.name, repository / setting.model.name)
    first = versions_of(repository / setting.model.name)[0]
    with setting.service("disk-full", repository=repository, poll_s=1) as service:
        stream = setting.stream(service, "grpc", f"{RATE}x600")
        with setting.load(service, [stream]) as load:
            time.sleep(setting.watch_s)
            _resize(place, _used_bytes(place) + SPARE_BYTES)
            before = _files(repository)
            full = _publish(setting, repository)
            same = _files(repository) == before
            doctor = run_module("cli", "doctor", "--repository", str(repository))
            time.sleep(setting.watch_s)
            _resize(place, 2 * _used_bytes(place) + 16 * MIB)
            enough = _publish(setting, repository)
            served_s = _served_s(service, setting.model.name, first + 1)
            answers = load.stop()
    reason = full.stderr.strip().splitlines()
    return [
        Row(
            what=what,
            asked="one line, exit 2",
            seen=f"exit {full.returncode}: {_short(reason[-1]) if reason else 'silent'}",
            holds=full.returncode == 2 and len(reason) == 1 and "No space left" in reason[0],
        ),
        Row(
            what="    the repository",
            asked="unchanged and valid",
            seen=f"{'unchanged' if same else 'changed'}; the doctor's exit code is {doctor.returncode}",
            holds=same and doctor.returncode == 0,
        ),
        Row(
            what="    the server that follows it",
            asked="no request fails",
            seen=f"{lost(answers)} of {len(answers[stream.name])} failed",
            holds=lost(answers) == 0,
        ),
        Row(
            what="    with space again, the next version",
            asked=f"is served within {SERVED_S:g} s",
            seen=f"after {served_s:.1f} s" if enough.returncode == 0 else _short(enough.stderr),
            holds=enough.returncode == 0 and served_s <= SERVED_S,
        ),
    ]


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", str(place))
    try:
        yield
    finally:
        _run("umount", "--lazy", str(place))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _resize(place: Path, size_bytes: int) -> None:
    _run("mount", "-o", f"remount,size={size_bytes}", str(place))


def _used_bytes(place: Path) -> int:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _publish(setting: Setting, repository: Path) -> subprocess.CompletedProcess[str]:
    which = ("--model", setting.model.name, "--models", str(setting.models))
    return run_module("cli", "publish", *which, "--repository", str(repository))


def _files(repository: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of each file."""
    found = (path for path in repository.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def _served_s(service: Service, model: str, version: int) -> float:
    """Seconds until the server serves a version; inf after SERVED_S."""
    began_s = time.monotonic()
    with service.client() as client:
        while time.monotonic() < began_s + SERVED_S:
            if str(version) in client.metadata(model).versions:
                return time.monotonic() - began_s
            time.sleep(0.1)
    return float("inf")


def _short(text: str) -> str:
    """The text with file names in place of paths."""
    words = text.strip().removeprefix("error: ").split(" ")
    return " ".join(word if not word.startswith("/") else f"…/{Path(word).name}" for word in words)
