"""Makes saved runs for tests from lists of requests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.load.workers.recorder import Recorder
from loadtests.results.run import Run
from loadtests.results.settings import LoadSettings

Request = tuple[float, float, float, str | None]  # planned, sent, finished, error


def load_settings(**changes: Any) -> LoadSettings:
    fixed: dict[str, Any] = {"model": "tiny", "models": "models", "target": "onnxruntime", "protocol": "grpc"}
    return LoadSettings(**{**fixed, "url": "127.0.0.1:8001", "inputs": "evaluation.npz", **changes})


@lru_cache(maxsize=64)  # many tests make the same runs
def recorded(requests: tuple[Request, ...], open_loop: bool) -> list[str]:
    """The lines of `seconds.jsonl`."""
    recorder = Recorder(open_loop=open_loop)
    if open_loop:
        recorder.plan(np.array([planned for planned, *_ in requests]))
    for planned, sent, finished, error in requests:
        recorder.attempt(sent)
        if error == "dropped":
            recorder.drop(planned)
        else:
            recorder.finish(planned, sent, finished, error)
    return [f"{json.dumps(row)}\n" for row in recorder.take()]


def saved_run(folder: Path, requests: Iterable[Request], **changes: Any) -> Run:
    """Writes a run made from a list of requests; `changes` apply to its settings and generator."""
    generator = {"thread_cpu": changes.pop("thread_cpu", 0.2), "process_cpu": 0.3, "machine_cpu": 0.5}
    generator |= {"workers_lost": changes.pop("workers_lost", 0), "workers": changes.get("workers", 1)}
    generator["precedence"] = False
    server = changes.pop("server", {"version": "1", "statistics": {}})
    quality = changes.pop("quality", {})
    settings = load_settings(**{"rate_rps": 100.0, "duration_s": 10.0, **changes})
    rows = recorded(tuple(requests), settings.open_loop)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seconds.jsonl").write_text("".join(rows))
    machine = {"cpu": "test", "cores": 2, "versions": {"python": "3.11"}}
    data: dict[str, Any] = {"settings": asdict(settings), "started_at": "2026-11-25T12:00:00+00:00", "machine": machine}
    data |= {"generator": generator, "server": server, "quality": quality, "rows": len(rows), "lengths": []}
    (folder / "run.json").write_text(json.dumps(data))
    return Run.load(folder)


def damage(folder: Path, file: str, old: str, new: str) -> None:
    """Replaces `old` in a run's file by `new`; if `new` is empty, truncates the file at `old`."""
    text = (folder / file).read_text()
    head, found, tail = text.partition(old)
    assert found
    (folder / file).write_text(head + (new + tail if new else ""))


def steady(latency_s: float = 0.01, count: int = 1000, lag_s: float = 0.0001, seconds: float = 10) -> list[Request]:
    """`count` requests over `seconds`, all with the same latency and lag."""
    times = np.arange(count) / count * seconds
    return [(time, time + lag_s, time + lag_s + latency_s, None) for time in times.tolist()]
