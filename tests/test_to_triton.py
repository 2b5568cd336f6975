"""The model repository: configuration, versions, and a server that never sees half of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient import grpc as triton
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from deepseek.spec import DeploymentSpec, InputError, SloSpec, TensorrtSpec
from deepseek.spec.folders import alone_in
from deepseek.spec.repository import KEPT_VERSIONS, versions_of
from export.artifact import choice_path, sha256
from export.to_triton import chosen_precision, config_text, model_config, publish_version
from serving.doctor import examine
from serving.embedded import EmbeddedServer
from serving.machine import Machine
from serving.releases import Journal
from tests.conftest import run_module

IMAGE, TEXT = DeploymentSpec.load("tests/models/image"), DeploymentSpec.load("tests/models/text")


def test_the_configuration_is_deploy_toml_in_tritons_words() -> None:
    config = model_config(TEXT, "int8", "onnxruntime", {})
    assert text_format.Parse(config_text(config), ModelConfig()) == config
    assert (config.name, config.backend, config.max_batch_size) == ("text", "python", 8)
    assert {entry.name: list(entry.dims) for entry in config.input} == {"input_ids": [-1], "attention_mask": [-1]}
    policy = config.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 512
    assert policy.default_timeout_microseconds == 1_000_000
    assert policy.timeout_action == ModelQueuePolicy.REJECT
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000


def test_tensorrt_gets_its_own_backend_and_the_gpu() -> None:
    config = model_config(IMAGE, "fp16", "tensorrt", {})
    assert config.backend == "tensorrt"
    assert config.default_model_filename == "model.plan"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


@pytest.mark.parametrize("target", ["tensorrt", "torchscript"])
def test_what_nvidias_server_alone_runs_has_the_slos_latencies_as_bounds_of_its_histogram(target: Any) -> None:
    slo = {"p50_ms": 3, "p99_ms": 80, "rate_rps": 40, "objectives": ["p99.9_ms < 200", "p99_ms < 7 @ 5 rps"]}
    spec = DeploymentSpec.model_validate_json(json.dumps(IMAGE.model_dump(mode="json") | {"slo": slo}))
    control = model_config(spec, "fp32", target, {}).model_metrics.metric_control[0]
    assert control.metric_identifier.family == "nv_inference_first_response_histogram_ms"
    assert list(control.histogram_options.buckets) == [3, 8, 20, 40, 60, 80, 120, 160, 200, 320, 800]


def test_what_the_embedded_server_may_run_names_no_field_that_it_does_not_know() -> None:
    assert not model_config(IMAGE, "fp32", "onnxruntime", {}).HasField("model_metrics")
    rateless = IMAGE.model_copy(update={"slo": SloSpec(rate_rps=5)})
    assert not model_config(rateless, "fp16", "tensorrt", {}).HasField("model_metrics")


def test_torchscript_gets_the_pytorch_backend_on_the_device_that_it_was_made_for() -> None:
    config = model_config(IMAGE, "fp32", "torchscript", {})
    assert (config.backend, config.platform) == ("pytorch", "pytorch_libtorch")
    assert config.default_model_filename == "model.pt"
    assert [entry.name for entry in config.output] == ["scores", "features"]  # the order is what the backend goes by
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    group = model_config(IMAGE, "fp32", "torchscript", {}, "cuda:1").instance_group[0]
    assert (group.kind, list(group.gpus)) == (ModelInstanceGroup.KIND_GPU, [1])


def on_provider(spec: DeploymentSpec, **keys: object) -> DeploymentSpec:
    """The spec with keys in [onnxruntime]."""
    return DeploymentSpec.model_validate_json(json.dumps({**spec.model_dump(mode="json"), "onnxruntime": keys}))


@pytest.mark.parametrize(
    ("provider", "kind"),
    [("auto", "KIND_CPU"), ("cpu", "KIND_CPU"), ("cuda", "KIND_GPU"), ("tensorrt", "KIND_GPU"), ("migraphx", "KIND_CPU")],
)  # fmt: skip
def test_an_nvidia_provider_by_name_spreads_over_the_gpus(provider: str, kind: str) -> None:
    config = model_config(on_provider(TEXT, provider=provider), "fp32", "onnxruntime", {})
    assert config.backend == "python"
    assert ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == kind
    assert config.parameters["provider"].string_value == provider


def test_providers_options_reach_the_server_and_tensorrts_have_the_profile() -> None:
    spec = on_provider(TEXT, provider="tensorrt", options={"trt_engine_cache_enable": True, "device_id": 1})
    config = model_config(spec, "fp32", "onnxruntime", {})
    assert json.loads(config.parameters["provider_options"].string_value) == {
        "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "trt_profile_opt_shapes": "input_ids:4x16,attention_mask:4x16",
        "trt_profile_max_shapes": "input_ids:8x64,attention_mask:8x64",
        "trt_engine_cache_enable": "1",
        "device_id": "1",
    }
    plain = model_config(on_provider(TEXT, provider="cuda"), "fp32", "onnxruntime", {})
    assert plain.parameters["provider_options"].string_value == "{}"


@pytest.mark.parametrize(
    ("provider", "kind", "accelerators"),
    [("auto", "KIND_AUTO", []), ("cpu", "KIND_CPU", []), ("cuda", "KIND_GPU", ["cuda"]), ("tensorrt", "KIND_GPU", ["tensorrt"])],
)  # fmt: skip
def test_tritons_own_onnx_runtime_takes_the_same_words(
    build: Path, tmp_path: Path, provider: str, kind: str, accelerators: list[str]
) -> None:
    spec = on_provider(TEXT, backend="onnxruntime", provider=provider)
    config = model_config(spec, "fp32", "onnxruntime", {})
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "model.onnx")
    assert ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == kind
    found = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in found] == accelerators
    assert all(accelerator.parameters == spec.provider_options for accelerator in found)
    publish_version(spec, "fp32", "onnxruntime", tmp_path)
    assert not list((tmp_path / "text" / "1").glob("*.py"))


@pytest.mark.parametrize(("batches", "captured"), [((), [1, 2, 4, 8]), ((3, 8), [3, 8])], ids=["default", "named"])
def test_cuda_graphs_are_captured_at_opt_for_each_batch_size(batches: tuple[int, ...], captured: list[int]) -> None:
    table = {"cuda_graphs": True, "cuda_graph_batches": batches}
    spec = DeploymentSpec.model_validate_json(json.dumps(TEXT.model_dump(mode="json") | {"tensorrt": table}))
    cuda = model_config(spec, "fp16", "tensorrt", {}).optimization.cuda
    assert cuda.graphs
    assert [graph.batch_size for graph in cuda.graph_spec] == captured
    opt = {"input_ids": [16], "attention_mask": [16]}  # of the axis `length`
    assert all({name: list(shape.dim) for name, shape in graph.input.items()} == opt for graph in cuda.graph_spec)


def test_cuda_graphs_are_off_unless_asked_and_tensorrts_alone() -> None:
    assert not model_config(TEXT, "fp16", "tensorrt", {}).HasField("optimization")
    spec = TEXT.model_copy(update={"tensorrt": TensorrtSpec(cuda_graphs=True)})
    assert not model_config(spec, "fp16", "onnxruntime", {}).HasField("optimization")


def test_the_warm_up_asks_for_no_batch_below_the_profile() -> None:
    data = IMAGE.model_dump(mode="json")
    data["axes"]["batch"]["min"] = 2
    row = {"pixels": np.zeros((1, 3, 32, 32), np.float32)}
    config = model_config(DeploymentSpec.model_validate_json(json.dumps(data)), "fp16", "tensorrt", {"1": row})
    assert [sample.batch_size for sample in config.model_warmup] == [2, 8]


def test_a_target_overrides_batching() -> None:
    data = IMAGE.model_dump(mode="json") | {"targets": {"tensorrt": {"batching": {"instances": 5}}}}
    spec = DeploymentSpec.model_validate_json(json.dumps(data))
    assert model_config(spec, "fp16", "tensorrt", {}).instance_group[0].count == 5
    assert model_config(spec, "fp16", "onnxruntime", {}).instance_group[0].count == 2


def test_each_build_becomes_the_next_version_and_the_oldest_go(build: Path, tmp_path: Path) -> None:
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
        "turns.py",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"image"}


def test_versions_to_go_back_to_are_kept_however_their_numbers_lie(build: Path, tmp_path: Path) -> None:
    for there in ("1", "5"):  # those between were rolled back
        (tmp_path / "image" / there).mkdir(parents=True)
    publish_version(IMAGE, "fp32", "onnxruntime", tmp_path)
    assert versions_of(tmp_path / "image") == [6, 5, 1]


def test_an_engine_of_another_profile_is_refused(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    shutil.copytree(built / "build" / "image", tmp_path / "image")
    data = IMAGE.model_dump(mode="json")
    data["axes"]["batch"]["max"] = 64
    with pytest.raises(InputError, match=r'was built for the axes .*"max": 8.* deploy.toml now has .*"max": 64'):
        publish_version(
            DeploymentSpec.model_validate_json(json.dumps(data)), "fp32", "onnxruntime", tmp_path / "repository"
        )


@pytest.fixture
def recorded(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with version 1 of `image`, in fp16, and a build folder of its own for records; fp32 beside it."""
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    shutil.copytree(built / "build" / "image", tmp_path / "build" / "image")
    publish_version(IMAGE, "fp16", "onnxruntime", tmp_path / "repository")
    publish_version(IMAGE, "fp32", "onnxruntime", tmp_path / "fp32")
    return tmp_path / "repository"


