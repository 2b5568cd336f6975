"""`deepseek release`: releases the build, brought up to date first, or another candidate if one is named."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from cli.commands.shared_options import published_target
from cli.main import values_of, words_of
from deepseek.spec import InputError
from deepseek.spec.command import stdout_to_stderr
from deepseek.spec.files.read_env_file import gpu_stack_tag
from export.build import build
from serving.release.release import check_options
from serving.release.release import main as release


def main(options: argparse.Namespace) -> None:
    """The candidate is what `deepseek engine` would publish, or the newest version in the repository --new."""
    check_options(options)
    if not options.new:
        words = [*words_of("engine", options), *stacks_triton(options)]
        with stdout_to_stderr() if options.json else nullcontext():
            plan = build(values_of("engine", *words), publish=False)
        options.target = plan.target
    elif options.target == "auto":
        options.target = published_target(options, Path(options.new))
    release(options)


def stacks_triton(options: argparse.Namespace) -> list[str]:
    """The flag to build for the Triton of the stack with a GPU, in which the candidate starts; none for another stack.

    Raises InputError if --triton-tag names another release.
    """
    asked, tag = options.triton_tag, gpu_stack_tag(options.env_file)
    if asked and tag and asked != tag:
        raise InputError(
            f"TRITON_TAG={asked}: the candidate starts in the Triton of {options.env_file}, {tag}; leave TRITON_TAG "
            f"out, or update the stack first: make engine TRITON_TAG={asked}, then docker compose up --build --detach"
        )
    return [f"--triton-tag={tag}"] if tag else []


def retrain(options: argparse.Namespace) -> None:
    """Releases what the build makes of the click log --data."""
    options.new = options.new_build = None
    main(options)
