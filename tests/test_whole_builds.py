"""Real stages: the keys of deploy.toml that each one reads, and what killed builds leave."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from cli.main import values_of
from deepseek.spec import DeploymentSpec
from deepseek.spec.checks import Table
from deepseek.spec.files.folders import SCRATCH
from export import build, cache
from export.rows import load_rows
from tests.add_one import replace_in
from tests.test_pipeline import options_of


def declared_tables() -> dict[type, str]:
    """The tables of deploy.toml that a stage may declare keys of, by their type."""
    types = {name: field.annotation for name, field in DeploymentSpec.model_fields.items()}
    return {of: name for name, of in types.items() if isinstance(of, type) and issubclass(of, Table)}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Keys of deploy.toml that code reads from now on, dotted, without reads of the spec's own checks."""
    keys: set[str] = set()
    tables, plain = declared_tables() | {DeploymentSpec: ""}, Table.__getattribute__
    own = ("load", "of_model", "for_target")

    def recorded(table: Table, name: str) -> Any:
        value = plain(table, name)
        if name in type(table).model_fields and type(table) in tables and type(value) not in tables:
            frame = sys._getframe(1)
            while frame.f_back is not None and not (
                "deepseek/spec/" in frame.f_code.co_filename and frame.f_code.co_name in own
            ):
                frame = frame.f_back
            if frame.f_back is None:
                keys.add(f"{tables[type(table)]}.{name}".lstrip("."))
        return value

    monkeypatch.setattr(Table, "__getattribute__", recorded, raising=False)
    return keys


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["train", "prune", "to_onnx", "quantize fp16", "quantize int8", "to_torchscript", "select_precision", "publish"],
)
def test_a_stage_reads_only_the_keys_of_deploy_toml_that_the_pipeline_declares(
    name: str, built: Path, tmp_path: Path, own_build: Path, read: set[str], no_children: None
) -> None:
    model = "image" if name == "prune" else "text"
    shutil.copytree(built / "build" / model, tmp_path / "build" / model)
    known = {"model": model, "models": Path("tests/models"), "prune": 0.25 if name == "prune" else None}
    known["target"] = "torchscript" if name == "to_torchscript" else "onnxruntime"
    builder = build.Builder(build.build_plan_of(options_of(tmp_path, **known)))
    stages = (*build.stages_of(builder.plan), build.publish_stage(builder.plan))
    stage = next(each for each in stages if each.name.startswith(name))
    command, *flags = builder.command(stage)[3:]
    options = values_of(command, *flags)
    read.clear()
    importlib.import_module(stage.module).main(options)
    assert "name" in read
    declared = {*stage.keys, "batching.threads", "batching.instances"}  # threads change only the speed of a graph
    declared |= {f"precision.{setting}" for setting in stage.settings}  # what a stage needs of a key
    assert [key for key in read if not any(f"{key}.".startswith(f"{each}.") for each in declared)] == []


def check_whole(folder: Path) -> None:
    """Checks that every published file, version and cache entry is complete."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".onnx":
                onnx.load(path)
            elif path.suffix == ".npz":
                assert load_rows(path)
    for manifest in folder.glob("*/repository/text/*/manifest.json"):
        files = json.loads(manifest.read_text())["files"]
        assert {name: cache.sha256(manifest.parent / name) for name in files} == {
            name: digest["sha256"] for name, digest in files.items()
        }
    for index in folder.glob(f"cache/*/{cache.INDEX}"):
        files = json.loads(index.read_text())
        assert {name: cache.sha256(index.parent / name) for name in files} == files


@pytest.mark.slow
def test_builds_of_two_clones_killed_at_any_moment_leave_no_partial_files(tmp_path: Path) -> None:
    shutil.copytree("tests/models/text", tmp_path / "models" / "text")
    replace_in(tmp_path / "models" / "text" / "deploy.toml", '"fp32", "fp16", "int8"', '"fp16"')
    clones, moments = [tmp_path / "a", tmp_path / "b"], random.Random(7)

    def start(clone: Path) -> subprocess.Popen[bytes]:
        places = {"--models": tmp_path / "models", "--repository": clone / "repository", "--env-file": clone / "env"}
        flags = ["--model", "text", "--target", "onnxruntime", *(str(each) for pair in places.items() for each in pair)]
        own = {"DEEPSEEK_BUILD": str(clone / "build"), "DEEPSEEK_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "cli", "engine", *flags]
        return subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True)

    for _ in range(6):
        for process in [start(clone) for clone in clones]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(1, 12))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        check_whole(tmp_path)
    assert [process.wait() for process in [start(clone) for clone in clones]] == [0, 0]
    check_whole(tmp_path)
    graphs = [clone / "build" / "text" / "fp16" / "model.onnx" for clone in clones]
    assert cache.sha256(graphs[0]) == cache.sha256(graphs[1])
    for clone in clones:
        assert not list(clone.rglob(f"{SCRATCH}*"))
