"""Serves a candidate: publishes it into a repository of its own and starts a real server over it.

Contract: publishing and serving run as separate processes, as in a deployment. A server ends with its `with` block, and
also if this process is killed.

Example:
    with candidate_server(settings, conditions, "a") as server:
        server.p99_ms(120, seed=1)
"""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, Precision, PublishedManifest, TunedFile
from deepseek.spec.objectives import samples_needed
from deepseek.spec.processes.children import last_line, our_environment
from loadtests.load.measure import START_S
from loadtests.results.settings import LoadSettings
from loadtests.search.local_server import local_server
from loadtests.search.slo_at_rate import slo_at
from loadtests.search.trial_runner import TrialRunner
from loadtests.slo.generator_health import generator_problems
from loadtests.tune.search_space import ServingSettings

USERS = 32
LONGEST_BLOCK_S = 30  # at a low rate a block's p99 is its slowest request


class NotValid(Exception):
    """A block, or a pair of them, says nothing about the server; the message says why."""


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
    """Command template for `local_server`."""
    folder: Path
    least_s: float
    """Minimum length of a run; longer if its p99 needs more samples."""
    ends_at: float
    """The end of the whole search, in the time of `time.monotonic()`."""
    console: Console

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic()

    def block_s(self, rate_rps: float) -> int:
        return math.ceil(max(self.least_s, min(LONGEST_BLOCK_S, samples_needed(99) / rate_rps)))

    def pair_s(self, rate_rps: float) -> float:
        """Seconds of a pair of blocks at a rate, with all that a run takes beyond its length."""
        return 2 * (self.block_s(rate_rps) + self.settings.warmup_s + START_S)


@dataclass(frozen=True, kw_only=True)
class CandidateServer:
    settings: ServingSettings
    conditions: TuneConditions
    published: PublishedManifest
    runner: TrialRunner

    def throughput_rps(self) -> float:
        """Answers/s in a closed loop of USERS."""
        run = self.runner.run(users=USERS, rate_rps=None, duration_s=float(math.ceil(self.conditions.least_s)))
        return run.window.throughput_rps

    def p99_ms(self, rate_rps: float, seed: int) -> float:
        """p99 of the intended latency in one short block at a rate; an unanswered request counts with its time-out."""
        duration_s = self.conditions.block_s(rate_rps)
        run = self.runner.run(rate_rps=rate_rps, duration_s=float(duration_s), seed=seed)
        slo = slo_at(self.runner.spec.slo, rate_rps, duration_s)
        if problems := generator_problems(run, slo, compared=True):
            raise NotValid(f"the load generator was the limit: {problems[0]}")
        p99_ms = run.window.latency("intended").percentile_ms(99)
        return p99_ms if math.isfinite(p99_ms) else 1000 * self.runner.settings.timeout_s


@contextmanager
def candidate_server(settings: ServingSettings, conditions: TuneConditions, name: str) -> Iterator[CandidateServer]:
    """Publishes a candidate, as `make engine` does, and serves it while the block runs; InputError if either fails."""
    folder, load = conditions.folder / name, conditions.settings
    repository = folder / "repository"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        run_with(settings, conditions, "publish", folder, "--repository", str(repository))
        published = PublishedManifest.load(repository / load.model / "1" / "manifest.json")
        with local_server(conditions.server, repository, folder, load) as server:
            runner = TrialRunner.at(conditions.spec, server.settings, conditions.folder / "runs", conditions.console)
            yield CandidateServer(settings=settings, conditions=conditions, published=published, runner=runner)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_with(settings: ServingSettings, conditions: TuneConditions, command: str, folder: Path, *more: str) -> None:
    """Runs a command of the build with these settings as tuned values, in a process of its own."""
    load, tuned = conditions.settings, folder / "tuned.toml"
    folder.mkdir(parents=True, exist_ok=True)
    TunedFile(targets={load.target: settings.tuned()}).write(tuned)
    words = [sys.executable, "-m", "cli", command, "--model", load.model, "--models", load.models]
    words += ["--target", load.target, "--tuned", str(tuned), *more]
    words += ["--precision", conditions.precision] if conditions.precision else []
    run = subprocess.run(words, capture_output=True, text=True, env=our_environment())
    tuned.unlink()
    if run.returncode:
        raise InputError(last_line(run.stderr) or f"deepseek {command} ended with status {run.returncode}")