def record(repository: Path, outcome: str, kind: Any = "release", version: int = 2, before: int = 1) -> None:
    """Leaves the record of a release, or rollback, of the model in fp32; the step `parity` failed."""
    where = str(repository.resolve())
    journal = Journal(
        repository.parent / "build" / "image" / "releases", kind, version, before=before, repository=where
    )
    journal.keep("manifest.json", (repository.parent / "fp32" / "image" / "1" / "manifest.json").read_text())
    if outcome == "refused":
        journal.write(step="parity", state="failed", said="why")
    if outcome:
        journal.write(outcome=outcome)
    time.sleep(0.002)  # records are told apart by their ms


def test_what_a_gate_refused_is_published_only_where_that_is_asked_for(recorded: Path) -> None:
    record(recorded, "refused")
    record(recorded, "")  # one that was killed decides nothing
    flags = ("--models", "tests/models", "--model", "image", "--precision", "fp32", "--repository", str(recorded))
    run = run_module("export.to_triton", *flags)
    (said,) = (line for line in run.stderr.splitlines() if not line.startswith("warning"))
    assert (run.returncode, versions_of(recorded / "image")) == (2, [1])
    assert said.startswith("error: image: what is built was refused as version 2, ")
    assert "make release MODEL=image MODELS=tests/models" in said
    assert said.endswith("make engine MODEL=image MODELS=tests/models ANYWAY=1 (--anyway)")
    assert publish_version(IMAGE, "fp32", "onnxruntime", recorded.parent / "other")["version"] == 1
    assert run_module("export.to_triton", *flags, "--anyway").returncode == 0
    assert versions_of(recorded / "image") == [2, 1]


