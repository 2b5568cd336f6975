"""Finds the highest rate at which a server meets every objective of its SLO.

Contract: `loadtests.search.highest_rate` chooses the rates, `loadtests.search.trial_runner` runs and judges a trial at
each. The result is written atomically to `build/<model>/capacity.json` and drawn as `capacity.html`. The runs of the
trials are kept under `build/<model>/capacity/`. docs/capacity.md says what an objective means at each rate.

Exit codes: 0 found and confirmed; 1 no rate holds, or the SLO is violated at its own rate; 2 bad input or no server;
3 inconclusive (`Capacity.exit_code`).
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek.spec import DeploymentSpec, GateFailed, InputError, SloSpec, build_dir, variables_for
from deepseek.spec.command import end_at_sigterm
from deepseek.spec.files.folders import time_name, write_whole
from loadtests.load.preflight import check
from loadtests.load.settings_from_options import inputs_of, settings_fields
from loadtests.percentiles import ms
from loadtests.report.searches import capacity_page
from loadtests.results.settings import LoadSettings
from loadtests.search.capacity_result import Capacity, ServerSettings, capacity_path
from loadtests.search.highest_rate import CONFIRM_LONGER, RateSearch, SearchPlan
from loadtests.search.rate_trial import RateTrial, TrialOutcome
from loadtests.search.slo_at_rate import bound_rates, objective_lines, quality_of, required_rps
from loadtests.search.trial_runner import DEFAULT_START_RPS, TrialRunner

STYLES: dict[TrialOutcome, str] = {"holds": "green", "fails": "red", "invalid": "yellow", "inconclusive": "yellow"}
BAR = 12  # characters of the longest latency bar


def main(options: argparse.Namespace) -> int:
    """Checks the server, searches, saves and draws the result, prints it; returns the exit code."""
    end_at_sigterm()
    spec = DeploymentSpec.of_model(options.model, options.models).for_target(options.target)
    inputs = options.inputs or inputs_of(options.model)
    settings = LoadSettings(model=options.model, inputs=inputs, **settings_fields(options, spec.slo))
    start_rps = first_rate(options.start_rps, spec.slo)
    trial_s = options.duration_s / CONFIRM_LONGER
    served = check(replace(settings, rate_rps=start_rps, duration_s=float(max(1, round(trial_s)))), spec)
    violated, unknown = quality_of(spec, settings, served)
    if violated:
        raise GateFailed(f"{'; '.join(violated)}: quality does not depend on the load, so no rate meets the SLO")
    console = Console(stderr=True, markup=False)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    kept = build_dir(options.model) / "capacity"
    runner = TrialRunner(spec=spec, settings=settings, served=served, folder=kept / time_name(kept), console=console)
    plan = runner.plan(
        start_rps=start_rps,
        duration_s=trial_s,
        max_trials=options.max_trials,
        max_s=options.max_s,
        prove=True,
    )
    least_s = math.ceil(max(plan.duration_s, plan.needed_s(start_rps)))
    if least_s >= options.max_s:  # some of the time has passed when the first trial begins
        first = f"the first trial, at {start_rps:g}/s, takes {least_s} s"
        raise InputError(f"--max-s {options.max_s:g}: {first}; give ten times that or more (BUDGET_S=)")
    lines = ", ".join(objective_lines(spec.slo))
    console.print(f"{settings.model} over {settings.over} at {settings.place}: {lines}", soft_wrap=True)
    for line in unknown:
        how = f"make parity {variables_for(settings.model)}"
        console.print(f"note: {line} is skipped: not measured for the served model; run: {how}", soft_wrap=True)
    capacity = find(runner, plan, started)
    path = capacity_path(options.model)
    capacity.save(path)
    write_whole(path.with_suffix(".html"), capacity_page(capacity))
    if options.json:
        print(capacity.model_dump_json(indent=2))
    else:
        Console(width=max(Console().width, 100), markup=False).print(table(capacity.trials, capacity.capacity_rps))
        Console(markup=False).print(capacity.sentence, style="bold", soft_wrap=True)
        print(path, path.with_suffix(".html"), sep="\n")
    return capacity.exit_code


def first_rate(asked_rps: float | None, slo: SloSpec) -> float:
    """The first rate of the bracket: `asked_rps`, or the lowest rate that the SLO names."""
    named = [*bound_rates(slo), *([slo.rate_rps] if slo.rate_rps else [])]
    return asked_rps or min(named, default=DEFAULT_START_RPS)


def find(runner: TrialRunner, plan: SearchPlan, started: str) -> Capacity:
    """Runs the search; if it is interrupted, prints the trials so far."""
    console, settings, served = runner.console, runner.settings, runner.served
    search = RateSearch(plan, runner, show=lambda trial: console.print(trial_line(trial), soft_wrap=True))
    try:
        found = search.run()
    except BaseException:
        if search.trials:
            console.print(table(search.trials, None), width=max(console.width, 100))
        raise
    machine = dict(runner.machine)
    return Capacity(
        model=settings.model,
        target=settings.target,
        precision=served.parameters.get("precision"),
        served_versions=served.versions,
        url=settings.place,
        protocol=settings.over,
        objectives=objective_lines(runner.spec.slo),
        trials=tuple(search.trials),
        **asdict(found),
        required_rps=required_rps(runner.spec.slo),
        settings=ServerSettings.of(served),
        versions=machine.pop("versions", {}),
        machine=machine,
        started=started,
    )


def trial_line(trial: RateTrial) -> Text:
    found = f"p99 {ms(trial.p99_ms)}, {trial.error_rate:.2%} errors" if trial.sent else "not sent"
    head = f"{trial.phase:<8} {trial.rate_rps:>7g}/s  {found:<32} "
    why = f" ({trial.reason})" if trial.failed or trial.problems else ""
    return Text.assemble(head, (trial.outcome, STYLES[trial.outcome]), why)


def table(trials: Sequence[RateTrial], capacity_rps: float | None) -> Table:
    """The trials by rate, with the latency as a bar and the capacity marked."""
    columns = Table("rate", "")
    for name in ("answered", "p50", "p99"):
        columns.add_column(name, no_wrap=True)
    columns.add_column(no_wrap=True, min_width=BAR)
    columns.add_column("errors")
    columns.add_column("outcome", no_wrap=True)
    slowest = max((trial.p99_ms for trial in trials if trial.p99_ms), default=1.0)
    proofs = [trial for trial in trials if trial.rate_rps == capacity_rps and trial.outcome == "holds"]
    for trial in sorted(trials, key=lambda each: (each.rate_rps, each.duration_s)):
        bar = "█" * max(1, round(BAR * trial.p99_ms / slowest)) if trial.p99_ms else "∞"
        mark = ("◀ capacity" if trial in proofs[-1:] else "", "bold")
        outcome = Text.assemble((trial.outcome, STYLES[trial.outcome]), f" {_first(trial.failed)}", mark)
        answered, errors = f"{trial.achieved_rps:.1f}/s", f"{trial.error_rate:.2%}"
        figures = (answered, ms(trial.p50_ms), ms(trial.p99_ms), bar, errors)
        if not trial.sent:
            figures = ("-", "-", "-", "", "-")
        columns.add_row(f"{trial.rate_rps:g}/s", trial.phase, *figures, outcome)
    return columns


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" +{len(names) - 1}" if names[1:] else "") if names else ""
