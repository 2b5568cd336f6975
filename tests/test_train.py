"""A model's weights: trained once for the same code, data and settings, whoever shares the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.spec import InputError
from export import cache
from export.budget import accuracy_key
from export.source import Source
from export.train import make_weights
from tests.conftest import run_module
from tests.test_to_onnx import TOML

# Trains to what `seed.txt` beside the build says, and counts how often it did so.
MODEL = """
import os
from pathlib import Path
import torch

FOLDER = Path(os.environ["BUILD"]) / "tiny"
DATA = Path(os.environ["BUILD"]).parent.parent / "data.txt"

def train():
    FOLDER.mkdir(parents=True, exist_ok=True)
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

Clone = Callable[..., Source]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """Makes a model folder with a `build/` of its own; all share data and cache."""
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.txt").write_text("1")

    def make(name: str, code: str = MODEL + FINGERPRINT, toml: str = TOML) -> Source:
        monkeypatch.setenv("BUILD", str(tmp_path / name / "build"))
        folder = tmp_path / name / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deploy.toml").write_text(toml)
        (folder / "model.py").write_text(code)
        return Source("tiny", tmp_path / name)

    return make


def trained(folder: Path) -> int:
    """How often training ran."""
    return len((folder / "trained").read_text())


def test_another_clone_gets_the_weights_out_of_the_cache(clone: Clone, tmp_path: Path) -> None:
    assert make_weights(clone("one")) == "trained"
    other = clone("two")
    assert make_weights(other) == "cached"
    assert float(other.unpruned().weight.detach()[0, 0]) == 1
    assert sorted(path.name for path in (tmp_path / "two" / "build" / "tiny").iterdir()) == ["weights.pt", "words"]
    assert trained(tmp_path) == 1


@pytest.mark.parametrize("change", ["data", "DATA", "code", "file", "signature", "off"])
def test_what_training_depends_on_is_in_the_key(
    clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    make_weights(clone("one"))
    if change == "data":
        (tmp_path / "data.txt").write_text("2")
    if change == "DATA":
        monkeypatch.setenv("DATA", str(tmp_path / "data.txt"))
    if change == "off":
        monkeypatch.setenv("CACHE", "off")
    code = MODEL + FINGERPRINT + ("# another line\n" if change == "code" else "")
    source = clone("two", code, TOML.replace("max = 9", "max = 10") if change == "signature" else TOML)
    if change == "file":
        (source.folder / "rates.toml").write_text("rate = 0.1")
    assert make_weights(source) == "trained"


def test_how_it_is_served_is_not_in_the_key(clone: Clone) -> None:
    make_weights(clone("one"))
    assert make_weights(clone("two", toml=TOML + "[batching]\ninstances = 3\n[slo]\np99_ms = 7\n")) == "cached"


def test_without_a_fingerprint_it_trains_each_time(clone: Clone, tmp_path: Path) -> None:
    assert [make_weights(clone(name, MODEL)) for name in ("one", "two")] == ["trained", "trained"]
    assert not list((tmp_path / "cache").glob("*"))


def test_an_entry_that_lacks_what_was_there_before_is_made_whole(clone: Clone, tmp_path: Path) -> None:
    source = clone("one")
    (tmp_path / "one" / "build" / "tiny").mkdir(parents=True)
    (tmp_path / "one" / "build" / "tiny" / "words").write_text("8")  # of a training that was killed
    assert make_weights(source) == "trained"
    assert [make_weights(clone(name)) for name in ("two", "three")] == ["trained", "cached"]


def test_an_entry_that_loads_to_other_weights_is_not_taken(clone: Clone, tmp_path: Path) -> None:
    make_weights(clone("one"))
    (place,) = (path.parent for path in (tmp_path / "cache").glob(f"*/{cache.INDEX}"))
    index = json.loads((place / cache.INDEX).read_text())
    (place / "weights.sha256").write_text("0" * 64)
    index["weights.sha256"] = cache.sha256(place / "weights.sha256")
    (place / cache.INDEX).write_text(json.dumps(index))
    assert make_weights(clone("two")) == "trained"


@pytest.mark.parametrize("told", ["None", "''", "7"])
def test_a_fingerprint_that_is_no_text_is_one_line(clone: Clone, told: str) -> None:
    source = clone("one", f"{MODEL}\ndef fingerprint():\n    return {told}\n")
    with pytest.raises(InputError, match=r"model.py: fingerprint\(\) returned .*; a text is needed"):
        make_weights(source)


def test_accuracy_by_an_evaluate_that_may_read_anything_is_measured_anew(clone: Clone, tmp_path: Path) -> None:
    toml = TOML + '[precision]\nmetric = "score"\n'
    score = "\ndef evaluate(predict):\n    return {'score': 1.0}\n"
    build = tmp_path / "one" / "build" / "tiny"
    build.mkdir(parents=True)
    (build / "evaluation.npz").touch()
    for code, known in ((MODEL + score, False), (MODEL + score + FINGERPRINT, True)):
        key = accuracy_key(clone("one", code, toml), "weights", build / "model.onnx", "onnxruntime")
        assert (key is not None) is known


def test_the_command_says_how_the_weights_came_about() -> None:
    run = run_module("export.train", "--models", "tests/models", "--model", "image", "--json")
    assert json.loads(run.stdout)["weights"] == "brought"
    run = run_module("export.train", "--models", "tests/models", "--model", "image")
    assert run.stdout == "image brings its weights: no train() in tests/models/image/model.py\n"
