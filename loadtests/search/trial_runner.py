"""Runs trials of one model on one server: each is an open-loop run, judged by the SLO at its rate.

Contract: a trial is a run as `loadtests.load.loadtest` makes it. Its folder is kept and can be judged or drawn again.

Example:
    runner = TrialRunner(spec=spec, settings=settings, served=served, folder=folder, console=console)
    runner(120.0, "bisect", duration_s=10, seed=3).outcome      # "holds"
    RateSearch(runner.plan(start_rps=100, duration_s=10), runner).run()
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepseek_client import InferenceClient, InferenceError, ModelMetadata
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement
from loadtests.load.measure import measure
from loadtests.load.preflight import check
from loadtests.results.run import Run
from loadtests.results.settings import LoadSettings
from loadtests.search.highest_rate import SearchPlan
from loadtests.search.rate_trial import Phase, RateTrial
from loadtests.search.slo_at_rate import MOST_PROOFS, bound_rates, seconds_needed, seconds_to_prove, slo_at
from loadtests.slo.slo_demands import in_flight_for

DEFAULT_START_RPS = 50.0  # of a search, if the SLO names no rate


@dataclass(frozen=True, kw_only=True)
class TrialRunner:
    """The settings that the trials of a search share; a call runs one trial."""

    spec: DeploymentSpec
    """With the SLO of the target."""
    settings: LoadSettings
    """For every trial; rate, length and seed are set for each."""
    served: ModelMetadata
    folder: Path
    """For the runs; kept apart from the model's load tests, since `deepseek verdict` judges the latest of those."""
    console: Console
    machine: dict[str, Any] = field(default_factory=dict)
    """The load generator's machine; filled by the first run."""

    @classmethod
    def at(cls, spec: DeploymentSpec, settings: LoadSettings, folder: Path, console: Console) -> "TrialRunner":
        """On a server that has just started; InputError if it does not serve the model of the spec."""
        served = check(replace(settings, users=1), spec)
        return cls(spec=spec, settings=settings, served=served, folder=folder, console=console)

    def plan(self, *, start_rps: float, duration_s: float, prove: bool = False, **bounds: Any) -> SearchPlan:
        """A search plan with the stops and trial lengths that the SLO needs; `prove` the result with confidence."""
        slo = self.spec.slo
        return SearchPlan(
            start_rps=start_rps,
            duration_s=duration_s,
            stops_rps=tuple(bound_rates(slo)),
            needed_s=lambda rate_rps: seconds_needed(slo, rate_rps),
            proof_s=(lambda rate_rps: seconds_to_prove(slo, rate_rps)) if prove else None,
            **bounds,
        )

    def __call__(self, rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        if not self.settings.max_in_flight:  # else the user's own limit counts
            try:
                in_flight_for(replace(self.settings, rate_rps=rate_rps, duration_s=duration_s), self.spec.slo)
            except InputError as error:  # the generator cannot send at this rate
                about: dict[str, Any] = {"rate_rps": rate_rps, "phase": phase, "duration_s": duration_s}
                return RateTrial(outcome="invalid", problems=(str(error),), **about)
        looks = MOST_PROOFS if phase == "prove" else 1
        run = self.run(rate_rps=rate_rps, duration_s=duration_s, seed=seed, looks=looks)
        return RateTrial.of_run(run, slo_at(self.spec.slo, rate_rps, duration_s), phase)

    def run(self, **changes: Any) -> Run:
        """One run with these settings changed; InvalidMeasurement if the server no longer answers after it."""
        run = measure(replace(self.settings, **changes), self.spec, self.served, self.console, self.folder)
        self.machine.update(run.machine)
        lost = run.window.errors["Unreachable"] + run.window.errors["ConnectionLost"]
        if lost and not ready(self.settings):
            raise InvalidMeasurement(
                f"{self.settings.model} at {self.settings.url} no longer answers: {lost} of {run.window.planned} "
                "requests lost their connection or could not connect; read the server's log, restart it and re-run"
            )
        return run


def ready(settings: LoadSettings) -> bool:
    try:
        with InferenceClient(
            settings.url, settings.protocol, timeout_s=settings.timeout_s, retries=2, **settings.access
        ) as client:
            return client.ready(settings.model)
    except InferenceError:
        return False