def test_the_latest_that_was_decided_about_the_same_files_counts(recorded: Path) -> None:
    record(recorded, "refused")
    record(recorded, "live")
    assert publish_version(IMAGE, "fp32", "onnxruntime", recorded)["version"] == 2
    shutil.rmtree(recorded / "image" / "2")
    record(recorded, "rolled back", kind="rollback", version=1, before=2)
    with pytest.raises(InputError, match="what is built was rolled back as version 2"):
        publish_version(IMAGE, "fp32", "onnxruntime", recorded)
    assert publish_version(IMAGE, "int8", "onnxruntime", recorded)["version"] == 2  # other files


def test_another_configuration_that_was_refused_keeps_nobody_from_what_is_served(recorded: Path) -> None:
    publish_version(IMAGE, "fp32", "onnxruntime", recorded)
    record(recorded, "refused", version=3, before=2)  # the same files
    assert publish_version(IMAGE, "fp32", "onnxruntime", recorded)["version"] == 3
    slow = IMAGE.model_copy(update={"batching": IMAGE.batching.model_copy(update={"max_queue_delay_us": 777})})
    with pytest.raises(InputError, match="what is built was refused as version 3"):
        publish_version(slow, "fp32", "onnxruntime", recorded)


def test_what_is_published_is_on_the_disk_before_its_rename(
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


def test_an_unbuilt_precision_says_how_to_build_it(build: Path, tmp_path: Path) -> None:
    flags = ("--models", "tests/models", "--model", "image", "--precision", "fp8", "--repository", str(tmp_path))
    run = run_module("export.to_triton", *flags)
    assert run.returncode == 2
    assert "make engine MODEL=image MODELS=tests/models PRECISION=fp8" in run.stderr


def test_what_was_chosen_for_another_file_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    engine = tmp_path / "m" / "int8" / "model.onnx"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"compared")
    choice = {"chosen": "int8", "sha256": {"int8": sha256(engine)}}
    choice_path("m", "onnxruntime").write_text(json.dumps(choice))
    assert chosen_precision("m", "onnxruntime") == "int8"
    engine.write_bytes(b"made since")
    with pytest.raises(
        InputError, match=r"int8/model\.onnx: not the one that .* chose; compare anew: python -m export"
    ):
        chosen_precision("m", "onnxruntime")


