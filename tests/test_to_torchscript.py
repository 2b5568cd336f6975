"""PyTorch to TorchScript: traced, or scripted if a trace is not enough, with the names that Triton's backend needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.spec import GateFailed, InputError
from export.artifact import read_manifest
from export.model_folder import ModelFolder
from export.rows import save_rows
from export.runtimes.torchscript_predictor import torchscript_predictor
from export.stages.to_torchscript import export_model
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import RunHere, run_module
from tests.tiny_model import TOML, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # TorchScript itself is deprecated
    pytest.mark.usefixtures("own_build"),
]

TWO_OUTPUTS = TOML.replace("[axes", '[outputs.z]\ndtype = "float32"\nshape = ["batch", 8]\n[axes')
BRANCH = "\n        if x.sum() > 0:\n            return self.line(x)\n        return -x"
LOOP = "return torch.stack([self.line(row) for row in x])"
NOT_COMPILED = "\n        import math\n        x = x * math.ceil(0.5)\n        "  # no import inside TorchScript


def export(folder: Path, **model: Any) -> tuple[dict[str, Any], ModelFolder]:
    """Runs the stage on a tiny model, whose evaluation rows it writes first."""
    source = tiny(folder, **model)
    save_rows(folder / "build" / "tiny" / "evaluation.npz", source.rows("evaluation", 12))
    return export_model(source), source


@pytest.mark.parametrize(
    ("body", "way"),
    [("return self.line(x)", "traced"), (BRANCH, "scripted"), (LOOP, "scripted"), (LOOP.replace("torch", "{'y': torch") + "}", "scripted")],
    ids=["plain", "branch on values", "loop over the batch", "loop, outputs by name"],
)  # fmt: skip
def test_a_model_whose_trace_would_bake_in_values_is_scripted(tmp_path: Path, body: str, way: str) -> None:
    result, source = export(tmp_path, body=body)
    assert (result["made_by"], result["baked_in"]) == (way, [])
    assert [check["sizes"]["batch"] for check in result["checks"]] == [1, 9, 5]
    predict = torchscript_predictor(source.spec, Path(result["path"]), "cpu")
    for sign in (1, -1):  # both sides of the branch
        x = sign * np.ones((3, 8), np.float32)
        with torch.no_grad():
            (expected,) = source.load()(torch.from_numpy(x))
        np.testing.assert_allclose(predict({"x": x})["y"], expected.numpy(), rtol=1e-5)


def test_a_branch_that_cannot_be_compiled_is_reported_with_its_line(tmp_path: Path, run_here: RunHere) -> None:
    source = tiny(tmp_path, body=NOT_COMPILED + BRANCH)
    save_rows(tmp_path / "build" / "tiny" / "evaluation.npz", source.rows("evaluation", 12))
    run = run_here("to-torchscript", "--models", str(tmp_path), "--model", "tiny")
    assert run.returncode == 0, run.stderr
    assert "warning: tracing fixed a branch or a number that depends on inputs (model.py:15)" in run.stderr
    assert "traced on" in run.stdout
    path = tmp_path / "build" / "tiny" / "fp32" / "torchscript" / "model.pt"
    assert read_manifest(path).settings["baked_in"] == ["model.py:15"]


def test_a_size_that_tracing_and_scripting_both_fix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"traced: model.pt: does not run at batch 1.*; scripted: import statements"):
        export(tmp_path, body=NOT_COMPILED + LOOP)
    assert not (tmp_path / "build" / "tiny" / "fp32" / "torchscript" / "model.pt").exists()


@pytest.mark.parametrize(
    "body", ["return self.line(x), x + 1", "return [self.line(x), x + 1]", "return {'z': x + 1, 'y': self.line(x)}"],
    ids=["tuple", "list", "dict"],
)  # fmt: skip
def test_outputs_are_a_tuple_in_the_order_of_deploy_toml(tmp_path: Path, body: str) -> None:
    result, _ = export(tmp_path, toml=TWO_OUTPUTS, body=body)
    module = torch.jit.load(result["path"])
    assert [argument.name for argument in module.forward.schema.arguments[1:]] == ["x"]
    returned = module(torch.ones(2, 8))
    assert isinstance(returned, tuple)
    torch.testing.assert_close(returned[1], torch.full((2, 8), 2.0))


@pytest.mark.parametrize("name", ["in-put", "lambda", "returned", "größe"])
def test_an_input_that_is_no_python_name_is_passed_by_position(tmp_path: Path, name: str) -> None:
    code = f"\n_own = samples\ndef samples(split):\n    for row in _own(split):\n        yield {{{name!r}: row['x']}}\n"
    result, _ = export(tmp_path, toml=TOML.replace("inputs.x", f"inputs.'{name}'"), code=code)
    schema = torch.jit.load(result["path"]).forward.schema
    assert [argument.name for argument in schema.arguments[1:]] == ["argument_0"]


@pytest.mark.slow
def test_it_is_compared_and_published_and_the_embedded_server_reports_that_it_cannot_serve_it(
    built: Path, tmp_path: Path
) -> None:
    shutil.copytree(built / "build" / "text", tmp_path / "build" / "text")
    which = ("--models", "tests/models", "--model", "text")
    for stage, *flags in (
        ("to-torchscript",),
        ("select-precision", "--target", "torchscript", "--precision", "fp32"),
        ("publish", "--target", "torchscript", "--repository", str(tmp_path / "repository")),
    ):
        run = run_module("cli", stage, *which, *flags)
        assert run.returncode == 0, run.stderr
    choice = json.loads((tmp_path / "build" / "text" / "choice-torchscript.json").read_text())
    assert choice["chosen"] == "fp32"
    assert choice["variants"]["fp32"]["parity"]["embedding"]["worst_error"] < 1e-5
    found = json.loads((tmp_path / "repository" / "text" / "1" / "manifest.json").read_text())["found"]
    assert found["made_by"] == "traced"
    assert set(found["dtypes"]) == {"float32"}
    with (
        pytest.raises(
            InputError, match=r"this server has no pytorch backend: .* make engine MODEL=text TARGET=onnxruntime"
        ),
        EmbeddedServer(tmp_path / "repository", http_port=0, grpc_port=0, metrics_port=0),
    ):
        pass


def test_a_damaged_module_is_one_line(tmp_path: Path) -> None:
    result, source = export(tmp_path)
    path = Path(result["path"])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.pt: TorchScript cannot load it"):
        torchscript_predictor(source.spec, path, "cpu")
