"""`export.stages.prune`: the budget, fine-tuning, resuming after a kill."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.main import main as command
from cli.main import values_of
from deepseek.checkpoints import Checkpoints
from deepseek.pruning.distillation import SETTINGS
from deepseek.spec import GateFailed, InputError
from export.artifact import pruning_of, read_manifest
from export.cache import STAGE_KEYS
from export.checks import parity_cases
from export.model_folder import ModelFolder
from export.precision.accuracy import Evaluated, paired_drop
from export.precision.accuracy_budget import Baseline, judged
from export.stages import prune
from export.stages.prune import main, prune_source
from tests.add_one import replace_in
from tests.conftest import Refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with the model `image`, pruned and exported."""
    from export.stages.to_onnx import export_model  # a second; `make check` runs no test that needs it

    build = tmp_path_factory.mktemp("pruned") / "build"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(build))
        prune_source(ModelFolder("image", "tests/models"), 0.25)
        export_model(ModelFolder("image", "tests/models"))
    return build


@pytest.fixture
def build(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(pruned))
    return pruned


def test_the_stage_reports_what_it_removed_and_what_that_cost(build: Path) -> None:
    facts = json.loads((build / "image" / "pruning.json").read_text())
    assert facts["channels"] == [32, 24]
    assert facts["layers"] == [{"name": "body.0", "kind": "channels", "before": 32, "after": 24}]
    assert facts["drop"] < 1 - facts["before_finetuning"]["similarity"]
    assert facts["drop"] <= facts["max_drop"] == 0.05
    assert facts["finetuned"] == "distillation"
    assert not (build / "image" / "checkpoints-pruning").exists()


def test_the_pruned_module_is_exported_and_the_manifest_says_so(build: Path) -> None:
    manifest = read_manifest(build / "image" / "fp32" / "model.onnx")
    assert manifest.settings["pruned"] == pruning_of("image")["ratio"] == 0.25
    source = ModelFolder("image", "tests/models")
    assert source.load().body[0].out_channels == 24
    assert source.unpruned().body[0].out_channels == 32


def test_the_budget_of_a_pruned_build_is_relative_to_the_unpruned_model(build: Path) -> None:
    baseline = Baseline.of(ModelFolder("image", "tests/models"))
    measured = baseline.measure(baseline.predict)
    assert measured["parity"]["scores"]["worst_error"] == 0
    assert measured["drop"] == pytest.approx(pruning_of("image")["drop"], abs=1e-6)
    assert measured["drop"] > 0


def image_with(code: str, folder: Path) -> ModelFolder:
    """The model `image` with more code, in `models/` of a folder."""
    shutil.copytree("tests/models/image", folder / "models" / "image")
    with (folder / "models" / "image" / "model.py").open("a") as file:
        file.write(code)
    return ModelFolder("image", folder / "models")


def test_the_models_own_finetune_runs_and_too_much_loss_publishes_nothing(tmp_path: Path, own_build: Path) -> None:
    code = """
_forward = Classifier.forward
Classifier.forward = lambda self, pixels: dict(zip(("scores", "features"), _forward(self, pixels)))
def finetune(module):
    module.head.bias.data += module(torch.zeros(1, 3, 32, 32))["scores"].numel()  # what forward returns, no tuple
"""
    image_with(code, tmp_path)
    options = values_of("prune", "--models", str(tmp_path / "models"), "--model", "image")
    with pytest.raises(GateFailed, match=r"pruned by 0\.25, image loses .* of similarity; .* max_drop is 5\.00%"):
        main(options)
    assert list(tmp_path.rglob("prun*")) == []


def test_a_load_that_returns_the_same_weights_each_time_is_refused(tmp_path: Path, own_build: Path) -> None:
    source = image_with("\n_core = load()\ndef load():\n    return nn.Sequential(_core)\n", tmp_path)
    with pytest.raises(InputError, match=r"load\(\) returned the same weights twice; let it make new ones each time"):
        prune_source(source, 0.25)


