"""The command that judges a saved run against the SLO of `deploy.toml`."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek.spec import DeploymentSpec, InputError, SloSpec
from deepseek.spec.objectives import SIGNS, formatted
from loadtests.results.mixes import runs_of
from loadtests.results.run import Run, latest_run
from loadtests.slo.judge import judge, overall
from loadtests.slo.judged_objectives import EXIT_CODES, SloStatus, SloVerdict
from loadtests.slo.time_split import TimeSplit


def as_json(run: Run, judgement: SloVerdict) -> dict[str, Any]:
    """The verdict as JSON data; a percentile that falls on a failed request is null."""
    data: dict[str, Any] = {"run": str(run.folder), **asdict(judgement)}
    for objective in data["objectives"]:
        for name in ("seen", "margin", "low", "high"):
            objective[name] = objective[name] if math.isfinite(objective[name]) else None
    split = TimeSplit.of_run(run)
    return {**data, "where_time_goes_ms": split and {**split.parts, "outside": split.outside, "late": split.late}}


STYLES = {"holds": "green", "violated": "red", "inconclusive": "yellow", "invalid": "yellow"}


def _print(run: Run, judgement: SloVerdict, console: Console) -> None:
    noted = any(each.note for each in judgement.objectives)
    table = Table("objective", "limit", "seen", "margin", "", *[""] * noted)
    for each in judgement.objectives:
        margin = f"{each.margin:+z.0%}" if math.isfinite(each.margin) else ""
        status = Text(each.status, STYLES[each.status])
        limit = f"{SIGNS[each.relation]} {formatted(each.kind, each.limit)}"
        table.add_row(each.name, limit, formatted(each.kind, each.seen), margin, status, *[each.note] * noted)
    console.print(table)
    for line in (*judgement.problems, *judgement.notes):
        console.print(line)
    if split := TimeSplit.of_run(run):
        console.print(split.sentence)
    console.print(_headed(judgement.verdict, str(run.folder)), soft_wrap=True)


def _headed(verdict: SloStatus, what: str) -> Text:
    return Text.assemble((verdict, f"{STYLES[verdict]} bold"), f"  {what}")


def load_runs(args: argparse.Namespace, folders: Sequence[str | Path]) -> tuple[list[Run], SloSpec]:
    """Loads runs of one model, by default the latest, and the SLO that judges them."""
    spec = DeploymentSpec.of_model(args.model, args.models)
    runs = [Run.load(folder) for folder in folders or [latest_run(args.model)]]
    for run in runs:
        if run.settings.model != args.model:
            raise InputError(f"{run.folder}: a run of {run.settings.model}, not of {args.model}; give --model")
    return runs, spec.for_target(args.target or runs[-1].settings.target).slo


def load_mix(args: argparse.Namespace) -> list[tuple[Run, SloSpec]]:
    runs = runs_of(args.mix, args.run)
    specs = [DeploymentSpec.of_model(run.settings.model, args.models) for run in runs]
    return [(run, of.for_target(args.target or run.settings.target).slo) for run, of in zip(runs, specs, strict=True)]


def main(args: argparse.Namespace) -> int:
    if args.mix:
        parts = load_mix(args)
    else:
        (run,), slo = load_runs(args, [args.run] if args.run else [])
        parts = [(run, slo)]
    judged = [(run, judge(run, slo, alone=not args.mix)) for run, slo in parts]
    verdict = overall(judgement.verdict for _, judgement in judged)
    if args.json:
        found = {run.settings.model: as_json(run, judgement) for run, judgement in judged}
        told = {"verdict": verdict, "models": found} if args.mix else next(iter(found.values()))
        print(json.dumps(told, indent=2))
        return EXIT_CODES[verdict]
    console = Console(width=max(Console().width, 100), markup=False)
    for run, judgement in judged:
        if args.mix:
            console.print(run.settings.model, style="bold")
        _print(run, judgement, console)
    if args.mix:
        console.print(_headed(verdict, f"the mix {args.mix} as a whole"))
    return EXIT_CODES[verdict]
