"""What a load test measured: kept in one folder, read back to be judged or drawn.

Contract: latencies are whole microseconds in HDR histograms of 3 digits, one for each second of the
run, so that a reported percentile is at most 0.1 % above the true one. Histograms are added, never
averaged. Seconds count from the start of the measured window: those below 0 are the warm-up. A
request belongs to the second it was *planned* in, whenever it was answered.

A run's folder, `build/<name>/loadtests/<time>/`, appears whole or not at all:
    run.json        settings, machine, versions, the generator's own health, the server's statistics; where the
                    inputs have several lengths, counts and histograms of the window by length, too
    seconds.jsonl   a line a second (and worker): counts, errors by kind, encoded histograms
The models of a mix have a folder each, all of the same name.

Examples:
    run = Run.load(latest_run("recommender"))
    run.window.latency("intended").percentile_ms(99)
    run.lengths["sequence 128"].latency("intended").percentile_ms(99)
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from hdrh.histogram import HdrHistogram
from pydantic import ConfigDict, ValidationError

from deepseek.spec import InputError, Target, build_dir
from deepseek.spec.checks import Table, first_error
from deepseek.spec.folders import scratch_in
from loadtests.recorder import KINDS
from loadtests.recorder import NO_FILE as NO_FILE
from loadtests.recorder import NO_PORT as NO_PORT
from loadtests.recorder import VALUES_US as VALUES_US
from loadtests.recorder import Latency as Latency
from loadtests.schedule import Segment, segments_of

# Of workers, once Locust has them: inputs read and encoded, on a machine that is busy.
LONGEST_PREPARATION_S = 60.0
IN_FLIGHT = 512  # unanswered requests of a worker, where the SLO and the rate do not need more


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what a run does; `rate_rps` or `shape` (open loop) or `users` (closed loop) is given."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)
    model: str
    models: str
    target: Target
    protocol: Literal["grpc", "http"]
    url: str
    inputs: str
    """The .npz file of real inputs."""
    rate_rps: float | None = None
    shape: str | None = None
    """Rates that change: see `schedule.segments_of`."""
    users: int | None = None
    arrivals: Literal["constant", "poisson"] = "poisson"
    seed: int = 0
    warmup_s: float = 5.0
    duration_s: float = 20.0
    timeout_s: float = 5.0
    """Deadline of a request; past it, it counts as an error."""
    max_in_flight: int | None = None
    """Open loop: a request due while its worker has so many unanswered is dropped, and counts as an error. None: as
    many as the SLO and the rate need, which `measure` works out."""
    workers: int = 1
    """Processes that send."""
    tls: bool = False
    ca_cert: str | None = None
    """Authority of the gateway's certificate: TLS where it is given. The key is $DEEPSEEK_API_KEY, and in no run."""
    mix: str | None = None
    """All models of the mixed load that this was a part of, as `loadtests.mix` has it."""

    @property
    def access(self) -> dict[str, Any]:
        """What a client needs beside the address to be let in."""
        if not (self.tls or self.ca_cert):
            return {}
        return {"tls": True, "ca_cert": self.ca_cert, "api_key": os.environ.get("DEEPSEEK_API_KEY") or None}

    @property
    def open_loop(self) -> bool:
        """Requests leave on a fixed schedule rather than after an answer."""
        return self.rate_rps is not None or self.shape is not None

    @property
    def rates_rps(self) -> list[float]:
        """The rates of an open loop that are held for a while, ascending."""
        return sorted({each.rate_rps for each in self.segments if each.end_rps in (None, each.rate_rps)})

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The rates of an open loop, one after the other; none of a closed one."""
        if self.shape is not None:
            return segments_of(self.shape)
        return () if self.rate_rps is None else (Segment(duration_s=self.duration_s, rate_rps=self.rate_rps),)


@dataclass(frozen=True)
class Distribution:
    """Latencies of all requests of a stretch of time; those that `failed` are slower than any limit."""

    counts: np.ndarray
    failed: int = 0

    @property
    def total(self) -> int:
        """Requests, the failed ones included."""
        return int(self.counts.sum()) + self.failed

    def percentile_ms(self, percent: float) -> float:
        """The latency that `percent` of the requests kept to (nearest rank); inf where they did not, nan of nothing."""
        if not self.total:
            return math.nan
        rank = max(1, math.ceil(percent / 100 * self.total - 1e-9))
        reached = np.searchsorted(np.cumsum(self.counts), rank)
        return math.inf if reached == len(self.counts) else float(VALUES_US[reached]) / 1000

    @property
    def max_ms(self) -> float:
        """The slowest answer."""
        answered = np.flatnonzero(self.counts)
        return float(VALUES_US[answered[-1]]) / 1000 if len(answered) else math.nan

    @property
    def mean_ms(self) -> float:
        """Mean over the answered requests."""
        answered = self.counts.sum()
        return float(self.counts @ VALUES_US / answered) / 1000 if answered else math.nan

    def density(self, edges_ms: np.ndarray) -> np.ndarray:
        """Answered requests between successive edges."""
        cumulated = np.concatenate([[0], np.cumsum(self.counts)])
        return np.diff(cumulated[np.searchsorted(VALUES_US, edges_ms * 1000, side="right")])


@dataclass
class Second:
    """One second of a run, all workers together."""

    second: int
    planned: int = 0
    attempted: int = 0
    ok: int = 0
    completed: int = 0
    dropped: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies: dict[Latency, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    """Places of a histogram that are not 0, and their counts, of each worker: whole ones would fill the memory."""

    def add(self, row: dict[str, Any]) -> None:
        """Adds what one worker counted."""
        for name in ("planned", "attempted", "ok", "completed", "dropped"):
            setattr(self, name, getattr(self, name) + row[name])
        self.errors.update(row["errors"])
        for kind in KINDS:
            if kind in row:
                counts = np.ctypeslib.as_array(HdrHistogram.decode(row[kind]).counts)
                places = np.flatnonzero(counts)
                self.latencies.setdefault(kind, []).append((places, counts[places].astype(np.int64)))

    @property
    def failed(self) -> int:
        """Errors and drops."""
        return self.errors.total() + self.dropped

    def latency(self, kind: Latency) -> Distribution:
        """Latencies of the requests planned in this second."""
        return _distribution([self], kind, self.failed)


def _distribution(seconds: list[Second], kind: Latency, failed: int) -> Distribution:
    counts = np.zeros(len(VALUES_US), np.int64)
    for second in seconds:
        for places, found in second.latencies.get(kind, ()):
            counts[places] += found
    return Distribution(counts, failed)


@dataclass(frozen=True)
class Stretch:
    """Some seconds of a run, put together: counts, rates and latencies."""

    settings: Settings
    seconds: list[Second]
    duration_s: float

    @property
    def planned(self) -> int:
        """Requests that it was to have; in a closed loop those that it had."""
        return sum(each.planned if self.settings.open_loop else each.ok + each.failed for each in self.seconds)

    @property
    def ok(self) -> int:
        """Requests answered, whenever."""
        return sum(each.ok for each in self.seconds)

    @property
    def failed(self) -> int:
        """Requests planned and not answered: errors, time-outs, drops."""
        return sum(each.failed for each in self.seconds)

    @property
    def unsent(self) -> int:
        """Requests of which the generator lost sight: its own failure, not the server's."""
        return self.planned - self.ok - self.failed

    @property
    def errors(self) -> Counter[str]:
        """Failures by kind."""
        kinds = sum((each.errors for each in self.seconds), Counter())
        dropped = sum(each.dropped for each in self.seconds)
        return kinds + Counter({"dropped": dropped})

    @property
    def throughput_rps(self) -> float:
        """Good answers that came within these seconds, a second."""
        return sum(each.completed for each in self.seconds) / self.duration_s

    @property
    def attempted_share(self) -> float:
        """Requests that the generator took up within these seconds, of those planned in them; 1 in a closed loop."""
        if not self.settings.open_loop or not self.planned:
            return 1.0
        return min(1.0, sum(each.attempted for each in self.seconds) / self.planned)

    def latency(self, kind: Latency) -> Distribution:
        """All latencies of these seconds."""
        return _distribution(self.seconds, kind, 0 if kind == "lag" else self.failed)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as its folder has it."""

    folder: Path
    settings: Settings
    started_at: str
    generator: dict[str, Any]
    server: dict[str, Any]
    machine: dict[str, Any]
    quality: dict[str, dict[str, Any]]
    """Task metric -> `seen`, `baseline` (fp32 PyTorch) and `source`, of what was served; empty where not known."""
    seconds: tuple[Second, ...]
    """In order; the warm-up's are below 0, those after the window (late answers) at `duration_s` and above."""
    lengths: dict[str, Stretch]
    """The window by the lengths of what was sent, shortest first; empty where all inputs are of one length."""

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Reads a run's folder; InputError in one line where it is not one."""
        folder = Path(folder)
        try:
            text = (folder / "run.json").read_bytes()
            with _readable(folder / "run.json", "it"):
                json.loads(text)
            head = RunFile.model_validate_json(text)
            lines = (folder / "seconds.jsonl").read_bytes().splitlines()
        except OSError as error:
            raise InputError(f"{folder}: not a load test run ({error.strerror}: {error.filename})") from None
        except ValidationError as error:
            raise _unreadable(folder / "run.json", ": ".join(filter(None, first_error(error, RunFile)))) from None
        if head.rows not in (None, len(lines)):
            raise _unreadable(folder / "seconds.jsonl", f"{len(lines)} rows of {head.rows}")
        seconds: dict[int, Second] = {}
        for number, line in enumerate(lines, start=1):
            with _readable(folder / "seconds.jsonl", f"line {number}"):
                row = json.loads(line)
                seconds.setdefault(row["second"], Second(row["second"])).add(row)
        with _readable(folder / "run.json", "lengths"):
            lengths = _lengths(head.settings, head.lengths)
        return cls(
            folder=folder,
            seconds=tuple(seconds[second] for second in sorted(seconds)),
            lengths=lengths,
            **{name: getattr(head, name) for name in type(head).model_fields if name not in ("lengths", "rows")},
        )

    @cached_property
    def window(self) -> Stretch:
        """What was measured, without warm-up and late answers."""
        inside = [second for second in self.seconds if 0 <= second.second < self.settings.duration_s]
        return Stretch(self.settings, inside, self.settings.duration_s)

    def at_rate(self, rate_rps: float) -> Stretch | None:
        """The part of the window whose planned rate was this all along; None where there is none."""
        seconds: list[Second] = []
        start = total = 0.0
        for segment in self.settings.segments:
            end = start + segment.duration_s
            if segment.rate_rps == rate_rps and segment.end_rps in (None, rate_rps):
                seconds += [second for second in self.window.seconds if start <= second.second < end]
                total += segment.duration_s
            start = end
        return Stretch(self.settings, seconds, total) if total else None

    @property
    def rates_rps(self) -> list[float]:
        """The rates that were held for a while."""
        return self.settings.rates_rps

    @property
    def judged(self) -> Latency:
        """What the SLO is about: intended latency, which a closed loop does not have."""
        return "intended" if self.settings.open_loop else "service"


