"""Draws saved runs as one self-contained HTML file.

Contract: reads saved files and `deploy.toml`; writes the page beside the runs and prints its path (docs/report.md).
"""

import argparse
import json
from pathlib import Path
from typing import TypeVar

from deepseek.spec import InputError, Target
from loadtests.report.headline import LETTERS
from loadtests.report.run_page import write_mix_report, write_report
from loadtests.search.capacity_result import Capacity, capacity_path
from loadtests.slo.verdict import load_mix, load_runs
from loadtests.tune.tune_result import TuneResult, tuning_path

Search = TypeVar("Search", Capacity, TuneResult)


def _latest(kind: type[Search], path: Path, model: str, target: Target) -> Search | None:
    """The latest result of a search on this target; None for a missing, unreadable or empty one."""
    try:
        found = kind.load(path, model)
    except InputError:
        return None
    has_points = not isinstance(found, Capacity) or found.trials
    return found if has_points and found.target == target else None


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
        target = runs[-1].settings.target
        capacity = _latest(Capacity, capacity_path(args.model), args.model, target)
        tuned = _latest(TuneResult, tuning_path(args.model), args.model, target)
        written = write_report(runs, slo, capacity, tuned)
    print(json.dumps({"reports": [str(written)]}) if args.json else written)
