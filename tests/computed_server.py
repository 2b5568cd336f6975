"""Trials on simulated servers: a function of the rate gives the outcome, without delay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_client import ModelMetadata
from rich.console import Console

from deepseek.spec import DeploymentSpec, SloSpec
from loadtests.search.highest_rate import TryRate
from loadtests.search.rate_trial import Phase, RateTrial, TrialOutcome
from loadtests.search.trial_runner import TrialRunner
from tests.saved_runs import load_settings


def trial(rate_rps: float, outcome: TrialOutcome, phase: Phase = "bisect", **changes: Any) -> RateTrial:
    facts: dict[str, Any] = {
        "achieved_rps": rate_rps,
        "p50_ms": 5.0,
        "p99_ms": 20.0,
        "duration_s": 10.0,
        "run": "a run",
    }
    facts |= {"failed": ("p99_ms",) if outcome == "fails" else (), **changes}
    return RateTrial(rate_rps=rate_rps, phase=phase, outcome=outcome, **facts)


def server_of(outcome: Callable[[float, Phase], TrialOutcome]) -> TryRate:
    return lambda rate_rps, phase, duration_s, seed: trial(
        rate_rps, outcome(rate_rps, phase), phase, duration_s=duration_s
    )


@dataclass(frozen=True, kw_only=True)
class ComputedRunner(TrialRunner):
    try_rate: TryRate

    def __call__(self, rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        return self.try_rate(rate_rps, phase, duration_s, seed)


def runner(folder: Path, try_rate: TryRate | None = None, slo: SloSpec | None = None) -> TrialRunner:
    """Trials of the model `image`; on a simulated server if `try_rate` is given."""
    spec = DeploymentSpec.load("tests/models/image")
    spec = spec.model_copy(update={"slo": slo or spec.slo})
    served = ModelMetadata(name="image", versions=("1",), platform="", inputs=(), outputs=(), max_batch_size=8)
    settings = load_settings(model="image", url="nowhere:1", tls=True)  # a gateway: nothing else is queried
    fixed: dict[str, Any] = {"spec": spec, "settings": settings, "served": served, "folder": folder}
    fixed["console"] = Console(stderr=True)
    return TrialRunner(**fixed) if try_rate is None else ComputedRunner(**fixed, try_rate=try_rate)
