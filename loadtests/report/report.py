"""Draws saved runs as one self-contained HTML file.

Contract: reads saved files and `deploy.toml`; writes the page beside the runs and prints its path (docs/report.md).
"""

from __future__ import annotations

import argparse
import json

from deepseek.spec import InputError
from loadtests.report.headline import LETTERS
from loadtests.report.run_page import write_mix_report, write_report
from loadtests.slo.verdict import load_mix, load_runs


def main(args: argparse.Namespace) -> None:
    folders = list(dict.fromkeys(args.run or []))
    if args.mix and len(folders) > 1:
        raise InputError("--mix has a page of its own: give at most one --run")
    if len(folders) > len(LETTERS):
        raise InputError(f"{len(folders)} runs: a chart shows at most {len(LETTERS)}")
    if args.mix:
        written = write_mix_report(load_mix(argparse.Namespace(**vars(args) | {"run": next(iter(folders), None)})))
    else:
        written = write_report(*load_runs(args, folders))
    print(json.dumps({"reports": [str(written)]}) if args.json else written)
