"""`deepseek retrain`: a click log becomes a released version of the recommender."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek.vocabulary import Vocabulary
from tests.conftest import RunHere, run_module
from tests.test_recommender import log_lines


def places(folder: Path) -> tuple[str, ...]:
    """Flags for a build of its own."""
    own = ("--repository", str(folder / "repository"), "--env-file", str(folder / "env"))
    return ("--data", str(folder / "clicks"), "--build", str(folder / "build"), "--precision", "fp32", *own)


def test_a_missing_or_broken_log_is_one_line_and_changes_nothing(tmp_path: Path, run_here: RunHere) -> None:
    run = run_here("retrain")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith("error: --data: missing; ")
    run = run_here("retrain", "--data", "")  # as with an unset variable: this is not MovieLens
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith("error: --data: empty; ")
    (tmp_path / "clicks").mkdir()
    (tmp_path / "clicks" / "1.csv").write_text("user,item,time\na,b,noon\n")
    run = run_module("cli", "retrain", *places(tmp_path))
    assert (run.returncode, run.stderr.count("error: ")) == (2, 1), run.stderr
    assert "clicks/1.csv: line 2: timestamp: seen 'noon'; allowed: a number, " in run.stderr.splitlines()[-1]
    assert not list((tmp_path / "repository").glob("*"))
    assert not list((tmp_path / "build").glob("recommender/weights*"))


@pytest.mark.slow(minutes=4)
def test_a_new_item_of_yesterdays_log_is_in_the_version_that_the_gates_judge(tmp_path: Path) -> None:
    """The gates compare both versions by the names of the items. The later ones measure time, so any may refuse here."""
    clicks, build = tmp_path / "clicks", tmp_path / "build" / "recommender"
    clicks.mkdir()
    (clicks / "1.csv").write_text("\n".join(log_lines()) + "\n")
    run = run_module("cli", "engine", *places(tmp_path))
    assert run.returncode == 0, run.stderr
    assert len(Vocabulary(tmp_path / "repository" / "recommender" / "1" / "catalogue.csv")) == 90
    new = "".join(f"user {user},sku-new,{100 + user},New\n" for user in range(20))
    (clicks / "2.csv").write_text("user,item,time,title\n" + new)
    run = run_module("cli", "retrain", *places(tmp_path), "--requests", "200", "--duration-s", "1")
    assert run.returncode in (0, 1, 3), run.stderr
    assert b"New" in Vocabulary(build / "catalogue.csv").titles
    assert (tmp_path / "repository" / "recommender" / "2").exists() == (run.returncode == 0)
    (parity,) = build.glob("releases/*/parity.json")
    metric = json.loads(parity.read_text())["metric"]
    assert 0 < metric["base"]["value"] < 1  # the served version does not know the new item
    assert f"version 1 has {metric['base']['value']:.4f}" in run.stdout + run.stderr
