"""Tests whether a candidate is worse than a baseline on this machine, and writes a table for a pull request.

Baseline and candidate are each a model repository, a version in `--repository` (`recommender/2`), or a folder of
recorded runs. Served versions are measured in turn (`loadtests.regression.interleaved_runs`), then
`loadtests.regression.comparison` judges the runs. The table is printed and written to `build/<model>/regression.md`,
all figures to `regression.json` beside it. The runs stay under `build/<model>/regression/` and can be judged again.

Exit codes: 0 no worse; 1 worse, or the candidate does not load or dies; 2 bad input; 3 inconclusive.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement, build_dir
from deepseek.spec.command import end_at_sigterm
from deepseek.spec.files.folders import time_name, write_whole
from deepseek.spec.objectives import Kind, formatted
from loadtests.regression.compared_version import ComparedVersion
from loadtests.regression.comparison import (
    EXIT_CODES,
    Comparison,
    ComparisonRow,
    Conclusion,
    Thresholds,
    Unit,
    compare,
)
from loadtests.regression.interleaved_runs import InterleavedPlan, interleaved
from loadtests.results.run import Run
from loadtests.search.local_server import server_command, settings_of_local

Versions = tuple[ComparedVersion, ComparedVersion]
TITLES: dict[Conclusion, str] = {
    "no worse": "is no worse than",
    "worse": "is worse than",
    "inconclusive": "compared with",
}
KINDS: dict[Unit, Kind] = {"ms": "ms", "rps": "throughput", "share": "error_rate"}


def main(options: argparse.Namespace) -> int:
    """Measures or reads the runs, judges them, writes and prints the table; returns the exit code."""
    if options.output and options.output.suffix == ".json":
        raise InputError(f"--output {options.output}: name the Markdown file; the figures go to a .json beside it")
    end_at_sigterm()
    baseline = ComparedVersion.of("baseline", options.base, options.model, options.repository)
    candidate = ComparedVersion.of("candidate", options.new, options.model, options.repository)
    if baseline.recorded != candidate.recorded:
        raise InputError("only one of BASE= and NEW= is a folder of runs; give two folders of runs, or none")
    versions = (baseline, candidate)
    spec = DeploymentSpec.of_model(options.model, options.models).for_target(options.target)
    place = options.output or build_dir(options.model) / "regression.md"
    thresholds = Thresholds(p50=options.threshold / 100, p99=options.threshold_p99 / 100)
    try:
        if baseline.recorded:
            runs = baseline.load_runs(options.model), candidate.load_runs(options.model)
        else:
            runs = measured(versions, options, spec)
        comparison = compare(*runs, spec.slo, thresholds, capacity=not options.no_capacity and not baseline.recorded)
    except (GateFailed, InvalidMeasurement) as error:
        _write(place, *without_figures(error, versions, options.model))
        raise
    machine = runs[0][0].machine
    text, data = markdown(comparison, versions, options.model, machine), as_json(comparison, versions, machine)
    _write(place, text, data)
    print(json.dumps(data, indent=2) if options.json else f"{text}\n{place}")
    return EXIT_CODES[comparison.verdict]


def measured(versions: Versions, options: argparse.Namespace, spec: DeploymentSpec) -> tuple[list[Run], list[Run]]:
    server = server_command(options.server, spec, options.target, options.env_file)
    plan = InterleavedPlan(
        spec=spec,
        settings=settings_of_local(options, spec, server),
        server=server,
        rate_rps=options.rate,
        duration_s=options.duration_s,
        pairs=options.pairs,
        max_s=options.max_s,
        capacity=not options.no_capacity,
        slack=options.threshold_p99 / 100,
    )
    kept = build_dir(options.model) / "regression"
    pairs = interleaved(versions, plan, kept / time_name(kept), Console(stderr=True, markup=False))
    return [baseline for baseline, _ in pairs], [candidate for _, candidate in pairs]


def _write(place: Path, text: str, data: dict[str, Any]) -> None:
    write_whole(place, text)
    write_whole(place.with_suffix(".json"), json.dumps(data, indent=2) + "\n")


def markdown(comparison: Comparison, versions: Versions, model: str, machine: dict[str, Any]) -> str:
    """The table in Markdown, for a pull request."""
    where = f"Measured on {machine.get('cpu', 'an unknown CPU')}, {machine.get('cores', '?')} cores."
    lines = [
        _title(comparison.verdict, versions, model),
        "",
        "| | baseline | candidate | candidate / baseline | interval | allowed | |",
        "|---|--:|--:|--:|--:|--:|---|",
        *map(_line, comparison.rows),
        "",
        f"{comparison.method} {where}",
    ]
    if comparison.dropped:
        baseline, candidate = comparison.dropped_by_side
        lines += [
            "",
            f"{len(comparison.dropped)} runs dropped ({baseline} of the baseline, {candidate} of the candidate), the "
            f"generator was the limit: {comparison.dropped[0]}",
        ]
    if comparison.starves:
        lines += [
            "",
            f"Only runs of the {comparison.starves} were dropped: it takes the load generator's CPU time, so the "
            "runs that are left flatter it. Give the generator cores of its own.",
        ]
    return "\n".join(lines) + "\n"


def _title(verdict: Conclusion, versions: Versions, model: str) -> str:
    baseline, candidate = versions
    inconclusive = ": inconclusive" * (verdict == "inconclusive")
    return f"### {model}: `{candidate.given}` {TITLES[verdict]} `{baseline.given}`{inconclusive}"


def _line(row: ComparisonRow) -> str:
    figures = f"{formatted(KINDS[row.unit], row.baseline)} | {formatted(KINDS[row.unit], row.candidate)}"
    interval = "-" if math.isnan(row.change.low) else f"{_ratio(row.change.low)} to {_ratio(row.change.high)}"
    allowed = f"{'≥' if row.unit == 'rps' else '≤'} {row.allowed:.2f}"
    said = "better" if row.better and row.verdict == "no worse" else str(row.verdict)
    said = f"**{said}**" if row.verdict == "worse" else said
    note = f" ({row.note})" if row.note else ""
    return f"| {row.name} | {figures} | {_ratio(row.change.ratio)} | {interval} | {allowed} | {said}{note} |"


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.3f}"


def as_json(comparison: Comparison, versions: Versions, machine: dict[str, Any]) -> dict[str, Any]:
    """The content of `regression.json`; NaN and infinity become null."""
    data = asdict(comparison) | {"verdict": comparison.verdict, "machine": machine}
    data |= {version.role: version.given for version in versions}
    return json.loads(json.dumps(data), parse_constant=lambda _: None)


def without_figures(error: Exception, versions: Versions, model: str) -> tuple[str, dict[str, Any]]:
    """Markdown and JSON for a version that could not be measured; they replace those of an earlier comparison."""
    verdict: Conclusion = "worse" if isinstance(error, GateFailed) else "inconclusive"
    data: dict[str, Any] = {"rows": [], "reason": str(error), "verdict": verdict}
    data |= {version.role: version.given for version in versions}
    return f"{_title(verdict, versions, model)}\n\n{error}\n", data
