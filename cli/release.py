"""`deepseek release`: releases the build, brought up to date first, or another candidate if one is named."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from cli.commands.shared_options import published_target
from cli.main import values_of, words_of
from deepseek.spec.command import stdout_to_stderr
from export.build import build
from serving.release.release import check_options
from serving.release.release import main as release


def main(options: argparse.Namespace) -> None:
    """The candidate is what `deepseek engine` would publish, or the newest version in the repository --new."""
    check_options(options)
    if not options.new:
        with stdout_to_stderr() if options.json else nullcontext():
            plan = build(values_of("engine", *words_of("engine", options)), publish=False)
        options.target = plan.target
    elif options.target == "auto":
        options.target = published_target(options, Path(options.new))
    release(options)


def retrain(options: argparse.Namespace) -> None:
    """Releases what the build makes of the click log --data."""
    options.new = options.new_build = None
    main(options)
