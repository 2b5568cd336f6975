"""A setting as it is served: published into a repository of its own, a real server over it, real load on it.

Contract: publishing and serving are other processes (`python -m export.to_triton`, `python -m serving.embedded` or
another command), so that what is measured is what is deployed. A server ends with its `with` block, and with this
process, however that ends.

Example:
    with contender(setting, place, "a") as served:
        served.throughput_rps(users=32, duration_s=6)
        served.try_rate(120).outcome        # "holds"
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from deepseek.spec import DeploymentSpec, Precision, PublishedManifest, TunedFile
from loadtests.check import check
from loadtests.local_server import NotServed, last_line, local_server, our_environment
from loadtests.measure import measure
from loadtests.results import Settings
from loadtests.slo import generator_problems
from loadtests.trial import Trial, Trials, seconds_needed
from loadtests.tuning import Setting


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how contenders are served and loaded; the same for all of one search."""

    spec: DeploymentSpec
    """With the target's SLO in place, without tuned values."""
    settings: Settings
    """Of every load, but for its URL, rate and length."""
    precision: Precision | None
    """None: what `export.compare` chose."""
    server: str
    """Command with {repository}, {http_port}, {grpc_port} and {metrics_port}."""
    folder: Path
    least_s: float
    """Of a trial; longer where the SLO's percentiles need more samples."""
    console: Console


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A setting that is being served."""

    setting: Setting
    trials: Trials
    manifest: PublishedManifest
    least_s: float
    machine: dict[str, Any] = field(default_factory=dict)
    """The load generator's, known after the first load."""

    def throughput_rps(self, users: int, duration_s: float) -> float:
        """Answers/s in a closed loop."""
        settings = replace(self.trials.settings, users=users, rate_rps=None, duration_s=float(math.ceil(duration_s)))
        trials = self.trials
        run = measure(settings, trials.spec, trials.served, trials.console, trials.folder)
        self.machine.update(run.machine)
        if problems := generator_problems(run, self.trials.spec.slo):
            self.trials.console.print(f"note: closed loop of {users}: {problems[0]}")
        return run.window.throughput_rps

    def try_rate(self, rate_rps: float, seed: int = 0, *, phase: Literal["bisect", "confirm"] = "bisect") -> Trial:
        """One open-loop run, judged."""
        needed_s = seconds_needed(self.trials.spec.slo, rate_rps)
        return self.trials(rate_rps, phase, float(math.ceil(max(self.least_s, needed_s))), seed)

    def trial_s(self, rate_rps: float) -> float:
        """About how long `try_rate` takes, warm-up and start of the generator included."""
        return max(self.least_s, seconds_needed(self.trials.spec.slo, rate_rps)) + self.trials.settings.warmup_s + 3


@contextmanager
def contender(setting: Setting, place: Place, name: str) -> Iterator[Contender]:
    """Publishes a setting and serves it while the block runs; NotServed where that does not work."""
    folder = place.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        manifest = publish(setting, place, folder)
        protocol, model = place.settings.protocol, place.settings.model
        with local_server(place.server, folder / "repository", folder, protocol=protocol, model=model) as server:
            settings = replace(place.settings, url=server.url)
            served = check(replace(settings, rate_rps=None, users=1), place.spec)
            trials = Trials(
                spec=place.spec, settings=settings, served=served, folder=place.folder / "runs", console=place.console
            )
            yield Contender(setting=setting, trials=trials, manifest=manifest, least_s=place.least_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(setting: Setting, place: Place, folder: Path) -> PublishedManifest:
    """Makes `folder/repository` as `make engine` would with these tuned values; returns the manifest of its engine."""
    settings, tuned = place.settings, folder / "tuned.toml"
    folder.mkdir(parents=True, exist_ok=True)
    TunedFile(targets={settings.target: setting.tuned()}).write(tuned)
    command = [sys.executable, "-m", "export.to_triton", "--model", settings.model, "--models", settings.models]
    command += ["--target", settings.target, "--tuned", str(tuned), "--repository", str(folder / "repository")]
    command += ["--precision", place.precision] if place.precision else []
    run = subprocess.run(command, capture_output=True, text=True, env=our_environment())
    if run.returncode:
        raise NotServed(last_line(run.stderr) or f"export.to_triton ended with status {run.returncode}")
    return PublishedManifest.load(folder / "repository" / settings.model / "1" / "manifest.json")
