"""Recording, saving and reading a run: nothing is lost, averaged or half written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from deepseek_client import ConnectionLost

from deepseek.spec import InputError, SloSpec
from loadtests.check import ask_once
from loadtests.recorder import FOLD_AT, LONGEST_US, Latencies, Recorder, histogram
from loadtests.results import Run, Settings, latest_run, new_run, publish, runs_folder
from loadtests.slo import judge

Request = tuple[float, float, float, str | None]  # planned, sent, finished, error


def saved_run(folder: Path, requests: Iterable[Request], **changes: Any) -> Run:
    """A run's folder made from a list of requests; `changes` are of its settings and generator."""
    requests = list(requests)
    generator = {"thread_cpu": changes.pop("thread_cpu", 0.2), "process_cpu": 0.3, "machine_cpu": 0.5}
    server = changes.pop("server", {"version": "1", "statistics": {}})
    quality = changes.pop("quality", {})
    fixed: dict[str, Any] = {"model": "tiny", "models": "models", "target": "onnxruntime", "protocol": "grpc"}
    fixed |= {"url": "127.0.0.1:8001", "inputs": "evaluation.npz", "rate_rps": 100.0, "duration_s": 10.0}
    settings = Settings(**fixed | changes)
    planned_s = np.array([planned for planned, *_ in requests]) if settings.open_loop else None
    recorder = Recorder(planned_s, open_loop=settings.open_loop)
    for planned, sent, finished, error in requests:
        recorder.attempt(sent)
        if error == "dropped":
            recorder.drop(planned)
        else:
            recorder.finish(planned, sent, finished, error)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seconds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in recorder.take()))
    data = {"settings": asdict(settings), "started_at": "2026-11-25T12:00:00+00:00", "generator": generator}
    data |= {
        "server": server,
        "quality": quality,
        "machine": {"cpu": "test", "cores": 2, "versions": {"python": "3.11"}},
    }
    (folder / "run.json").write_text(json.dumps(data))
    return Run.load(folder)


