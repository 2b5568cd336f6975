"""Training: once for the same code, data and settings, for everyone who shares the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.spec import InputError
from export import cache
from export.build import Builder
from export.model_folder import ModelFolder
from export.pipeline import stages_of
from export.plan import Plan
from export.precision.accuracy_budget import accuracy_key
from export.stages import train
from tests.conftest import RunHere
from tests.tiny_model import TOML

# Trains to the value in `seed.txt` beside the build, and counts its runs.
MODEL = """
import os
from pathlib import Path
import torch

FOLDER = Path(os.environ["DEEPSEEK_BUILD"]) / "tiny"
DATA = Path(os.environ["DEEPSEEK_BUILD"]).parent.parent / "data.txt"

def train():
    if not (FOLDER / "words").exists():
        (FOLDER / "words").write_text("8")
    torch.save(torch.full((8, 8), float(DATA.read_text())), FOLDER / "weights.pt")
    with (DATA.parent / "trained").open("a") as log:
        log.write(".")

def load():
    model = torch.nn.Linear(8, int((FOLDER / "words").read_text()))
    model.weight.data = torch.load(FOLDER / "weights.pt")
    torch.nn.init.zeros_(model.bias)
    return model

def samples(split):
    return []
"""
FINGERPRINT = "\ndef fingerprint():\n    return DATA.read_text()\n"

Clone = Callable[..., ModelFolder]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """Makes a model folder with its own `build/`; all clones share data and cache."""
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.txt").write_text("1")

    def make(name: str, code: str = MODEL + FINGERPRINT, toml: str = TOML) -> ModelFolder:
        monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / name / "build"))
        folder = tmp_path / name / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deploy.toml").write_text(toml)
        (folder / "model.py").write_text(code)
        return ModelFolder("tiny", tmp_path / name)

    return make


def make_weights(source: ModelFolder) -> str:
    """Runs the stage as a build does, with its key."""
    data = os.environ.get("DEEPSEEK_DATA", "")
    models = source.folder.parent
    plan = Plan(model="tiny", models=models, spec=source.spec, target="onnxruntime", precision=None, data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.STAGE_KEYS, json.dumps(Builder(plan).keys(next(stages_of(plan)))))
        return train.make_weights(source)


def trained(folder: Path) -> int:
    """Number of training runs."""
    return len((folder / "trained").read_text())


def test_another_clone_gets_the_weights_from_the_cache(clone: Clone, tmp_path: Path) -> None:
    assert make_weights(clone("one")) == "trained"
    other = clone("two")
    assert make_weights(other) == "cached"
    assert float(other.unpruned().weight.detach()[0, 0]) == 1
    assert sorted(path.name for path in (tmp_path / "two" / "build" / "tiny").iterdir()) == [
        "weights-digest.json",
        "weights.pt",
        "words",
    ]
    assert trained(tmp_path) == 1


def test_other_data_trains_again(clone: Clone, tmp_path: Path) -> None:
    """test_pipeline.py tests the other inputs of the key."""
    make_weights(clone("one"))
    (tmp_path / "data.txt").write_text("2")
    assert make_weights(clone("two")) == "trained"


def test_without_a_fingerprint_it_trains_each_time(clone: Clone, tmp_path: Path) -> None:
    assert [make_weights(clone(name, MODEL)) for name in ("one", "two")] == ["trained", "trained"]
    assert not list((tmp_path / "cache").glob("*"))


LOG = """
_train = train

def train():
    _train()
    Path(__file__).with_name("log").touch()
"""


@pytest.mark.parametrize("known", ["", FINGERPRINT], ids=["not cached", "cached"])
def test_a_train_that_writes_into_the_model_folder_gets_a_warning(
    clone: Clone, known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_weights(clone("one", MODEL))
    assert capsys.readouterr().err == ""
    make_weights(clone("two", MODEL + LOG + known))
    assert "two/tiny/log, so the next build trains again; let it write under " in capsys.readouterr().err


def test_an_entry_that_lacks_files_from_before_training_is_made_again(clone: Clone, tmp_path: Path) -> None:
    source = clone("one")
    (tmp_path / "one" / "build" / "tiny").mkdir(parents=True)
    (tmp_path / "one" / "build" / "tiny" / "words").write_text("8")  # left by a killed training
    assert make_weights(source) == "trained"
    assert [make_weights(clone(name)) for name in ("two", "three")] == ["trained", "cached"]


def test_an_entry_that_loads_to_other_weights_is_not_used(clone: Clone, tmp_path: Path) -> None:
    make_weights(clone("one"))
    (digest,) = (tmp_path / "cache").glob("*/weights-digest.json")
    place, index = digest.parent, json.loads((digest.parent / cache.INDEX).read_text())
    digest.write_text("{}")
    index[digest.name] = cache.sha256(digest)
    (place / cache.INDEX).write_text(json.dumps(index))
    assert make_weights(clone("two")) == "trained"


@pytest.mark.parametrize("told", ["None", "''", "7"])
def test_a_fingerprint_that_is_not_a_text_is_one_error_line(clone: Clone, told: str) -> None:
    source = clone("one", f"{MODEL}\ndef fingerprint():\n    return {told}\n")
    with pytest.raises(InputError, match=r"model.py: fingerprint\(\) returned .*; a text is needed"):
        make_weights(source)


def test_accuracy_is_remeasured_without_a_fingerprint_for_evaluate(
    clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = TOML + '[precision]\nmetric = "score"\n'
    score = "\ndef evaluate(predict):\n    return {'score': 1.0}\n"
    monkeypatch.setenv(cache.STAGE_KEYS, json.dumps({"accuracy int8": "k"}))
    for code, known in ((MODEL + score, False), (MODEL + score + FINGERPRINT, True)):
        assert (accuracy_key(clone("one", code, toml), "int8", "weights") is not None) is known


def test_a_changed_fingerprint_changes_the_keys_of_what_evaluate_and_finetune_read(
    clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = "\ndef evaluate(predict):\n    return {}\ndef finetune(module):\n    pass\n"
    judged = clone("one", MODEL + FINGERPRINT + functions, TOML + '[precision]\nmetric = "score"\n')
    unjudged = clone("two", MODEL + FINGERPRINT + functions)
    monkeypatch.setenv(cache.STAGE_KEYS, json.dumps({"accuracy int8": "k"}))
    before = accuracy_key(judged, "int8", "weights")
    assert before == accuracy_key(judged, "int8", "weights")
    (tmp_path / "data.txt").write_text("2")
    assert before != accuracy_key(judged, "int8", "weights")
    assert (unjudged.data_digest(), unjudged.data_digest(finetunes=True)) == ("", "2")


def test_the_command_reports_how_the_weights_were_made(run_here: RunHere) -> None:
    run = run_here("train", "--models", "tests/models", "--model", "image", "--json")
    assert json.loads(run.stdout)["weights"] == "brought"
    run = run_here("train", "--models", "tests/models", "--model", "image")
    assert run.stdout == "image comes with its weights: no train() in tests/models/image/model.py\n"
