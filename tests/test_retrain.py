"""`deepseek retrain`: a click log becomes a released version of the recommender."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import cli.release
from cli.main import values_of
from deepseek.spec import DeploymentSpec, GateFailed, PublishedManifest
from deepseek.vocabulary import Vocabulary
from serving.release.candidate import Candidate
from serving.release.journal import ReleaseJournal
from serving.release.live_server import LiveServer
from tests.conftest import Refused, run_module
from tests.test_recommender import log_lines

MANIFEST: dict[str, Any] = {
    "model": "recommender",
    "precision": "fp32",
    "target": "onnxruntime",
    "found": {},
    "sources": {},
    "axes": {"batch": {"min": 1, "opt": 16, "max": 64}},
    "versions": {},
    "size_bytes": 1,
    "build_s": 1,
    "files": {"model.onnx": {"sha256": "0" * 64, "size_bytes": 1}},
}


def places(folder: Path) -> tuple[str, ...]:
    """Flags for a build of its own."""
    own = ("--repository", str(folder / "repository"), "--env-file", str(folder / "env"))
    return ("--data", str(folder / "clicks"), "--build", str(folder / "build"), "--precision", "fp32", *own)


def test_a_missing_or_broken_log_is_one_line_and_changes_nothing(tmp_path: Path, refused: Refused) -> None:
    assert refused("retrain").startswith("error: --data: missing; ")
    # As with an unset variable: this is not MovieLens.
    assert refused("retrain", "--data", "").startswith("error: --data: empty; ")
    (tmp_path / "clicks").mkdir()
    (tmp_path / "clicks" / "1.csv").write_text("user,item,time\na,b,noon\n")
    run = run_module("cli", "retrain", *places(tmp_path))
    assert (run.returncode, run.stderr.count("error: ")) == (2, 1), run.stderr
    assert "clicks/1.csv: line 2: timestamp: seen 'noon'; allowed: a number, " in run.stderr.splitlines()[-1]
    assert not list((tmp_path / "repository").glob("*"))
    assert not list((tmp_path / "build").glob("recommender/weights*"))


def test_a_server_of_another_repository_is_found_before_the_training(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveServer, "look", lambda live: (7, ""))
    monkeypatch.setattr(cli.release, "build", lambda *_, **__: pytest.fail("it builds"))
    assert "has version 7 of recommender, but " in refused("retrain", *places(tmp_path))


@pytest.mark.parametrize(
    ("served", "new", "own", "flags", "said"),
    [
        (range(100), range(5, 105), True, (), "version 1 knows 95 of the new version's 100 items; 5 of its own 100 are gone"),
        (range(100), range(1000, 1100), True, (), "version 1 knows 0 of the new version's 100 items; 100 of its own 100 are gone; at least 50% must"),
        (range(100), range(60, 160), True, (), "version 1 knows 40 of the new version's 100 items; 60 of its own 100 are gone; at least 50% must"),
        (range(200), range(90), True, (), "version 1 knows 90 of the new version's 90 items; 110 of its own 200 are gone; at least 50% must"),
        (range(100), range(1000, 1100), True, ("--new-catalogue",), "version 1 knows 0 of the new version's 100 items; 100 of its own 100 are gone"),
        (range(100), range(1000, 1100), False, (), "version 1 knows 0 of the new version's 100 items; 100 of its own 100 are gone, as expected: that version was not trained on a log of yours (DATA=)"),
    ],
    ids=["a day later", "a new catalogue", "mostly new", "mostly gone", "confirmed", "after the example's"],
)  # fmt: skip
def test_a_log_of_mostly_other_items_is_refused_until_the_operator_confirms_it(
    served: range,
    new: range,
    own: bool,
    flags: tuple[str, ...],
    said: str,
    tmp_path: Path,
) -> None:
    options = values_of("retrain", *places(tmp_path), *flags)
    options.new_build = None
    gate = Candidate(
        options, DeploymentSpec.load("models/recommender"), ReleaseJournal(tmp_path, "release", 2, before=None), 2
    )
    assert "no served version" in gate.catalogue()
    gate.before = 1
    for folder, items in ((gate.model / "1", served), (gate.folder / "2", new)):
        folder.mkdir(parents=True)
        rows = "".join(f"{number},sku-{item}\n" for number, item in enumerate(items, 1))
        (folder / "catalogue.csv").write_text("id,item\n" + rows)
    settings = {"own_data": True} if own else {}
    manifest = MANIFEST | {"inputs": gate.spec.inputs, "outputs": gate.spec.outputs, "settings": settings}
    (gate.model / "1" / "manifest.json").write_text(PublishedManifest(**manifest).model_dump_json())
    if "at least" in said:
        with pytest.raises(GateFailed, match=rf"^{re.escape(said)} .*NEW_CATALOGUE=1 \(--new-catalogue\)$"):
            gate.catalogue()
    else:
        assert gate.catalogue() == said


@pytest.mark.slow(minutes=4)
def test_a_new_item_of_yesterdays_log_is_in_the_version_that_the_gates_judge(tmp_path: Path) -> None:
    """The gates compare both versions by the names of the items. The later ones measure time, so any may refuse here."""
    clicks, build = tmp_path / "clicks", tmp_path / "build" / "recommender"
    clicks.mkdir()
    (clicks / "1.csv").write_text("\n".join(log_lines()) + "\n")
    run = run_module("cli", "engine", *places(tmp_path))
    assert run.returncode == 0, run.stderr
    version = tmp_path / "repository" / "recommender" / "1"
    assert len(Vocabulary(version / "catalogue.csv")) == 90
    assert PublishedManifest.load(version / "manifest.json").settings["own_data"] is True
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
