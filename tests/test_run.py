"""Recording, saving and reading a run: nothing is lost, averaged or half written."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from deepseek.spec import InputError
from loadtests.load.inputs import Length
from loadtests.load.loadtest import show, summary
from loadtests.load.workers.recorder import FOLD_AT, Latencies, Recorder
from loadtests.results.histogram import LONGEST_US, histogram
from loadtests.results.run import Run, latest_run, new_run, publish, runs_folder
from tests.saved_runs import damage, saved_run, steady


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("run.json", '"rate_rps"', "", "run.json: not valid JSON"),
        ("run.json", '"rate_rps"', '"novel": 1, "rate_rps"', "settings.novel: seen 1"),
        ("run.json", '"generator": {', '"generator": null, "other": {', "other: unknown key"),
        ("run.json", '"rows": 11', '"rows": 12', "seconds.jsonl: 11 rows of 12"),
        ("run.json", '"looks": 1', '"looks": 0', r"settings\.looks: seen 0"),
        ("run.json", '"thread_cpu": ', '"thread_cpu": "much", "x": ', r"generator\.thread_cpu\S*: seen 'much'"),
        ("seconds.jsonl", '"errors": {', '"errors": {"ServerError": "x"', r"counts cannot be read \(ValueError"),
        ("seconds.jsonl", '"intended": "', '"intended: "', r"counts cannot be read \(JSONDecodeError"),
        ("seconds.jsonl", '"intended": "H', '"intended": "X', r"counts cannot be read \(HdrCookieException"),
    ],
    ids=["cut", "another version", "key", "rows", "looks", "cpu", "errors", "cut row", "histogram"],
)
def test_a_damaged_run_gives_a_one_line_error(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    saved_run(tmp_path, steady())
    damage(tmp_path, file, old, new)
    with pytest.raises(InputError, match=message):
        Run.load(tmp_path)
    with pytest.raises(InputError, match="measure again with: make loadtest MODEL=text"):
        Run.load(shutil.copytree(tmp_path, tmp_path / "text" / "loadtests" / "1"))
    with pytest.raises(InputError, match="not a load test run"):
        Run.load(tmp_path / "none")


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


def test_requests_planned_in_the_warm_up_are_excluded(tmp_path: Path) -> None:
    late_warm_up = (-0.001, 5.0, 9.0, None)
    run = saved_run(tmp_path, [late_warm_up, *steady()], warmup_s=1.0)
    assert run.window.planned == 1000
    assert run.window.latency("intended").max_ms < 20


def test_the_printed_figures_name_the_kinds_of_failures_with_a_message_of_each(tmp_path: Path) -> None:
    console = Console(width=200)
    lost = [(0.1 * place, 0.1 * place, 0.1 * place, f"Unreachable: try {place}") for place in range(3)]
    run = saved_run(tmp_path / "run", [*steady(count=10), *lost])
    with console.capture() as printed:
        show(run, console)
    assert "13 requests, 10 answered, 3 failed (3 Unreachable); " in printed.get()
    assert "Unreachable, for example: try 0\n" in printed.get()
    assert "service latency: p50 10.0 ms, p95 -, p99 -, p99.9 -\n" in printed.get()  # as in the report
    assert summary(run)["latency"]["service"] == {"p50_ms": 10.007, "p95_ms": None, "p99_ms": None, "p99.9_ms": None}


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


def test_throughput_counts_answers_that_arrive_within_the_window(tmp_path: Path) -> None:
    run = saved_run(tmp_path, [(9.9, 9.9, 12.0, None), *steady(count=500)])
    assert run.window.ok == 501
    assert run.window.throughput_rps == pytest.approx(50)


def test_rows_of_several_workers_are_added_not_averaged(tmp_path: Path) -> None:
    fast, slow = saved_run(tmp_path / "a", steady(0.001)), saved_run(tmp_path / "b", steady(0.1))
    with (fast.folder / "seconds.jsonl").open("a") as lines:
        lines.write((slow.folder / "seconds.jsonl").read_text())
    damage(fast.folder, "run.json", '"rows": 10', '"rows": 21')
    merged = Run.load(fast.folder)
    assert merged.window.planned == 2000
    assert merged.window.latency("service").percentile_ms(50) == pytest.approx(1, rel=2e-3)
    assert merged.window.latency("service").percentile_ms(51) == pytest.approx(100, rel=2e-3)


def test_a_batch_of_values_gives_the_same_histogram_as_single_values() -> None:
    values_s = [0.0, 2.1e-6, 0.002047, 0.002048, 4000.0, *np.random.default_rng(0).lognormal(-5, 3, 2 * FOLD_AT)]
    at_once, one_by_one = Latencies(), histogram()
    for value_s in values_s:
        at_once.add(value_s)
        one_by_one.record_value(min(round(value_s * 1e6), LONGEST_US))
    assert at_once.folded().encode() == one_by_one.encode()
    assert at_once.folded().get_total_count() == one_by_one.get_total_count()


def test_only_requests_within_the_window_are_counted_by_length() -> None:
    recorder = Recorder(open_loop=True, duration_s=10)
    for planned_s in (-1.0, 1.0, 2.0, 11.0):
        recorder.attempt(planned_s)
        recorder.finish(planned_s, planned_s, planned_s + 0.1, None, Length("sequence 16"))
    recorder.attempt(3.0)
    recorder.drop(3.0, Length("sequence 128"))
    found = {row["length"]: (row["planned"], row["ok"], row["dropped"]) for row in recorder.take_lengths()}
    assert found == {"sequence 16": (2, 2, 0), "sequence 128": (1, 0, 1)}
    assert list(recorder.take_lengths()) == []


def test_a_run_that_fails_leaves_no_folder(own_build: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), new_run(runs_folder("tiny")) as draft:
        (draft / "run.json").write_text("{")
        raise KeyboardInterrupt
    assert list((own_build / "tiny" / "loadtests").iterdir()) == []


def test_a_killed_runs_draft_is_cleared_and_never_the_latest(own_build: Path) -> None:
    code = "from loadtests.results.run import new_run, runs_folder\nwith new_run(runs_folder('tiny')) as d:\n"
    code += "    (d / 'run.json').touch(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        os.kill(killed.pid, signal.SIGKILL)
    with pytest.raises(InputError, match="no load test of tiny"):
        latest_run("tiny")
    with new_run(runs_folder("tiny")) as draft:
        (draft / "run.json").touch()
        (published,) = publish(draft)
    assert list(published.parent.iterdir()) == [latest_run("tiny")] == [published]


def test_a_new_run_is_the_latest_though_the_clock_was_set_back(own_build: Path) -> None:
    for name in ("2999-01-01T00-00-00.999Z", "before the change"):  # the second is a user's copy
        (runs_folder("tiny") / name).mkdir(parents=True)
        (runs_folder("tiny") / name / "run.json").touch()
    with new_run(runs_folder("tiny")) as draft:
        (draft / "run.json").touch()
        (published,) = publish(draft)
    assert (latest_run("tiny"), published.name) == (published, "2999-01-01T00-00-01.000Z")


def test_mixes_that_end_together_get_a_name_each(tmp_path: Path) -> None:
    def publish_at_once(drafts: list[Path]) -> str:
        together.wait()
        return publish(*drafts)[0].name

    mixes, together = 8, threading.Barrier(8)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(mixes) as pool:
        drafts = [[stack.enter_context(new_run(tmp_path / model)) for model in "ab"] for _ in range(mixes)]
        for draft in (draft for mix in drafts for draft in mix):
            (draft / "run.json").touch()
        names = set(pool.map(publish_at_once, drafts))
    assert len(names) == mixes
    assert all({path.name for path in (tmp_path / model).iterdir()} == names for model in "ab")
