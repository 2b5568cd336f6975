"""Runs the code of the README and the tutorial unchanged, in a copy of the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.checkout import BUSY, Checkout, blocks


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout.copied_to(tmp_path)


def check_judged(run: subprocess.CompletedProcess[str]) -> None:
    """A load test and its verdict, or the reason why the run does not count: other tests keep this machine busy."""
    told = run.stdout + run.stderr
    assert run.returncode in BUSY, told
    assert "p99_ms" in run.stdout or "the generator sent late" in run.stderr, told


@pytest.mark.slow(minutes=7)
def test_the_tutorial_releases_a_second_version(checkout: Checkout) -> None:
    page = "docs/tutorials/first-model.md"
    new, engine, serve, infer, parity, verdict, report, release, rollback = blocks(page, "sh")
    (call,) = blocks(page, "python")
    for script in (new, engine):
        run = checkout.sh(script)
        assert run.returncode == 0, run.stdout + run.stderr
    with checkout.serve("leaves", serve):
        for script in (infer, parity):
            run = checkout.sh(script)
            assert run.returncode == 0, run.stdout + run.stderr
        assert checkout.python(call) == "(2, 10)\n"
        check_judged(checkout.sh(verdict))
        assert checkout.sh(report).returncode == 0
        run = checkout.sh(release)
        assert "accuracy    holds" in run.stdout, run.stdout + run.stderr  # the gates after it measure this machine
        if "live: " in run.stdout:
            assert "version 1 after" in checkout.sh(rollback).stdout


@pytest.mark.slow(minutes=2)
def test_the_readmes_model_is_built_served_and_called(checkout: Checkout) -> None:
    (toml,), (call, model) = blocks("README.md", "toml"), blocks("README.md", "python")
    folder = checkout.folder / "models" / "digits"
    folder.mkdir()
    (folder / "deploy.toml").write_text(toml)
    (folder / "model.py").write_text(model)
    (script,) = (block for block in blocks("README.md", "sh") if "MODEL=digits" in block)
    serve, measure = script.splitlines()
    with checkout.serve("digits", serve.partition("#")[0]):
        run = checkout.sh(measure)
        assert "evaluation split" in run.stdout, run.stdout + run.stderr  # of make parity
        check_judged(run)
    assert "deepseek_client" in call
