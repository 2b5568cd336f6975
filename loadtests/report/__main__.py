"""Draws saved runs, a capacity search or a search for settings as one HTML file that needs nothing else.

Contract: reads saved files and `deploy.toml`, writes `report.html` into the run's folder and prints its path. Several
runs (up to 6) are laid over each other, in the folder of the last. The model's `capacity.json` and `tuning.json` are
drawn along where they are of the run's target. A mix of models is one page, `report-mix.html` in the folder of its
first model's run. The verdict comes first; light or dark is the reader's choice; it reads on a phone.

Examples:
    python -m loadtests.report                                  # the latest run of the recommender
    python -m loadtests.report --run build/recommender/loadtests/2026-11-25T12-55-13.042Z
    python -m loadtests.report --run A --run B                  # two folders, one page
    python -m loadtests.report --mix recommender:3,minilm:1     # the latest run of that mix, all models on one page
    python -m loadtests.report --capacity --tuning              # build/recommender/capacity.html, tuning.html
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from deepseek.spec import (
    DeploymentSpec,
    InputError,
    Parser,
    SloSpec,
    Target,
    add_model_arguments,
    build_dir,
    run_command,
)
from deepseek.spec.folders import write_whole
from loadtests.capacity import Capacity, capacity_path
from loadtests.report.mix_page import write_mix_report
from loadtests.report.run_page import write_report
from loadtests.report.searches import capacity_page, tuning_page
from loadtests.report.verdict import LETTERS
from loadtests.results import Run, latest_run
from loadtests.slo import load_mix
from loadtests.tuning import Tuning, tuning_path


def _runs(args: argparse.Namespace) -> tuple[list[Run], SloSpec]:
    """The runs asked for, and the SLO that they are judged by."""
    spec = DeploymentSpec.of_model(args.model, args.models)
    folders = list(dict.fromkeys(args.run or [latest_run(args.model)]))
    if len(folders) > len(LETTERS):
        raise InputError(f"{len(folders)} runs; at most {len(LETTERS)} can be told apart in one chart")
    runs = [Run.load(folder) for folder in folders]
    for run in runs:
        if run.settings.model != args.model:
            raise InputError(f"{run.folder}: a run of {run.settings.model}, not of {args.model}; give --model")
    return runs, spec.for_target(args.target or runs[-1].settings.target).slo


def _searches(model: str, target: Target) -> tuple[Capacity | None, Tuning | None]:
    """What was found for the model on this target; a file that is absent, or cannot be read, is left out."""
    found: list[Capacity | Tuning | None] = []
    for kind, path in ((Capacity, capacity_path(model)), (Tuning, tuning_path(model))):
        try:
            search = kind.load(path)
        except InputError:
            search = None
        found.append(search if search and search.target == target and search.trials else None)
    return found[0], found[1]  # type: ignore[return-value]


def drawn(args: argparse.Namespace) -> Iterator[Path]:
    """Writes the pages that were asked for."""
    if args.capacity:
        found = Capacity.load(capacity_path(args.model))
        yield write_whole(build_dir(args.model) / "capacity.html", capacity_page(found))
    if args.tuning:
        tuned = Tuning.load(tuning_path(args.model))
        yield write_whole(build_dir(args.model) / "tuning.html", tuning_page(tuned))
    if args.mix:
        yield write_mix_report(load_mix(argparse.Namespace(**vars(args) | {"run": args.run and args.run[0]})))
    elif not args.capacity and not args.tuning:
        runs, slo = _runs(args)
        yield write_report(runs, slo, *_searches(args.model, runs[-1].settings.target))


def main() -> None:
    """Draws and prints where."""
    parser = Parser(__doc__, prog="python -m loadtests.report")
    add_model_arguments(parser)
    parser.add_argument("--run", action="append", help="a run's folder, several times for more (default: the latest)")
    parser.add_argument(
        "--mix", help="draw all models of a mixed load, as loadtests.run had it (--run: one of its folders)"
    )
    parser.add_argument("--target", choices=get_args(Target), help="judge by this target's SLO (default: the run's)")
    parser.add_argument("--capacity", action="store_true", help="draw build/<model>/capacity.json alone")
    parser.add_argument("--tuning", action="store_true", help="draw build/<model>/tuning.json alone")
    parser.add_argument("--json", action="store_true", help="print the paths as JSON")
    args = parser.parse_args()
    if args.run and (args.capacity or args.tuning):
        raise InputError("--run is drawn on a page of its own: leave out --capacity and --tuning, or --run")
    if args.mix and (args.capacity or args.tuning or len(args.run or ()) > 1):
        raise InputError("--mix is drawn on a page of its own: leave out --capacity, --tuning and a second --run")
    paths = [str(path) for path in drawn(args)]
    print(json.dumps({"reports": paths}) if args.json else "\n".join(paths))


if __name__ == "__main__":
    run_command(main)
