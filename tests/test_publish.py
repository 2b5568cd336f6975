"""Publishing: versions, and servers that never see a partial one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient

from cli.main import values_of
from deepseek.onnxruntime_session import choose_provider
from deepseek.spec import DeploymentSpec, GateFailed, InputError, PublishedManifest, TensorrtSpec
from deepseek.spec.files.folders import alone_in
from deepseek.spec.files.manifest import OWN_DATA
from deepseek.spec.files.repository import KEPT_VERSIONS, versions_of
from deepseek.spec.machine.gpus import parse_gpus
from deepseek.spec.tables import OnnxRuntimeSpec, TargetSpec
from export.artifact import choice_of, choice_path, digests, read_manifest, refuse, sha256, write_manifest
from export.checks.parity_cases import tolerance_of
from export.stages import publish
from export.stages.publish import publish_version
from export.stages.to_onnx import export_model
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from serving.embedded.launcher import EmbeddedServer
from serving.release.journal import ReleaseJournal
from serving.repository.checks import read_config
from serving.repository.served_models import served_models
from tests.conftest import FREE, RunHere
from tests.test_triton_config import with_batch
from tests.tiny_model import FIXED, tiny

IMAGE, TEXT = DeploymentSpec.load("tests/models/image"), DeploymentSpec.load("tests/models/text")


def test_each_build_adds_a_version_and_the_oldest_are_removed(build: Path, tmp_path: Path) -> None:
    for expected in range(1, KEPT_VERSIONS + 3):
        assert publish_version(IMAGE, "fp32", "onnxruntime", tmp_path)["version"] == expected
    assert versions_of(tmp_path / "image") == [5, 4, 3]
    assert {path.name.split("-")[0] for path in (tmp_path / "image" / "warmup").iterdir()} == {"3", "4", "5"}
    assert {path.name for path in (tmp_path / "image" / "5").iterdir()} == {
        "config.pbtxt",
        "manifest.json",
        "model.onnx",
        "model.py",
        "onnxruntime_session.py",
        "bulk_requests.py",
        "compute_slots.py",
        "model_inputs.py",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"image"}


def test_an_engine_of_another_profile_is_refused(built: Path, tmp_path: Path, own_build: Path) -> None:
    shutil.copytree(built / "build" / "image", own_build / "image")
    with pytest.raises(InputError, match=r'was built for the axes .*"max": 8.* deploy.toml now has .*"max": 64'):
        publish_version(with_batch(IMAGE, max=64), "fp32", "onnxruntime", tmp_path / "repository")


@pytest.fixture
def planned(built: Path, own_build: Path) -> Path:
    """A separate build folder for `image`, with a stand-in for a TensorRT engine in fp16."""
    shutil.copytree(built / "build" / "image", own_build / "image")
    plan = own_build / "image" / "fp16" / "tensorrt" / "model.plan"
    plan.parent.mkdir()
    plan.write_bytes(b"compiled")
    manifest = read_manifest(plan.parents[1] / "model.onnx").model_copy(update={"files": {}})
    write_manifest(plan.with_name("manifest.json"), manifest)
    return plan


def test_a_compiled_engine_is_published_alone_and_its_manifest_lists_its_cuda_graphs(
    planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "optimizers_left_out", pytest.fail)  # of an ONNX graph
    on_tensorrt = {"tensorrt": TargetSpec(batching={"max_batch": 4})}
    spec = IMAGE.model_copy(update={"tensorrt": TensorrtSpec(cuda_graphs=True), "targets": on_tensorrt})
    publish_version(spec, "fp16", "tensorrt", tmp_path / "repository")
    version = tmp_path / "repository" / "image" / "1"
    assert sorted(path.name for path in version.iterdir()) == ["config.pbtxt", "manifest.json", "model.plan"]
    manifest = PublishedManifest.load(version / "manifest.json")
    assert (manifest.target, manifest.settings["cuda_graph_batches"]) == ("tensorrt", [1, 2, 4])
    assert OWN_DATA not in manifest.settings
    monkeypatch.setattr(publish, "last_options", lambda name: {"data": "clicks.csv", "prune": ""})
    publish_version(spec, "fp16", "tensorrt", tmp_path / "repository")
    assert PublishedManifest.load(version.with_name("2") / "manifest.json").settings[OWN_DATA]


def test_an_fp32_engine_in_tf32_says_so(planned: Path, own_build: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(planned.parent, own_build / "image" / "fp32" / "tensorrt")) / "model.plan"
    for tf32, told in ((False, set()), (True, {"tf32"})):
        made = read_manifest(engine).model_copy(update={"precision": "fp32", "found": {"tf32": tf32}})
        write_manifest(engine.with_name("manifest.json"), made)
        publish_version(IMAGE, "fp32", "tensorrt", tmp_path / "repository")
        parameters = read_config(tmp_path / "repository" / "image" / "config.pbtxt").parameters
        assert {*parameters} - {"precision"} == told
    on_cuda = IMAGE.model_copy(update={"onnxruntime": OnnxRuntimeSpec(provider="cuda")})
    publish_version(on_cuda, "fp32", "onnxruntime", tmp_path / "cuda")
    assert "tf32" in read_config(tmp_path / "cuda" / "image" / "config.pbtxt").parameters
    for parameters, like in ((["precision"], "fp32"), (["precision", "tf32"], "fp16")):
        assert tolerance_of(IMAGE, "fp32", parameters).model_dump() == getattr(IMAGE.parity, like).model_dump()


def test_among_several_kinds_of_gpu_an_engine_is_loaded_on_those_that_run_it(
    planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(
        planned.with_name("manifest.json"), read_manifest(planned).model_copy(update={"compute_capability": "9.0"})
    )
    listed = "Tesla T4, 7.5, 580.95.05, 15360\nNVIDIA H100, 9.0, 580.95.05, 81559\n"
    monkeypatch.setattr(publish, "gpus", lambda: parse_gpus(listed))
    publish_version(IMAGE, "fp16", "tensorrt", tmp_path / "repository")
    group = read_config(tmp_path / "repository" / "image" / "config.pbtxt").instance_group[0]
    assert list(group.gpus) == [1]


def test_a_copy_that_differs_from_the_build_is_refused(planned: Path, tmp_path: Path) -> None:
    planned.write_bytes(b"damaged")
    with pytest.raises(GateFailed, match=r"model\.plan was changed after the build; build it again: make clean engine"):
        publish_version(IMAGE, "fp16", "tensorrt", tmp_path / "repository")
    assert not (tmp_path / "repository" / "image").exists()
    with pytest.raises(InputError, match="Triton cannot load such an engine"):
        publish_version(IMAGE, "fp16", "tensorrt_rtx", tmp_path / "repository")


def test_publishing_a_refused_candidate_gives_the_reason(planned: Path, tmp_path: Path) -> None:
    refuse(planned, "no Conv, MatMul or Gemm of the graph runs in fp16")
    with pytest.raises(InputError, match="image: fp16 could not be made: no Conv, MatMul or Gemm"):
        publish_version(IMAGE, "fp16", "tensorrt", tmp_path / "repository")


@pytest.mark.parametrize("left", ["nothing", "the earlier version's"])
def test_a_build_restores_the_configuration_that_a_killed_publisher_left_out(
    left: str, build: Path, tmp_path: Path
) -> None:
    config = tmp_path / "image" / "config.pbtxt"
    publish_version(IMAGE, "fp32", "onnxruntime", tmp_path)
    earlier = config.read_text()
    publish_version(IMAGE, "int8", "onnxruntime", tmp_path)
    config.unlink() if left == "nothing" else config.write_text(earlier)
    found = publish_version(IMAGE, "int8", "onnxruntime", tmp_path, if_changed=True)
    assert (found["version"], found["new"]) == (2, False)
    assert config.read_text() == (tmp_path / "image" / "2" / "config.pbtxt").read_text()


def test_across_mounts_of_one_disk_a_version_is_copied_beside_its_destination_first(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, model = os.rename, tmp_path / "image"

    def across(source: Path, destination: Path) -> None:
        if Path(source).is_relative_to(build) != Path(destination).is_relative_to(build):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", across)
    monkeypatch.setattr(publish, "_staging", lambda *_: build / "image")
    for _ in range(KEPT_VERSIONS + 1):
        publish_version(IMAGE, "fp32", "onnxruntime", tmp_path)
    assert versions_of(model) == [4, 3, 2]
    assert {path.name for path in model.iterdir()} == {"4", "3", "2", "warmup", "config.pbtxt"}
    files = PublishedManifest.load(model / "4" / "manifest.json").files
    assert digests(model / "4").items() >= files.items()


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOTEMPTY, InputError, "image: version 1 was just added by another build; run it again"),
        (errno.EEXIST, InputError, "image: version 1 was just added by another build; run it again"),
        (errno.EIO, OSError, "no such luck"),
    ],
)
def test_a_failed_rename_reports_the_reason(
    code: int, error: type[Exception], message: str, build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, tried = os.rename, list[int]()

    def fails(source: Path, destination: Path) -> None:
        if Path(destination) == tmp_path / "image":
            tried.append(code)
            raise OSError(code, "no such luck")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(error, match=message):
        publish_version(IMAGE, "fp32", "onnxruntime", tmp_path)
    assert (list(tmp_path.iterdir()), tried) == ([], [code])


def test_a_version_is_staged_on_the_disk_of_the_repository(tmp_path: Path, own_build: Path) -> None:
    (own_build / "image").mkdir(parents=True)
    assert publish._staging("image", tmp_path) == own_build / "image"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert publish._staging("image", Path(other)) == Path(other)
        (Path(other) / "image").mkdir()
        assert publish._staging("image", Path(other)) == Path(other) / "image"


def test_the_command_reports_what_it_published_and_warns_about_a_single_instance(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.toml").write_text("[targets.onnxruntime.batching]\ninstances = 1\nmax_batch = 4\n")
    flags = ["--models", "tests/models", "--model", "image", "--repository", str(tmp_path / "repository")]
    chosen = json.loads((build / "image" / "choice-onnxruntime.json").read_text())["chosen"]
    said, configs = [], []
    for more in (["--tuned", str(tmp_path / "one.toml")], ["--precision", "fp32", "--json"]):
        publish.main(values_of("publish", *flags, *more))
        said.append(capsys.readouterr())
        configs.append(read_config(tmp_path / "repository" / "image" / "config.pbtxt"))
    model = tmp_path / "repository" / "image"
    assert [config.max_batch_size for config in configs] == [4, 8]
    assert [sample.batch_size for sample in configs[0].model_warmup] == [1, 4]
    assert PublishedManifest.load(model / "1" / "manifest.json").axes["batch"]["max"] == 8
    machine = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",))
    assert not [line for line in examine(model.parent, machine)[1] if line.level == "mismatch"]
    assert said[0].out == f"{model}/1: {chosen} for onnxruntime, batches of up to 4\n"
    assert [each.err.startswith("warning: batching.instances = 1") for each in said] == [True, False]
    added = {"path": f"{model}/2", "version": 2, "new": True}
    assert json.loads(said[1].out) == added | {"precision": "fp32", "target": "onnxruntime"}


@pytest.fixture
def recorded(built: Path, tmp_path: Path, own_build: Path) -> Path:
    """A repository with version 1 of `image` in fp16, and a separate build folder for records; fp32 beside it."""
    shutil.copytree(built / "build" / "image", own_build / "image")
    publish_version(IMAGE, "fp16", "onnxruntime", tmp_path / "repository")
    publish_version(IMAGE, "fp32", "onnxruntime", tmp_path / "fp32")
    return tmp_path / "repository"


def record(repository: Path, outcome: str, kind: Any = "release", version: int = 2, before: int = 1) -> None:
    """Writes the record of a release or rollback of the fp32 model, whose step `parity` failed."""
    where = str(repository.resolve())
    journal = ReleaseJournal(
        repository.parent / "build" / "image" / "releases", kind, version, before=before, repository=where
    )
    journal.keep("manifest.json", (repository.parent / "fp32" / "image" / "1" / "manifest.json").read_text())
    if outcome == "refused":
        journal.write(step="parity", state="failed", said="why")
    if outcome:
        journal.write(outcome=outcome)
    time.sleep(0.002)  # records differ by their milliseconds


def test_a_version_that_a_gate_refused_is_published_only_on_request(recorded: Path, run_here: RunHere) -> None:
    record(recorded, "refused")
    record(recorded, "")  # a killed release decides nothing
    flags = ("--models", "tests/models", "--model", "image", "--precision", "fp32", "--repository", str(recorded))
    run = run_here("publish", *flags)
    (said,) = (line for line in run.stderr.splitlines() if not line.startswith("warning"))
    assert (run.returncode, versions_of(recorded / "image")) == (2, [1])
    assert said.startswith("error: image: this build was refused as version 2, ")
    assert "make release MODEL=image MODELS=tests/models" in said
    assert said.endswith("make engine MODEL=image MODELS=tests/models ANYWAY=1 (--anyway)")
    assert publish_version(IMAGE, "fp32", "onnxruntime", recorded.parent / "other")["version"] == 1
    assert run_here("publish", *flags, "--anyway").returncode == 0
    assert versions_of(recorded / "image") == [2, 1]


def test_the_latest_decision_about_the_same_files_counts(recorded: Path) -> None:
    record(recorded, "refused")
    record(recorded, "live")
    assert publish_version(IMAGE, "fp32", "onnxruntime", recorded)["version"] == 2
    shutil.rmtree(recorded / "image" / "2")
    record(recorded, "rolled back", kind="rollback", version=1, before=2)
    with pytest.raises(InputError, match="this build was rolled back as version 2"):
        publish_version(IMAGE, "fp32", "onnxruntime", recorded)
    assert publish_version(IMAGE, "int8", "onnxruntime", recorded)["version"] == 3  # other files, and 2 was served


def test_a_refused_configuration_does_not_block_the_version_that_is_served(recorded: Path) -> None:
    publish_version(IMAGE, "fp32", "onnxruntime", recorded)
    record(recorded, "refused", version=3, before=2)  # the same files
    assert publish_version(IMAGE, "fp32", "onnxruntime", recorded)["version"] == 3
    slow = IMAGE.model_copy(update={"batching": IMAGE.batching.model_copy(update={"max_queue_delay_us": 777})})
    with pytest.raises(InputError, match="this build was refused as version 3"):
        publish_version(slow, "fp32", "onnxruntime", recorded)


def test_published_files_are_flushed_to_disk_before_the_rename(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        assert not (tmp_path / "image" / "1").exists()

    monkeypatch.setattr("os.fsync", fsync)
    publish_version(IMAGE, "fp32", "onnxruntime", tmp_path)
    model = tmp_path / "image"
    assert {path.stat().st_ino for path in (model / "1", *(model / "1").iterdir(), model / "config.pbtxt")} <= synced


def test_the_execution_provider_that_was_measured_is_the_one_that_serves(
    built: Path, tmp_path: Path, run_here: RunHere
) -> None:
    shutil.copytree(built / "build" / "image", tmp_path / "build" / "image")
    choice = tmp_path / "build" / "image" / "choice-onnxruntime.json"
    measured = json.loads(choice.read_text())
    assert measured["provider"] == choose_provider("auto")
    choice.write_text(json.dumps(measured | {"provider": "cuda"}))
    flags = ("--models", "tests/models", "--model", "image", "--repository", str(tmp_path / "repository"))
    run = run_here("publish", *flags, DEEPSEEK_BUILD=str(tmp_path / "build"))
    assert run.returncode == 0, run.stderr
    config = read_config(tmp_path / "repository" / "image" / "config.pbtxt")
    assert config.parameters["provider"].string_value == "cuda"  # which the stack serves with NVIDIA's image
    assert served_models(tmp_path / "repository", Path("tests/models"))[0].needs_gpu


def test_optimizers_that_break_the_graph_are_published_as_disabled(build: Path, tmp_path: Path) -> None:
    publish_version(IMAGE, "fp16", "onnxruntime", tmp_path)
    config = read_config(tmp_path / "image" / "config.pbtxt")
    assert config.parameters["left_out"].string_value == "MatmulTransposeFusion"


def test_a_choice_made_for_another_file_is_not_published(own_build: Path) -> None:
    engine = own_build / "m" / "int8" / "model.onnx"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"compared")
    choice = {"chosen": "int8", "provider": "cpu", "sha256": {"int8": sha256(engine)}}
    choice_path("m", "onnxruntime").write_text(json.dumps(choice))
    assert choice_of("m", "onnxruntime") == ("int8", "cpu")
    engine.write_bytes(b"made since")
    with pytest.raises(
        InputError, match=r"int8/model\.onnx has changed since .* chose it; re-run: deepseek select-precision"
    ):
        choice_of("m", "onnxruntime")


def test_a_model_of_one_batch_size_is_served(tmp_path: Path, own_build: Path) -> None:
    source = tiny(tmp_path / "models", toml=FIXED)
    export_model(source)
    publish_version(source.spec, "fp32", "onnxruntime", tmp_path / "repository")
    with (
        EmbeddedServer(tmp_path / "repository", log_path=tmp_path / "triton.log", **FREE) as server,
        InferenceClient(server.grpc_url) as client,
    ):
        assert client.infer("tiny", {"x": np.ones((4, 8), np.float32)})["y"].shape == (4, 8)


def test_a_publisher_waits_for_another_one_and_reports_it(build: Path, tmp_path: Path) -> None:
    arguments = ("cli", "publish", "--models", "tests/models", "--model", "image", "--repository", str(tmp_path))
    with alone_in(tmp_path):
        waiting = subprocess.Popen([sys.executable, "-m", *arguments], stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == f"waiting for another process in {tmp_path}\n"
        assert list(tmp_path.iterdir()) == []
    waiting.communicate()
    assert waiting.returncode == 0
    assert (tmp_path / "image" / "1").is_dir()
