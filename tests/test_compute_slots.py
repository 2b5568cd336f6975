"""Compute slots: never more holders than slots, and a killed process loses none."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from serving.backend.compute_slots import ComputeSlots
from tests.waiting import wait_for

SPAWN = multiprocessing.get_context("fork")  # the parent's id is part of what is shared


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "model.onnx").touch()
    return tmp_path / "model.onnx"


def hold(model: Path, slots: int, hold_s: float, times: int, spans: multiprocessing.SimpleQueue) -> None:
    """Takes a slot several times and reports when it held it."""
    shared = ComputeSlots(str(model), slots)
    for _ in range(times):
        with shared:
            started = time.monotonic()
            time.sleep(hold_s)
            spans.put((started, time.monotonic()))


@pytest.mark.parametrize("slots", [1, 2])
def test_there_are_never_more_holders_than_slots(model: Path, slots: int) -> None:
    spans = SPAWN.SimpleQueue()
    workers = [SPAWN.Process(target=hold, args=(model, slots, 0.01, 20, spans)) for _ in range(slots + 2)]
    for worker in workers:
        worker.start()
    held = [spans.get() for _ in range(20 * len(workers))]
    for worker in workers:
        worker.join(60)
    events = sorted([(start, 1) for start, _ in held] + [(end, -1) for _, end in held])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    assert most <= slots


def test_as_many_as_slots_hold_one_at_once(model: Path) -> None:
    slots = 2
    all_hold = SPAWN.Barrier(slots)
    workers = [SPAWN.Process(target=wait_for_all, args=(model, slots, all_hold)) for _ in range(slots)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * slots


def wait_for_all(model: Path, slots: int, all_hold: threading.Barrier) -> None:
    """Takes a slot, and gives it back when all hold one."""
    with ComputeSlots(str(model), slots):
        all_hold.wait(60)


def test_killed_processes_leave_the_slot_to_the_next(model: Path) -> None:
    spans = SPAWN.SimpleQueue()
    holder = SPAWN.Process(target=hold, args=(model, 1, 600, 1, spans))
    holder.start()
    wait_until_held(model)
    waiters = [SPAWN.Process(target=hold, args=(model, 1, 0, 1, spans)) for _ in range(2)]
    for waiter in waiters:
        waiter.start()
        time.sleep(0.1)
    assert waiters[1].is_alive()
    waiters[0].kill()
    holder.kill()
    for each in (holder, *waiters):
        each.join(60)
    assert waiters[1].exitcode == 0


def wait_until_held(model: Path) -> None:
    """Waits until a process holds the only slot."""

    def held() -> bool:
        locks = Path("/proc/locks").read_text()
        pipes = model.parent.glob("compute-slots-*")
        return any(f":{path.stat().st_ino} " in locks and "POSIX" in locks for path in pipes)

    wait_for(held)