def test_evaluation_rows_that_are_calibration_rows_too_are_not_learned(
    tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
_own = samples
def samples(split):
    yield from _own('evaluation')
    if split == 'calibration':
        yield from list(_own(split))[:3]
"""
    learned: list[Any] = []
    monkeypatch.setattr(prune, "distil", lambda module, teacher, data, checkpoints: learned.extend(data))
    prune_source(image_with(code, tmp_path), 0.25)
    assert sum(len(batch[0]) for batch in learned) == 3 * 4


EVALUATE = """
def evaluate(predict):
    from pathlib import Path
    predict(next(iter(samples("evaluation"))))
    return {"accuracy": float(Path(__file__).parents[1].joinpath("score").read_text())}
"""


FINGERPRINT = """
def fingerprint():
    from pathlib import Path
    return Path(__file__).parents[1].joinpath("score").read_text()
"""


@pytest.mark.parametrize("code", [EVALUATE, EVALUATE + FINGERPRINT], ids=["unknown", "other"])
def test_the_model_is_evaluated_again_if_its_data_is_unknown_or_changed(
    code: str, tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_in(image_with(code, tmp_path).folder / "deploy.toml", "[precision]\n", '[precision]\nmetric = "accuracy"\n')
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(STAGE_KEYS, '{"fine-tune": "k"}')
    monkeypatch.setattr(prune, "distil", lambda *_, **__: None)
    found = []
    for score in ("0.5", "0.5", "0.25"):  # modules that the first one imports are part of the key of the others
        (tmp_path / "models" / "score").write_text(score)
        found.append(prune_source(ModelFolder("image", tmp_path / "models"), 0.25)["pruned"])
    assert found == [{"accuracy": 0.5}, {"accuracy": 0.5}, {"accuracy": 0.25}]


def test_a_killed_fine_tuning_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    source = ModelFolder("image", "tests/models")
    short = dataclasses.replace(SETTINGS, checkpoint_every_s=0.0, max_epochs=2)
    monkeypatch.setattr("deepseek.pruning.distillation.SETTINGS", short)
    whole = prune_source(source, 0.25)
    (tmp_path / "image" / "pruned.safetensors").unlink()

    class Killed(BaseException):
        pass

    saved = Checkpoints.save

    def save_and_die(self: Checkpoints, accelerator: Any) -> None:
        saved(self, accelerator)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            prune_source(source, 0.25)
    assert list(tmp_path.rglob("checkpoint-*")) != []
    again = prune_source(source, 0.25)
    assert again["pruned"] == whole["pruned"]


@pytest.mark.parametrize(("ratio", "drop", "against"), [(0.25, -0.0125, "unpruned PyTorch"), (0, 0.0122, "PyTorch")])
def test_parity_compares_the_metric_with_the_model_that_the_user_brought(
    ratio: float, drop: float, against: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"brought": 0.80, "loaded": 0.82, "served": 0.81}
    monkeypatch.setattr(parity_cases, "pruning_of", lambda name: {"ratio": ratio} if ratio else {})
    monkeypatch.setattr(parity_cases, "module_predictor", lambda spec, module: module)
    monkeypatch.setattr(
        parity_cases, "evaluated", lambda source, predict: Evaluated(metrics={"accuracy": metrics[predict]})
    )
    precision = SimpleNamespace(metric="accuracy", max_drop=0.01, candidates=("int8",))
    source: Any = SimpleNamespace(spec=SimpleNamespace(name="tiny", precision=precision), unpruned=lambda: "brought")
    judge: Any = SimpleNamespace(protocol="grpc", predict="served")
    found = parity_cases.compare_metric(source, "loaded", [judge], "fp32")  # type: ignore[arg-type]
    assert found["served"]["grpc"]["drop"] == pytest.approx(drop, abs=1e-4)
    assert found["against"] == against


@pytest.mark.parametrize(("lost", "accepted"), [(0, True), (1, True), (4, False)])
def test_build_and_parity_judge_the_same_rows_alike(lost: int, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelFolder("image", "tests/models").spec
    spec = spec.model_copy(
        update={"precision": spec.precision.model_copy(update={"metric": "accuracy", "max_drop": 0.02})}
    )
    values = {"brought": [1.0] * 100, "served": [0.0] * lost + [1.0] * (100 - lost)}
    monkeypatch.setattr(parity_cases, "pruning_of", lambda name: {})
    monkeypatch.setattr(
        parity_cases,
        "evaluated",
        lambda source, predict: Evaluated(metrics={"accuracy": sum(values[predict]) / 100}, values=values[predict]),
    )
    source: Any = SimpleNamespace(spec=spec, folder=Path("m"))
    judge: Any = SimpleNamespace(protocol="grpc", predict="served")
    found = parity_cases.compare_metric(source, "brought", [judge], "fp16")  # type: ignore[arg-type]
    told = found["served"]["grpc"]
    drop, paired = paired_drop(source, *(parity_cases.evaluated(source, name) for name in ("served", "brought")))  # type: ignore[arg-type]
    assert told["judgement"] == dataclasses.asdict(judged(spec, drop, paired))
    assert told["judgement"]["rows"] == 100
    assert (parity_cases.failures([], found) == []) == accepted


def test_an_evaluate_that_fails_at_served_outputs_is_a_failed_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(source: Any, predict: str) -> Evaluated:
        if predict == "served":
            raise InputError("model.py:9: evaluate(): ValueError: NaN")
        return Evaluated(metrics={"accuracy": 0.8})

    monkeypatch.setattr(parity_cases, "pruning_of", lambda name: {})
    monkeypatch.setattr(parity_cases, "evaluated", evaluated)
    precision = SimpleNamespace(metric="accuracy", max_drop=0.01, candidates=("int8",))
    source: Any = SimpleNamespace(spec=SimpleNamespace(name="tiny", precision=precision))
    judge: Any = SimpleNamespace(protocol="grpc", predict="served")
    found = parity_cases.compare_metric(source, "brought", [judge], "fp16")  # type: ignore[arg-type]
    assert parity_cases.failures([], found) == ["accuracy over grpc: model.py:9: evaluate(): ValueError: NaN"]


@pytest.mark.parametrize("ratio", ["nan", "0", "1", "x"])
def test_a_ratio_that_is_no_share_names_the_option(ratio: str, refused: Refused) -> None:
    said = refused("prune", "--ratio", ratio)
    assert said == f"error: --ratio: seen '{ratio}'; a number above 0, up to 0.99, is needed\n"


def test_an_infinite_drop_is_null_in_json(tmp_path: Path, own_build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "\ndef finetune(module):\n    module.head.bias.data.fill_(float('nan'))\n"
    image_with(code, tmp_path)
    assert command(["prune", "--models", str(tmp_path / "models"), "--model", "image", "--json"]) == 1
    shown = capsys.readouterr()
    found = json.loads(shown.out, parse_constant=pytest.fail)
    assert (found["drop"], found["pruned"]) == (None, {"similarity": None})
    assert "image loses inf% of similarity" in shown.err
