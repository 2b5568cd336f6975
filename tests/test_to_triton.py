"""The model repository: configuration, versions, and a server that never sees half of one."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient import grpc as triton
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelQueuePolicy

from deepseek.spec import DeploymentSpec, InputError
from export.to_triton import KEPT_VERSIONS, config_text, model_config, publish_version
from serving.embedded import EmbeddedServer
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


def test_a_target_overrides_batching() -> None:
    data = IMAGE.model_dump(mode="json") | {"targets": {"tensorrt": {"batching": {"instances": 5}}}}
    spec = DeploymentSpec.model_validate_json(json.dumps(data))
    assert model_config(spec, "fp16", "tensorrt", {}).instance_group[0].count == 5
    assert model_config(spec, "fp16", "onnxruntime", {}).instance_group[0].count == 2


def test_each_build_becomes_the_next_version_and_the_oldest_go(build: Path, tmp_path: Path) -> None:
    for expected in range(1, KEPT_VERSIONS + 3):
        assert publish_version(IMAGE, "fp32", "onnxruntime", tmp_path)["version"] == expected
    versions = sorted(int(path.name) for path in (tmp_path / "image").iterdir() if path.name.isdigit())
    assert versions == [3, 4, 5]
    assert {path.name.split("-")[0] for path in (tmp_path / "image" / "warmup").iterdir()} == {"3", "4", "5"}
    assert {path.name for path in (tmp_path / "image" / "5").iterdir()} == {
        "config.pbtxt",
        "manifest.json",
        "model.onnx",
        "model.py",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"image"}


def test_an_engine_of_another_profile_is_refused(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    shutil.copytree(built / "build" / "image", tmp_path / "image")
    data = IMAGE.model_dump(mode="json")
    data["axes"]["batch"]["max"] = 64
    with pytest.raises(InputError, match=r'was built for the axes .*"max": 8.* deploy.toml now has .*"max": 64'):
        publish_version(
            DeploymentSpec.model_validate_json(json.dumps(data)), "fp32", "onnxruntime", tmp_path / "repository"
        )


def test_an_unbuilt_precision_says_how_to_build_it(build: Path, tmp_path: Path) -> None:
    flags = ("--models", "tests/models", "--model", "image", "--precision", "fp8", "--repository", str(tmp_path))
    run = run_module("export.to_triton", *flags)
    assert run.returncode == 2
    assert "make engine MODEL=image PRECISION=fp8" in run.stderr


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
