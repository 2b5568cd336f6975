"""The results of a load test, stored in one folder.

Contract: seconds count from the start of the measured window; the warm-up is below 0. A request belongs to the second
for which it was *planned*, even if it was answered later. A run's folder, `build/<name>/loadtests/<time>/`, appears
atomically:
    run.json        settings, machine, versions, the generator's health, the server's statistics; also counts and
                    histograms of the window by length, if the inputs have several lengths
    seconds.jsonl   one line per second (and worker): counts, errors by kind with one message, encoded histograms
The models of a mix have one folder each, all with the same name.

Example:
    Run.load(latest_run("recommender")).window.latency("intended").percentile_ms(99)
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepseek.spec import InputError, build_dir, variables_for
from deepseek.spec.checks import Table, first_error
from deepseek.spec.files.folders import alone_in, scratch_in, time_name
from loadtests.results.histogram import Latency
from loadtests.results.settings import LoadSettings
from loadtests.results.stretch import Second, Stretch


@dataclass(frozen=True, kw_only=True)
class Run:
    folder: Path
    settings: LoadSettings
    started_at: str
    generator: dict[str, Any]
    server: dict[str, Any]
    machine: dict[str, Any]
    quality: dict[str, dict[str, Any]]
    """Task metric -> `seen`, `baseline` (fp32 PyTorch) and `source` for the served model; empty if not measured."""
    seconds: tuple[Second, ...]
    """In order; the warm-up is below 0, late answers after the window at `duration_s` and above."""
    lengths: dict[str, Stretch]
    """The window by the lengths of the inputs, shortest first; empty if all inputs have one length."""

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Reads a run's folder; InputError if it is not one or is damaged."""
        folder = Path(folder)
        try:
            head = RunFile.model_validate_json((folder / "run.json").read_bytes())
            lines = (folder / "seconds.jsonl").read_bytes().splitlines()
        except OSError as error:
            raise InputError(f"{folder}: not a load test run ({error.strerror}: {error.filename})") from None
        except ValidationError as error:
            raise _unreadable(folder / "run.json", ": ".join(filter(None, first_error(error, RunFile)))) from None
        if head.rows != len(lines):
            raise _unreadable(folder / "seconds.jsonl", f"{len(lines)} rows of {head.rows}")
        seconds: dict[int, Second] = {}
        lengths: dict[str, Second] = {}
        place = folder / "run.json"
        try:
            for row in head.lengths:
                lengths.setdefault(row["length"], Second(0)).add(row)
            place = folder / "seconds.jsonl"
            for row in map(json.loads, lines):
                seconds.setdefault(row["second"], Second(row["second"])).add(row)
        except Exception as error:  # the histograms' decoder has a dozen error types
            raise _unreadable(place, f"counts cannot be read ({type(error).__name__})") from None
        return cls(
            folder=folder,
            seconds=tuple(seconds[second] for second in sorted(seconds)),
            lengths={
                name: Stretch(head.settings, [lengths[name]], head.settings.duration_s)
                for name in sorted(lengths, key=lambda name: [int(size) for size in re.findall(r"\b\d+\b", name)])
            },
            **{name: getattr(head, name) for name in type(head).model_fields if name not in ("lengths", "rows")},
        )

    @cached_property
    def window(self) -> Stretch:
        """The measured window, without warm-up and late answers; it has every second."""
        found, duration_s = {each.second: each for each in self.seconds}, self.settings.duration_s
        nothing = Second(0)  # a second without a row: all users waited for an answer, or no request was due
        inside = [found.get(second, nothing) for second in range(math.ceil(duration_s))]
        return Stretch(self.settings, inside, duration_s)

    def at_rate(self, rate_rps: float | None) -> Stretch | None:
        """The part of the window with exactly this planned rate, if it has one. Without a rate: the window."""
        if rate_rps is None:
            return self.window
        seconds: list[Second] = []
        start = total = 0.0
        for segment in self.settings.segments:
            end = start + segment.duration_s
            if segment.rate_rps == rate_rps and segment.end_rps in (None, rate_rps):
                seconds += self.window.seconds[math.ceil(start) : math.ceil(end)]
                total += segment.duration_s
            start = end
        return Stretch(self.settings, seconds, total) if total else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens/s of the answered requests, if the run sent texts."""
        tokens = sum(second.tokens for part in self.lengths.values() for second in part.seconds)
        return tokens / self.settings.duration_s if tokens else None

    @property
    def latencies(self) -> tuple[Latency, ...]:
        """The latencies to show. The SLO limits the first: intended latency, or service latency in a closed loop."""
        return ("intended", "service") if self.settings.open_loop else ("service",)

    @property
    def judged(self) -> Latency:
        """The latency that the SLO limits."""
        return self.latencies[0]


class RunFile(Table):
    settings: LoadSettings
    started_at: str
    generator: dict[str, bool | int | float]
    server: dict[str, Any]
    machine: dict[str, Any]
    quality: dict[str, dict[str, Any]]
    lengths: list[dict[str, Any]]
    rows: int
    """Lines of seconds.jsonl."""


def _unreadable(path: Path, why: str) -> InputError:
    runs = path.absolute().parent.parent  # build/<model>/loadtests, if it was not moved
    command = f"make loadtest {variables_for(runs.parent.name)}" if runs.name == "loadtests" else "make loadtest"
    return InputError(f"{path}: {why}; it is damaged or from another version, measure again with: {command}")


def runs_folder(name: str) -> Path:
    return build_dir(name) / "loadtests"


def latest_run(name: str) -> Path:
    found = sorted(path.parent for path in runs_folder(name).glob("[0-9]*/run.json"))
    if not found:
        hint = f"make one with: make loadtest {variables_for(name)}"
        raise InputError(f"no load test of {name} in {runs_folder(name)}; {hint}")
    return found[-1]


@contextmanager
def new_run(folder: Path) -> Iterator[Path]:
    """A draft folder for a run below `folder`; it is deleted after the block unless `publish` moved it."""
    with scratch_in(folder) as scratch:
        draft = scratch / "run"
        draft.mkdir()
        yield draft


def publish(*drafts: Path) -> list[Path]:
    """Moves complete drafts to their places, under one name. It is the time, so that names sort by age."""
    folders = {draft.parent.parent for draft in drafts}
    with ExitStack() as stack:
        for folder in sorted(folders):  # runs that end together must not take the same name
            stack.enter_context(alone_in(folder))
        name = time_name(*folders)
        return [draft.rename(draft.parent.parent / name) for draft in drafts]
