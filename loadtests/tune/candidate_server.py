"""Serves a candidate: publishes it into a repository of its own and starts a real server over it.

Contract: publishing and serving run as separate processes, as in a deployment. A server ends with its `with` block, and
also if this process is killed.

Example:
    with candidate_server(settings, conditions, "a") as server:
        server.throughput_rps(users=32, duration_s=6)
        server.try_rate(120, seed=1).outcome        # "holds"
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from deepseek.spec import DeploymentSpec, Precision, PublishedManifest, TunedFile
from loadtests.load.child_process import our_environment
from loadtests.load.preflight import check
from loadtests.results.settings import LoadSettings
from loadtests.search.highest_rate import SearchPlan
from loadtests.search.local_server import NotServed, last_line, local_server
from loadtests.search.rate_trial import RateTrial
from loadtests.search.slo_at_rate import seconds_needed
from loadtests.search.trial_runner import TrialRunner
from loadtests.slo.generator_health import generator_problems
from loadtests.tune.search_space import ServingSettings

START_S = 3.0  # about what the load generator takes to start, for each trial
MOST_TRIALS = 100  # of one search for a rate: in practice the time ends it


class TimeUp(Exception):
    """The time left does not allow another trial; the message says why, and is empty if no time is left."""


@dataclass(frozen=True, kw_only=True)
class TuneConditions:
    """How candidates are served and loaded; the same for every candidate of a search."""

    spec: DeploymentSpec
    """With the SLO of the target, without tuned values."""
    settings: LoadSettings
    """For every load; URL, rate and length are set for each."""
    precision: Precision | None
    """None: the one that `export.stages.select_precision` chose."""
    server: str
    """Command with {repository}, {http_port}, {grpc_port} and {metrics_port}."""
    folder: Path
    least_s: float
    """Minimum length of a trial; longer if the SLO's percentiles need more samples."""
    ends_at: float
    """End of the whole search, in the time of `time.monotonic()`."""
    console: Console


@dataclass(frozen=True, kw_only=True)
class CandidateServer:
    """A running server with a candidate."""

    settings: ServingSettings
    conditions: TuneConditions
    published: PublishedManifest
    runner: TrialRunner

    def throughput_rps(self, users: int, duration_s: float) -> float:
        """Answers/s in a closed loop of `users`."""
        run = self.runner.run(users=users, rate_rps=None, duration_s=float(math.ceil(duration_s)))
        if problems := generator_problems(run, self.runner.spec.slo):
            self.runner.console.print(f"note: closed loop of {users}: {problems[0]}")
        return run.window.throughput_rps

    def try_rate(self, rate_rps: float, seed: int) -> RateTrial:
        """One open-loop run, judged; TimeUp if too little time is left."""
        needed_s = seconds_needed(self.runner.spec.slo, rate_rps)
        duration_s = float(math.ceil(max(self.conditions.least_s, needed_s)))
        takes_s, left_s = duration_s + self._overhead_s, self._left_s
        if takes_s > left_s:
            raise TimeUp(f"a trial at {rate_rps:.3g}/s takes {takes_s:.0f} s, {max(left_s, 0):.0f} s are left")
        return self.runner(rate_rps, "bisect", duration_s, seed)

    def plan(self, start_rps: float, **bounds: Any) -> SearchPlan:
        """The plan of a search for the highest rate, without the confirming walk, within the time left."""
        return self.runner.plan(
            start_rps=start_rps,
            duration_s=self.conditions.least_s,
            confirm=False,
            max_trials=MOST_TRIALS,
            max_s=self._left_s,
            overhead_s=self._overhead_s,
            **bounds,
        )

    @property
    def _left_s(self) -> float:
        return self.conditions.ends_at - time.monotonic()

    @property
    def _overhead_s(self) -> float:
        return self.runner.settings.warmup_s + START_S


@contextmanager
def candidate_server(settings: ServingSettings, conditions: TuneConditions, name: str) -> Iterator[CandidateServer]:
    """Publishes a candidate and serves it while the block runs; NotServed if either fails."""
    folder = conditions.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        published = publish(settings, conditions, folder)
        protocol, model = conditions.settings.protocol, conditions.settings.model
        repository = folder / "repository"
        with local_server(conditions.server, repository, folder, protocol=protocol, model=model) as server:
            load = replace(conditions.settings, url=server.url)
            runner = TrialRunner(
                spec=conditions.spec,
                settings=load,
                served=check(replace(load, users=1), conditions.spec),
                folder=conditions.folder / "runs",
                console=conditions.console,
            )
            yield CandidateServer(settings=settings, conditions=conditions, published=published, runner=runner)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(settings: ServingSettings, conditions: TuneConditions, folder: Path) -> PublishedManifest:
    """Publishes to `folder/repository`, as `make engine` does with these tuned values; returns the manifest."""
    load, tuned = conditions.settings, folder / "tuned.toml"
    folder.mkdir(parents=True, exist_ok=True)
    TunedFile(targets={load.target: settings.tuned()}).write(tuned)
    command = [sys.executable, "-m", "cli", "publish", "--model", load.model, "--models", load.models]
    command += ["--target", load.target, "--tuned", str(tuned), "--repository", str(folder / "repository")]
    command += ["--precision", conditions.precision] if conditions.precision else []
    run = subprocess.run(command, capture_output=True, text=True, env=our_environment())
    if run.returncode:
        raise NotServed(last_line(run.stderr) or f"export.stages.publish ended with status {run.returncode}")
    return PublishedManifest.load(folder / "repository" / load.model / "1" / "manifest.json")
