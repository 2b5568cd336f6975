"""PyTorch to ONNX: the signature holds, and what forward bakes in is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from deepseek.spec import DeploymentSpec, GateFailed, InputError
from export.artifact import load_rows
from export.reference import checked_sizes, error_of, traced_sizes
from export.source import Source
from export.to_onnx import export_model
from tests.conftest import run_module

TOML = """
name = "tiny"
[inputs.x]
dtype = "float32"
shape = ["batch", 8]
[outputs.y]
dtype = "float32"
shape = ["batch", 8]
[axes.batch]
min = 1
opt = 4
max = 9
"""
MODEL = """
import numpy as np
import torch

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(8, 8)

    def forward(self, x):
        {body}

def load():
    torch.manual_seed(0)
    return Tiny()

def samples(split):
    random = np.random.default_rng(len(split))
    for _ in range(12):
        yield {{"x": random.standard_normal(({rows}, 8)).astype(np.float32)}}
"""


def tiny(folder: Path, *, toml: str = TOML, body: str = "return self.line(x)", rows: int = 1, code: str = "") -> Source:
    """A model folder `tiny` whose forward is `body`."""
    (folder / "tiny").mkdir()
    (folder / "tiny" / "deploy.toml").write_text(toml)
    (folder / "tiny" / "model.py").write_text(MODEL.format(body=body, rows=rows) + code)
    return Source("tiny", folder)


@pytest.fixture(autouse=True)
def _own_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))


def test_the_graph_has_the_signatures_names_types_and_axes(built: Path) -> None:
    graph = onnx.load(built / "build" / "text" / "fp32" / "model.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert shapes["input_ids"] == shapes["attention_mask"] == ["batch", "length"]
    assert shapes["embedding"] == ["batch", 32]


def test_it_is_checked_at_the_corners_and_between_never_where_it_was_traced() -> None:
    spec = DeploymentSpec.load("tests/models/text")
    sizes = checked_sizes(spec)
    assert sizes[:2] == [{"batch": 1, "length": 1}, {"batch": 8, "length": 64}]
    assert len(sizes) == 3
    assert traced_sizes(spec) not in sizes


def test_json_tells_shapes_errors_and_rows(tmp_path: Path) -> None:
    tiny(tmp_path)
    run = run_module("export.to_onnx", "--models", str(tmp_path), "--model", "tiny", "--json")
    result = json.loads(run.stdout)
    assert [check["sizes"]["batch"] for check in result["checks"]] == [1, 9, 5]
    assert result["rows"] == {"calibration": 12, "evaluation": 12}
    assert len(load_rows(tmp_path / "build" / "tiny" / "evaluation.npz")) == 12


@pytest.mark.parametrize(
    "body",
    [
        "return self.line(x.reshape(4, 8))",
        "return self.line(x[:4].repeat(x.shape[0] // 4, 1)) * torch.tensor(x.shape[0])",
    ],
    ids=["reshape to the traced batch", "values that depend on the traced batch"],
)
def test_a_size_baked_into_forward_is_refused(tmp_path: Path, body: str) -> None:
    source = tiny(tmp_path, body=body)
    with pytest.raises((InputError, GateFailed)):
        export_model(source)
    assert not (tmp_path / "build" / "tiny" / "fp32" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return x, x", r"forward returned 2 value\(s\) .* names the outputs y"),
        ("return x[:, :3]", r"output 'y': forward returned float32 \[4, 3\]; deploy.toml says"),
        ("return x.double()", r"output 'y': forward returned float64"),
        ("return 3", r"forward returned 1 value\(s\) \(int\)"),
    ],
    ids=["too many outputs", "shape", "dtype", "no tensor"],
)
def test_outputs_that_are_not_the_signatures_are_one_line(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_model(tiny(tmp_path, body=body))


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("return self.line(x).relu() + 1", ["relu"]),
        ("return x", ["y"]),
        ("z = self.line(x); return z, z", ["y", "again"]),
        ("return self.line(x), x", ["linear", "x_too"]),
    ],
    ids=["name of an inner value", "the input itself", "one tensor twice", "inner name and input"],
)
def test_output_names_never_clash(tmp_path: Path, body: str, outputs: list[str]) -> None:
    head, tail = TOML.split("[outputs.y]")
    block, axes = tail.split("[axes")
    toml = head + "".join(f"[outputs.{name}]{block}" for name in outputs) + "[axes" + axes
    export_model(tiny(tmp_path, toml=toml, body=body))
    graph = onnx.load(tmp_path / "build" / "tiny" / "fp32" / "model.onnx").graph
    assert [value.name for value in graph.output] == outputs


def test_calibration_and_evaluation_must_be_disjoint(tmp_path: Path) -> None:
    code = "\n_own = samples\ndef samples(split):\n    return _own('same')\n"
    with pytest.raises(InputError, match="12 of 12 calibration samples are evaluation samples too"):
        export_model(tiny(tmp_path, code=code))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("\ndef samples(split):\n    return []\n", "is empty; evaluation needs real inputs"),
        ("\ndef samples(split):\n    yield {'x': np.zeros(8, np.float32)}\n", r"shape \(8,\); deploy.toml says"),
        ("\ndef samples(split):\n    yield {'x': np.zeros((1, 8))}\n", "seen float64; deploy.toml says a numpy array of float32"),
        ("\ndef samples(split):\n    yield {'z': np.zeros((1, 8))}\n", r"seen \['z'\]; a dict of \['x'\]"),
        ("\ndef samples(split):\n    yield {'x': np.zeros((1, 7), np.float32)}\n", "8 must be 8"),
    ],
    ids=["none", "no batch dimension", "dtype", "name", "size"],
)  # fmt: skip
def test_samples_that_do_not_fit_the_signature_are_one_line(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_model(tiny(tmp_path, code=code))


def test_a_model_without_its_functions_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no function load\(\)"):
        tiny(tmp_path, code="\nload = None\n")


def test_neighbours_of_model_py_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "words.py").write_text("WORDS = 3\n")
    (tmp_path / "tiny" / "deploy.toml").write_text(TOML)
    code = "from . import words\nfrom models.tiny.words import WORDS\n"
    (tmp_path / "tiny" / "model.py").write_text(code + MODEL.format(body="return x", rows=1))
    assert Source("tiny", tmp_path).spec.name == "tiny"


def test_nan_counts_as_an_infinite_error_unless_pytorch_gives_it_too() -> None:
    clean, broken = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    assert error_of(broken, clean) == float("inf")
    assert error_of(clean, broken) == float("inf")
    assert error_of(broken, broken) == 0
