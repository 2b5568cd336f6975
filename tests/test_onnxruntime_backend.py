"""The Python backend that runs ONNX Runtime: it runs whole batches, and a bad request fails alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from deepseek_client import InferenceClient, InvalidInput, ServerError
from onnx import TensorProto, helper

from deepseek.spec import DeploymentSpec, InputError
from export.publishing.backend_files import BACKEND_SOURCES
from export.stages.publish import publish_version
from serving.embedded.launcher import EmbeddedServer
from tests.add_one import replace_in, write_add_one
from tests.conftest import FREE, serves
from tests.gateway import series_of
from tests.waiting import wait_for

models = serves("built")


BULK_QUEUE = (
    "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 2 value {"
    " max_queue_size: 64 default_timeout_microseconds: 60000000 } }"
)


def write_fragile(repository: Path, name: str = "fragile") -> None:
    """y = x + 1 in ONNX Runtime, which fails if x reaches 1; two instances."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["more"], to=TensorProto.INT64),
        helper.make_node("Add", ["sizes", "more"], ["asked"]),
        helper.make_node("Reshape", ["x", "asked"], ["same"]),
        helper.make_node("Add", ["same", "one"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, "columns"]) for name in "xy")
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    graph = helper.make_graph(nodes, name, [x], [y], [one])
    write_add_one(repository, name)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, repository / name / "1" / "model.onnx")
    for source, path in BACKEND_SOURCES.items():
        shutil.copy(path, repository / name / "1" / source)
    path = repository / name / "config.pbtxt"
    replace_in(path, "dynamic_batching {", BULK_QUEUE)
    with path.open("a") as config:
        for key, value in {"threads": "1", "provider": "cpu", "provider_options": "{}"}.items():
            config.write(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n')


def counter(server: EmbeddedServer, series: str) -> float:
    """One of Triton's counters."""
    return series_of(server.metrics_url)[series]


def infer(server: EmbeddedServer, model: str, inputs: dict[str, np.ndarray], **parameters: bool) -> np.ndarray:
    """The first output of one call."""
    with InferenceClient(server.grpc_url, retries=0, timeout_s=60) as client:
        return next(iter(client.infer(model, inputs, parameters=parameters or None).values()))


def statistics(server: EmbeddedServer, model: str) -> dict[str, Any]:
    """Triton's own counts of a model."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/stats") as response:
        return json.load(response)["model_stats"][0]


def test_a_bad_request_fails_alone(models: EmbeddedServer) -> None:
    def call(token: int) -> str:
        inputs = {"input_ids": np.full((1, 9), token), "attention_mask": np.ones((1, 9), np.int64)}
        try:
            return str(infer(models, "text", inputs).shape)
        except InvalidInput as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(call, [3, 99999] * 40))
    assert set(answers[::2]) == {"(1, 32)"}
    assert all(re.search("inference failed.*99999", each) for each in answers[1::2])
    labels = '{model="text",reason="INTERNAL",version="1"}'  # callers' mistakes are not counted
    assert counter(models, f"onnxruntime_inference_request_failure{labels}") == 0


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server of the model `fragile` that follows its repository."""
    folder = tmp_path_factory.mktemp("fragile")
    write_fragile(folder / "repository")
    with EmbeddedServer(folder / "repository", poll_s=0.2, **FREE, log_path=folder / "triton.log") as running:
        yield running


FAILED = 'onnxruntime_inference_request_failure{model="fragile",reason="INTERNAL",version="1"}'


def test_failures_of_onnx_runtime_are_counted_by_model(fragile: EmbeddedServer) -> None:
    """Triton counts the failure as a success, since it was answered. Bulk requests fail in a thread of their own."""

    def call(value: int, bulk: bool) -> str:
        x = np.full((1, 2, 3), value, np.float32)
        try:
            return str(infer(fragile, "fragile", {"x": x}, bulk=bulk).sum())
        except ServerError:
            return "INTERNAL"

    before = counter(fragile, FAILED)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(call, [0, 1] * 40, [False, False, True, True] * 20))
    assert answers == ["6.0", "INTERNAL"] * 40
    assert counter(fragile, FAILED) == before + 40
    succeeded = 'nv_inference_request_success{model="fragile",version="1"}'  # counted after the answers
    wait_for(lambda: counter(fragile, succeeded) >= 80)


def test_a_version_that_is_loaded_again_keeps_its_counters(fragile: EmbeddedServer) -> None:
    """Its old processes end after the new ones began. If they freed the counters, the new ones would crash the server."""
    before = counter(fragile, FAILED)
    os.utime(fragile.repository / "fragile" / "config.pbtxt")
    wait_for(lambda: "successfully unloaded 'fragile'" in fragile.log_path.read_text())
    assert counter(fragile, FAILED) == before


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [(65, 65, "axis length is 65; allowed: 1 to 64"), (9, 5, "axis length is 5, but 9 in input_ids")],
)
def test_lengths_outside_the_profile_or_unlike_each_other_are_refused(
    models: EmbeddedServer, ids: int, mask: int, said: str
) -> None:
    inputs = {"input_ids": np.ones((2, ids), np.int64), "attention_mask": np.ones((2, mask), np.int64)}
    with pytest.raises(InvalidInput, match=said):
        infer(models, "text", inputs)


def test_the_log_says_which_provider_serves_and_how_many_nodes(models: EmbeddedServer) -> None:
    log = models.log_path.read_text()
    for instance in ("image_0_0", "text_0_1"):
        assert re.search(rf"{instance}: ONNX Runtime [\d.]+, provider cpu, nodes: \d+ on CPUExecutionProvider", log)


def test_a_provider_that_is_missing_is_one_line_at_start_up(build: Path, tmp_path: Path) -> None:
    spec = DeploymentSpec.load("tests/models/text")
    keys = {"provider": "migraphx", "options": {"migraphx_fp16_enable": True}}
    spec = spec.model_validate_json(json.dumps({**spec.model_dump(mode="json"), "onnxruntime": keys}))
    publish_version(spec, "fp32", "onnxruntime", tmp_path / "repository")
    with (
        pytest.raises(InputError) as caught,
        EmbeddedServer(tmp_path / "repository", **FREE, log_path=tmp_path / "triton.log"),
    ):
        pass
    message = str(caught.value)
    assert "execution provider 'migraphx' is not in ONNX Runtime" in message
    assert "install onnxruntime-migraphx" in message
    assert "At:" not in message
