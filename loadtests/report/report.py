"""Draws saved runs as one self-contained HTML file.

Contract: reads saved files and `deploy.toml`; writes the page beside the runs and prints its path (docs/report.md).
"""

from __future__ import annotations

import argparse
import json

from deepseek.spec import InputError, Target
from loadtests.report.headline import LETTERS
from loadtests.report.mix_page import write_mix_report
from loadtests.report.run_page import write_report
from loadtests.search.capacity_result import Capacity, capacity_path
from loadtests.slo.verdict import load_mix, load_runs
from loadtests.tune.tune_result import TuneResult, tuning_path


def _searches(model: str, target: Target) -> tuple[Capacity | None, TuneResult | None]:
    """The capacity and tuning of the model on this target; None for a missing or unreadable file."""
    found: list[Capacity | TuneResult | None] = []
    for kind, path in ((Capacity, capacity_path(model)), (TuneResult, tuning_path(model))):
        try:
            search = kind.load(path)
        except InputError:
            search = None
        empty = isinstance(search, Capacity) and not search.trials
        found.append(search if search and search.target == target and not empty else None)
    return found[0], found[1]  # type: ignore[return-value]


def main(args: argparse.Namespace) -> None:
    folders = list(dict.fromkeys(args.run or []))
    if args.mix and len(folders) > 1:
        raise InputError("--mix has a page of its own: give at most one --run")
    if len(folders) > len(LETTERS):
        raise InputError(f"{len(folders)} runs: a chart shows at most {len(LETTERS)}")
    if args.mix:
        written = write_mix_report(load_mix(argparse.Namespace(**vars(args) | {"run": next(iter(folders), None)})))
    else:
        runs, slo = load_runs(args, folders)
        written = write_report(runs, slo, *_searches(args.model, runs[-1].settings.target))
    print(json.dumps({"reports": [str(written)]}) if args.json else written)