class RunFile(Table):
    """`run.json`."""

    settings: Settings
    started_at: str
    generator: dict[str, Any]
    server: dict[str, Any]
    machine: dict[str, Any]
    quality: dict[str, dict[str, Any]]
    lengths: list[dict[str, Any]] = []
    rows: int | None = None
    """Of seconds.jsonl; None in runs of earlier versions."""


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(f"{path}: {why}; it is damaged or of another version, measure anew with: make loadtest")


@contextmanager
def _readable(path: Path, place: str) -> Iterator[None]:
    """InputError where counts or histograms are not what they have to be."""
    try:
        yield
    except Exception as error:  # the histograms' decoder has a dozen of its own
        shown = type(error).__name__ if isinstance(error, UnicodeError) else f"{type(error).__name__} {error}".strip()
        raise _unreadable(path, f"{place} cannot be read ({shown})") from None


def _lengths(settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Stretch]:
    """The rows of all workers by class, shortest first."""
    found: dict[str, Second] = {}
    for row in rows:
        found.setdefault(row["length"], Second(0)).add(row)
    ordered = sorted(found, key=lambda length: [int(number) for number in re.findall(r"\b\d+\b", length)])
    return {length: Stretch(settings, [found[length]], settings.duration_s) for length in ordered}


def runs_folder(name: str) -> Path:
    """Where a model's runs lie."""
    return build_dir(name) / "loadtests"


def latest_run(name: str) -> Path:
    """The newest complete run of a model."""
    found = sorted(path.parent for path in runs_folder(name).glob("[!.]*/run.json"))
    if not found:
        raise InputError(f"no load test of {name} in {runs_folder(name)}; make one with: make loadtest")
    return found[-1]


@contextmanager
def new_run(folder: Path) -> Iterator[Path]:
    """A draft to write a run into that is to lie in `folder`; it is gone after the block, unless `publish` took it."""
    with scratch_in(folder) as scratch:
        draft = scratch / "run"
        draft.mkdir()
        yield draft


def publish(draft: Path, name: str | None = None) -> Path:
    """Puts a complete draft in its place; the name is the time, so that names sort by age."""
    return draft.rename(draft.parent.parent / (name or name_of_now()))


def name_of_now() -> str:
    """What a run that is complete now is called."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")[:-3] + "Z"
