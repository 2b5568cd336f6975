"""Every precision of every model through TensorRT for RTX, and the report of failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from export.artifact import refuse
from tests.add_one import replace_in
from tests.conftest import RunHere, run_module

pytest.importorskip("tensorrt_rtx")
BOTH = ("--precision", "fp32", "--precision", "int8", "--json")


def test_every_model_is_compiled_and_proved_in_every_precision(typed: Path) -> None:
    models = ("--models", "tests/models", "--model", "image", "--model", "text")
    run = run_module("cli", "check-engine", "--no-build", *models, *BOTH, DEEPSEEK_BUILD=str(typed))
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)["rows"]
    assert [(row["model"], row["precision"]) for row in rows] == [
        ("image", "fp32"),
        ("image", "int8"),
        ("text", "fp32"),
        ("text", "int8"),
    ]
    assert all(row["compute_layers"][row["precision"]] >= 2 for row in rows)
    assert [row["size_over_fp32"] for row in rows if row["precision"] == "fp32"] == [1, 1]
    assert all((row["read_from"], row["tf32"]) == ("network", True) for row in rows)  # without a GPU nothing is loaded
    assert all(row["build_s"] > 0 and row["failure"] == "" for row in rows)
    assert list(typed.rglob("model.plan")) == []


def test_a_graph_in_the_wrong_precision_fails_the_check_without_affecting_others(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "build" / "image", tmp_path / "image")
    shutil.copy(tmp_path / "image" / "fp32" / "model.onnx", tmp_path / "image" / "fp16" / "model.onnx")
    (tmp_path / "image" / "int8" / "model.onnx").unlink()
    image = ("--models", "tests/models", "--model", "image")
    run = run_module("cli", "check-engine", "--no-build", *image, DEEPSEEK_BUILD=str(tmp_path))
    assert run.returncode == 1
    assert "image fp16: fp16 was asked for, but 0 compute layers of the network run in it" in run.stdout
    assert (
        "int8/model.onnx: no such file; make it with: make check-engine MODEL=image MODELS=tests/models" in run.stdout
    )
    assert "error: 3 of 4 engines failed: image fp16, image int8, image fp8" in run.stderr


def test_an_int8_graph_for_the_cpu_fails_and_says_what_to_do(built: Path, run_here: RunHere) -> None:
    image = ("--models", "tests/models", "--model", "image", "--precision", "int8")
    run = run_here("check-engine", "--no-build", *image, DEEPSEEK_BUILD=str(built / "build"))
    assert run.returncode == 1
    assert "made for ONNX Runtime on a CPU" in run.stdout
    assert "quantize it with --target tensorrt_rtx" in run.stdout


def test_an_empty_folder_of_models_is_one_line(tmp_path: Path) -> None:
    run = run_module("cli", "check-engine", "--no-build", "--models", str(tmp_path))
    assert run.returncode == 2
    assert run.stderr == f"error: {tmp_path}: contains no model folder; a model folder holds deploy.toml and model.py\n"


@pytest.mark.parametrize(
    ("candidates", "flags", "summary"),
    [
        ('["fp32"]', (), "1 of 4 passed, 3 refused (not candidates)"),
        ('["fp8"]', (), "1 of 4 passed, 1 failed, 2 refused (not candidates)"),
        ('["fp32"]', ("--precision", "fp32", "--precision", "fp8"), "1 of 2 passed, 1 failed"),
    ],
    ids=["not wanted", "a candidate", "asked for by name"],
)
def test_a_refused_precision_is_shown_and_fails_if_it_was_wanted(
    built: Path, tmp_path: Path, candidates: str, flags: tuple[str, ...], summary: str
) -> None:
    shutil.copytree(built / "build" / "image" / "fp32", tmp_path / "build" / "image" / "fp32")
    for precision in ("fp16", "int8", "fp8"):
        refuse(tmp_path / "build" / "image" / precision / "model.onnx", "nothing of it is large enough")
    shutil.copytree("tests/models/image", tmp_path / "models" / "image")
    replace_in(tmp_path / "models" / "image" / "deploy.toml", '["fp16", "int8"]', candidates)
    flags = ("--models", str(tmp_path / "models"), "--model", "image", *flags)
    run = run_module("cli", "check-engine", "--no-build", *flags, DEEPSEEK_BUILD=str(tmp_path / "build"))
    assert run.returncode == ("failed" in summary), run.stderr
    assert summary in run.stdout
    assert "nothing of it is large enough" in run.stdout
    assert ("image fp8" in run.stderr) == ("failed" in summary)
