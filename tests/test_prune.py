"""`export.prune`: the budget, fine-tuning, what is kept after a kill."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepseek.checkpoints import Checkpoints
from deepseek.distillation import SETTINGS
from deepseek.spec import GateFailed
from export.artifact import pruning_of, read_manifest
from export.budget import Baseline
from export.prune import main, prune_source
from export.source import Source
from export.to_onnx import export_model
from tests.conftest import run_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with the model `image`, pruned and exported."""
    build = tmp_path_factory.mktemp("pruned") / "build"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUILD", str(build))
        prune_source(Source("image", "tests/models"), 0.25)
        export_model(Source("image", "tests/models"))
    return build


@pytest.fixture
def build(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BUILD", str(pruned))
    return pruned


def test_the_stage_reports_what_went_and_what_it_cost(build: Path) -> None:
    facts = json.loads((build / "image" / "pruning.json").read_text())
    assert facts["channels"] == [32, 24]
    assert facts["layers"] == [{"name": "body.0", "kind": "channels", "before": 32, "after": 24}]
    assert facts["drop"] < 1 - facts["before_finetuning"]["similarity"]
    assert facts["drop"] <= facts["max_drop"] == 0.05
    assert facts["finetuned"] == "distillation"
    assert not (build / "image" / "checkpoints-pruning").exists()


def test_what_is_exported_is_the_pruned_module_and_the_manifest_says_so(build: Path) -> None:
    manifest = read_manifest(build / "image" / "fp32" / "model.onnx")
    assert manifest.settings["pruned"] == pruning_of("image")["ratio"] == 0.25
    source = Source("image", "tests/models")
    assert source.load().body[0].out_channels == 24
    assert source.unpruned().body[0].out_channels == 32


def test_the_budget_of_a_pruned_build_counts_from_the_unpruned_model(build: Path) -> None:
    baseline = Baseline.of(Source("image", "tests/models"))
    measured = baseline.measure(baseline.predict)
    assert measured["parity"]["scores"]["worst_error"] == 0
    assert measured["drop"] == pytest.approx(pruning_of("image")["drop"], abs=1e-6)
    assert measured["drop"] > 0


FINETUNE = """

def finetune(module: nn.Module) -> None:
    with torch.no_grad():
        module.head.bias += 1.0
"""


def test_a_finetune_of_the_models_own_is_what_runs_and_too_much_lost_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("tests/models/image", tmp_path / "models" / "image")
    with (tmp_path / "models" / "image" / "model.py").open("a") as file:
        file.write(FINETUNE)
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    arguments = ["export.prune", "--models", str(tmp_path / "models"), "--model", "image"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(GateFailed, match=r"pruned by 0\.25, image loses .* of similarity; .* max_drop is 5\.00%"):
        main()
    assert list(tmp_path.rglob("prun*")) == []


EVALUATE = """

def evaluate(predict):
    from pathlib import Path
    return {"accuracy": float(Path(__file__).parents[1].joinpath("score").read_text())}
"""


def test_a_verdict_is_asked_anew_where_nobody_knows_what_evaluate_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "image"
    shutil.copytree("tests/models/image", folder)
    with (folder / "model.py").open("a") as file:
        file.write(EVALUATE)
    toml = (folder / "deploy.toml").read_text()
    (folder / "deploy.toml").write_text(toml.replace("[precision]\n", '[precision]\nmetric = "accuracy"\n'))
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    found = []
    for score in ("0.5", "0.5", "0.25"):  # what is imported on the way of the first is a part of the others' key
        (tmp_path / "models" / "score").write_text(score)
        found.append(prune_source(Source("image", str(tmp_path / "models")), 0.25)["pruned"])
    assert found == [{"accuracy": 0.5}, {"accuracy": 0.5}, {"accuracy": 0.25}]


def test_a_killed_fine_tuning_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    source = Source("image", "tests/models")
    whole = prune_source(source, 0.25)
    (tmp_path / "image" / "pruned.safetensors").unlink()

    class Killed(BaseException):
        pass

    saved = Checkpoints.save

    def save_and_die(self: Checkpoints, accelerator: Any) -> None:
        saved(self, accelerator)
        raise Killed

    monkeypatch.setattr("deepseek.distillation.SETTINGS", dataclasses.replace(SETTINGS, checkpoint_every_s=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            prune_source(source, 0.25)
    assert list(tmp_path.rglob("checkpoint-*")) != []
    again = prune_source(source, 0.25)
    assert again["pruned"] == whole["pruned"]


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    run = run_module("export.prune", "--models", "tests/models", "--model", "text", BUILD=str(tmp_path))
    assert run.returncode == 2
    assert run.stderr.startswith("error: nothing of Encoder can be pruned: ")
    assert len(run.stderr.splitlines()) == 1