def damage(folder: Path, file: str, old: str, new: str) -> None:
    """Replaces a part of a run's file, or cuts it off there where `new` is empty."""
    text = (folder / file).read_text()
    head, found, tail = text.partition(old)
    assert found
    (folder / file).write_text(head + (new + tail if new else ""))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("run.json", '"rate_rps"', "", r"run.json: it cannot be read \(JSONDecodeError"),
        ("run.json", '"rate_rps"', '"novel": 1, "rate_rps"', "settings.novel: seen 1"),
        ("run.json", '"rate_rps": 100.0', '"rate_rps": "100"', "settings.rate_rps: seen '100'"),
        ("run.json", '"generator": {', '"generator": null, "other": {', "other: unknown key"),
        ("run.json", '"machine"', '"rows": 12, "machine"', "seconds.jsonl: 11 rows of 12"),
        ("seconds.jsonl", '"intended"', "", r"line 1 cannot be read \(JSONDecodeError"),
        ("seconds.jsonl", '"intended": "H', '"intended": "X', r"line 1 cannot be read \(HdrCookieException"),
    ],
    ids=["cut", "another version", "type", "key", "rows", "cut row", "histogram"],
)
def test_a_damaged_run_is_refused_in_one_line(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    saved_run(tmp_path, steady())
    damage(tmp_path, file, old, new)
    with pytest.raises(InputError, match=message) as caught:
        Run.load(tmp_path)
    assert "\n" not in str(caught.value)


def steady(latency_s: float = 0.01, count: int = 1000, lag_s: float = 0.0001) -> list[Request]:
    """`count` requests over 10 s, all answered alike."""
    times = np.arange(count) / count * 10
    return [(time, time + lag_s, time + lag_s + latency_s, None) for time in times.tolist()]


def test_percentiles_are_within_a_tenth_of_a_percent_of_the_true_ones(tmp_path: Path) -> None:
    latencies = np.sort(np.random.default_rng(0).lognormal(-4, 1, 5000))
    run = saved_run(tmp_path, [(i / 1000, i / 1000, i / 1000 + latency, None) for i, latency in enumerate(latencies)])
    for percent, rank in ((0, 1), (1, 50), (50, 2500), (95, 4750), (99, 4950), (99.9, 4995), (100, 5000)):
        found_ms = run.window.latency("intended").percentile_ms(percent)
        assert found_ms == pytest.approx(latencies[rank - 1] * 1000, rel=1.1e-3)


def test_intended_latency_counts_the_wait_before_sending_and_service_does_not(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(latency_s=0.01, lag_s=0.5))
    assert run.window.latency("intended").percentile_ms(50) == pytest.approx(510, rel=2e-3)
    assert run.window.latency("service").percentile_ms(50) == pytest.approx(10, rel=2e-3)
    assert run.window.latency("lag").percentile_ms(50) == pytest.approx(500, rel=2e-3)


def test_the_warm_up_is_left_out_by_planned_time(tmp_path: Path) -> None:
    late_warm_up = (-0.001, 5.0, 9.0, None)
    run = saved_run(tmp_path, [late_warm_up, *steady()], warmup_s=1.0)
    assert run.window.planned == 1000
    assert run.window.latency("intended").max_ms < 20


def test_a_failed_request_is_slower_than_any_limit(tmp_path: Path) -> None:
    requests = [(p, s, f, "DeadlineExceeded" if i % 50 == 0 else None) for i, (p, s, f, _) in enumerate(steady())]
    run = saved_run(tmp_path, requests)
    assert run.window.errors == {"DeadlineExceeded": 20}
    assert run.window.latency("intended").percentile_ms(97) < 11
    assert math.isinf(run.window.latency("intended").percentile_ms(99))


def test_dropped_requests_are_failures_and_have_no_latency(tmp_path: Path) -> None:
    run = saved_run(tmp_path, [*steady(count=90), *[(9.5, 9.5, 0.0, "dropped")] * 10])
    assert (run.window.planned, run.window.ok, run.window.failed, run.window.unsent) == (100, 90, 10, 0)
    assert run.window.errors == {"dropped": 10}


def test_throughput_is_what_came_within_the_window(tmp_path: Path) -> None:
    run = saved_run(tmp_path, [(9.9, 9.9, 12.0, None), *steady(count=500)])
    assert run.window.ok == 501
    assert run.window.throughput_rps == pytest.approx(50)


def test_rows_of_several_workers_are_added_not_averaged(tmp_path: Path) -> None:
    fast, slow = saved_run(tmp_path / "a", steady(0.001)), saved_run(tmp_path / "b", steady(0.1))
    with (fast.folder / "seconds.jsonl").open("a") as lines:
        lines.write((slow.folder / "seconds.jsonl").read_text())
    merged = Run.load(fast.folder)
    assert merged.window.planned == 2000
    assert merged.window.latency("service").percentile_ms(50) == pytest.approx(1, rel=2e-3)
    assert merged.window.latency("service").percentile_ms(51) == pytest.approx(100, rel=2e-3)


def test_values_put_in_at_once_make_the_histogram_that_they_make_one_by_one() -> None:
    values_s = [0.0, 2.1e-6, 0.002047, 0.002048, 4000.0, *np.random.default_rng(0).lognormal(-5, 3, 2 * FOLD_AT)]
    at_once, one_by_one = Latencies(), histogram()
    for value_s in values_s:
        at_once.add(value_s)
        one_by_one.record_value(min(round(value_s * 1e6), LONGEST_US))
    assert at_once.folded().encode() == one_by_one.encode()
    assert at_once.folded().get_total_count() == one_by_one.get_total_count()


def test_taken_seconds_are_forgotten_and_add_up() -> None:
    recorder = Recorder(np.arange(10.0), open_loop=True)
    for second in range(10):
        recorder.finish(second, second, second + 0.1, None)
    rows = [*recorder.take(4), *recorder.take(4), *recorder.take()]
    assert [row["second"] for row in rows] == list(range(10))


def test_a_soak_of_ten_minutes_is_read_in_a_few_megabytes(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady())
    line = (run.folder / "seconds.jsonl").read_text().splitlines()[0]
    (run.folder / "seconds.jsonl").write_text("".join(f"{line}\n".replace(": 0,", f": {s},", 1) for s in range(600)))
    tracemalloc.start()
    soak = Run.load(run.folder)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(soak.seconds) == 600
    assert held < 20e6  # whole histograms would take 340 MB


def test_a_run_of_an_earlier_version_is_read_and_judged_as_it_was(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(0.1))
    data = json.loads((tmp_path / "run.json").read_text())
    for later in ("mix", "workers", "shape"):
        del data["settings"][later]
    (tmp_path / "run.json").write_text(json.dumps(data))
    slo = SloSpec(p99_ms=50, rate_rps=100)
    assert judge(Run.load(tmp_path), slo) == judge(run, slo)
    assert judge(run, slo).verdict == "violated"


def test_requests_are_counted_by_length_too_within_the_window_alone() -> None:
    recorder = Recorder(open_loop=True, duration_s=10)
    for planned_s in (-1.0, 1.0, 2.0, 11.0):
        recorder.attempt(planned_s)
        recorder.finish(planned_s, planned_s, planned_s + 0.1, None, "sequence 16")
    recorder.attempt(3.0)
    recorder.drop(3.0, "sequence 128")
    found = {row["length"]: (row["planned"], row["ok"], row["dropped"]) for row in recorder.take_lengths()}
    assert found == {"sequence 16": (2, 2, 0), "sequence 128": (1, 0, 1)}
    assert list(recorder.take_lengths()) == []


def test_a_run_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    with contextlib.suppress(KeyboardInterrupt), new_run(runs_folder("tiny")) as draft:
        (draft / "run.json").write_text("{")
        raise KeyboardInterrupt
    assert list((tmp_path / "tiny" / "loadtests").iterdir()) == []


def test_a_killed_runs_draft_is_cleared_and_never_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    code = "from loadtests.results import new_run, runs_folder\nwith new_run(runs_folder('tiny')) as d:\n"
    code += "    (d / 'run.json').touch(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        os.kill(killed.pid, signal.SIGKILL)
    with pytest.raises(InputError, match="no load test of tiny"):
        latest_run("tiny")
    with new_run(runs_folder("tiny")) as draft:
        (draft / "run.json").touch()
        published = publish(draft)
    assert list(published.parent.iterdir()) == [latest_run("tiny")] == [published]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", None),
        ("run.json", "{"),
        ("run.json", "{}"),
        ("seconds.jsonl", "x\n"),
        ("seconds.jsonl", '{"second": 1}\n'),
    ],
    ids=["missing", "cut off", "empty", "not JSON", "without counts"],
)
def test_a_broken_folder_is_one_clear_error(tmp_path: Path, name: str, content: str | None) -> None:
    saved_run(tmp_path, steady())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=str(tmp_path)) as caught:
        Run.load(tmp_path)
    assert "\n" not in str(caught.value)


class Breaks:
    """A client whose first calls break."""

    def __init__(self, times: int) -> None:
        self.left = times

    def infer(self, *_: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            raise ConnectionLost("reset")


def test_before_a_run_a_server_that_breaks_now_and_then_is_let_through_and_one_that_always_does_is_not() -> None:
    settings: Any = SimpleNamespace(model="m", timeout_s=5.0)
    ask_once(cast(Any, Breaks(4)), settings, {})
    with pytest.raises(ConnectionLost):
        ask_once(cast(Any, Breaks(9)), settings, {})