@pytest.mark.slow
def test_a_polling_server_serves_on_through_new_versions(build: Path, tmp_path: Path) -> None:
    publish_version(TEXT, "fp32", "onnxruntime", tmp_path / "repository")
    served: list[str] = []
    failures: list[Exception] = []
    done = threading.Event()
    ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with EmbeddedServer(tmp_path / "repository", poll_s=1, log_path=tmp_path / "triton.log", **ports) as server:

        def call() -> None:
            client = triton.InferenceServerClient(server.grpc_url)
            inputs = [triton.InferInput(name, [1, 5], "INT64") for name in TEXT.inputs]
            for tensor in inputs:
                tensor.set_data_from_numpy(np.ones((1, 5), np.int64))
            while not done.is_set():
                try:
                    served.append(client.infer("text", inputs).get_response().model_version)
                except Exception as error:
                    failures.append(error)
                time.sleep(0.01)

        caller = threading.Thread(target=call)
        caller.start()
        for precision in ("fp16", "int8", "fp32"):
            publish_version(TEXT, precision, "onnxruntime", tmp_path / "repository")
            time.sleep(2.5)
        done.set()
        caller.join()
    assert failures == []
    assert served[0] == "1"
    assert served[-1] == "4"


def test_batches_may_be_bounded_below_the_profile(build: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned.toml").write_text("[targets.onnxruntime.batching]\nmax_batch = 4\ninstances = 3\nthreads = 1\n")
    flags = ("--models", "tests/models", "--model", "image", "--repository", str(tmp_path), "--precision", "fp32")
    assert run_module("export.to_triton", *flags, "--tuned", str(tmp_path / "tuned.toml")).returncode == 0
    config = text_format.Parse((tmp_path / "image" / "config.pbtxt").read_text(), ModelConfig())
    assert config.max_batch_size == 4
    assert [sample.batch_size for sample in config.model_warmup] == [1, 4]
    assert (config.instance_group[0].count, config.parameters["threads"].string_value) == (3, "1")
    assert json.loads((tmp_path / "image" / "1" / "manifest.json").read_text())["axes"]["batch"]["max"] == 8
    machine = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",))
    assert not [line for line in examine(tmp_path, machine)[1] if line.level == "mismatch"]


def test_a_publisher_waits_for_another_one_and_says_so(build: Path, tmp_path: Path) -> None:
    arguments = ("export.to_triton", "--models", "tests/models", "--model", "image", "--repository", str(tmp_path))
    with alone_in(tmp_path):
        waiting = subprocess.Popen([sys.executable, "-m", *arguments], stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == f"waiting for another process in {tmp_path}\n"
        assert list(tmp_path.iterdir()) == []
    waiting.communicate()
    assert waiting.returncode == 0
    assert (tmp_path / "image" / "1").is_dir()
