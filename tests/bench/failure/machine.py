"""What the machine does to the service: the repository's disk fills up, the clock jumps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from deepseek.spec import InputError, InvalidMeasurement
from deepseek.spec.repository import versions_of
from tests.bench.failure.load import Load
from tests.bench.failure.setting import MIB, WAYS, Answers, Row, Service, Setting, lost, told
from tests.conftest import run_module

RATE = 20  # requests/s of each stream
SERVED_S = 20.0
SPARE_BYTES = 64 * 1024  # left on the full disk: less than any version
JUMPS_S = (3600, -7200, 3600)  # one after the other; together 0
JUMP_WATCH_S = 4.0
SLOWER_MS, SLOWER_TIMES = 100.0, 3.0
ADMIN_KEY = "sesame"


# -- disk ----------------------------------------------------------------------------------------


def disk_full(setting: Setting) -> list[Row]:
    """The repository on a small tmpfs that is full; a new version is published into it, and the server restarted on it."""
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
    first = _versions(setting, repository)
    with setting.service("disk-full", repository=repository, poll_s=1) as service:
        stream = setting.stream(service, "grpc", f"{RATE}x600")
        with Load([stream]) as load:
            time.sleep(setting.watch_s)
            _resize(place, _used_bytes(place) + SPARE_BYTES)
            before = _files(repository)
            full = _publish(setting, repository)
            same = _files(repository) == before
            doctor = run_module("serving.doctor", "--repository", str(repository))
            time.sleep(setting.watch_s)
            _resize(place, 2 * _used_bytes(place) + 16 * MIB)
            enough = _publish(setting, repository)
            served_s = _served_s(service, setting.model.name, first + 1)
            answers = load.stop()
        _resize(place, _used_bytes(place) + 4096)
        service.end()
        restarted = restart(service, setting.model.name, _versions(setting, repository))
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
            asked="as it was, and sound",
            seen=f"{'as it was' if same else 'changed'}; the doctor's exit status is {doctor.returncode}",
            holds=same and doctor.returncode == 0,
        ),
        Row(
            what="    the server that follows it",
            asked="no request fails",
            seen=f"{lost(answers)} of {len(answers[stream.name])} failed",
            holds=lost(answers) == 0,
        ),
        Row(
            what="    with room again, the next version",
            asked=f"is served within {SERVED_S:g} s",
            seen=f"after {served_s:.1f} s" if enough.returncode == 0 else _short(enough.stderr),
            holds=enough.returncode == 0 and served_s <= SERVED_S,
        ),
        restarted,
    ]


def restart(service: Service, model: str, version: int) -> Row:
    """Starts the server on the full disk: whether it serves a version."""
    what, asked = "    a restart on the full disk", "serves"
    try:
        ready_s = service.start()
    except InvalidMeasurement as error:
        return Row(what=what, asked=asked, seen=_short(str(error)), holds=False)
    with service.client() as client:
        served = client.metadata(model).versions
    seen = f"ready after {ready_s:.1f} s"
    if str(version) not in served:
        seen += f" with version {', '.join(served)}, not {version}"
    return Row(what=what, asked=asked, seen=seen, holds=str(version) in served)


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
    return run_module("export.to_triton", *which, "--repository", str(repository))


def _versions(setting: Setting, repository: Path) -> int:
    """The newest."""
    return versions_of(repository / setting.model.name)[0]


def _files(repository: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times."""
    found = (path for path in repository.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def _served_s(service: Service, model: str, version: int) -> float:
    """Seconds until the server gives a version; inf where it does not in time."""
    began_s = time.monotonic()
    with service.client() as client:
        while time.monotonic() < began_s + SERVED_S:
            if str(version) in client.metadata(model).versions:
                return time.monotonic() - began_s
            time.sleep(0.1)
    return float("inf")


def _short(text: str) -> str:
    """Without the folder of this run."""
    words = text.strip().removeprefix("error: ").split(" ")
    return " ".join(word if not word.startswith("/") else f"…/{Path(word).name}" for word in words)


# -- clock ---------------------------------------------------------------------------------------


def clock_jumps(setting: Setting) -> list[Row]:
    """An hour forward, two back, and one forward again, for the server, the gateway and the client alike.

    By libfaketime, which changes what the processes are told of the time of day; the machine's own clock stays. A wait
    that is under way when the clock is set, and that the kernel measures by the time of day, is not covered by it.
    """
    what = "clock jumps"
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        return [Row(what=what, seen="not run: libfaketime is not installed (apt-get install libfaketime)")]
    clock = setting.folder / "clock.offset"
    _set(clock, 0)
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        # Else each process has a semaphore by its number, which one that is killed leaves to the next of that number.
        "FAKETIME_DISABLE_SHM": "1",
        "TRITON_ADMIN_KEY": ADMIN_KEY,
    }
    with setting.service("clock", **environment) as service:
        streams = [setting.stream(service, way, f"{RATE}x600", retries=3) for way in WAYS]
        with Load(streams, environment) as load:
            marks, offset_s, seen_s = [load.began_s], 0, float("nan")
            time.sleep(setting.watch_s)
            for jump_s in JUMPS_S:
                marks.append(time.perf_counter())
                offset_s += jump_s
                _set(clock, offset_s)
                time.sleep(JUMP_WATCH_S)
                if offset_s == JUMPS_S[0]:  # Triton keeps the latest time that it ever saw
                    seen_s = _last_inference_s(service, setting.model.name) - time.time() - offset_s
            answers = load.stop()
    return _jumped(what, answers, marks, seen_s)


def _jumped(what: str, answers: dict[str, Answers], marks: list[float], seen_s: float) -> list[Row]:
    quiet_ms = max(each.between(*marks[:2]).kept.latency_ms(99) for each in answers.values())
    after_ms = max(each.between(marks[1]).kept.latency_ms(99) for each in answers.values())
    limit_ms = max(quiet_ms + SLOWER_MS, SLOWER_TIMES * quiet_ms)
    jumps = ", ".join(f"{jump_s / 3600:+g} h" for jump_s in JUMPS_S)
    return [
        Row(
            what=f"{what} of server, gateway and client under load: {jumps}",
            asked="no request fails",
            seen=f"{lost(answers)} of {sum(map(len, answers.values()))} failed{told(answers)}",
            holds=lost(answers) == 0,
        ),
        Row(
            what="    Triton's own time of day",
            asked="is the one that was set",
            seen=f"apart by {abs(seen_s):.1f} s after the first jump",
            holds=abs(seen_s) < 10,
        ),
        Row(
            what="    p99 after the jumps",
            asked=f"at most {limit_ms:.0f} ms",
            seen=f"{after_ms:.0f} ms, {quiet_ms:.0f} ms before",
            holds=after_ms <= limit_ms,
        ),
    ]


def _set(clock: Path, offset_s: int) -> None:
    """In one step: a reader sees the old offset or the new one."""
    part = clock.with_suffix(".part")
    part.write_text(f"{offset_s:+d}\n")
    part.replace(clock)


def _last_inference_s(service: Service, model: str) -> float:
    """When Triton answered last, by its own time of day."""
    url = f"http://{service.http_url}/v2/models/{model}/stats"
    request = urllib.request.Request(url, headers={"triton-admin-key": ADMIN_KEY})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)["model_stats"][0]["last_inference"] / 1000
    except OSError as error:
        raise InputError(f"{url}: {error}") from None
