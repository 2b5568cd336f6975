"""Generated configurations keep Triton's own rules, read from its sources of July 2026.

Core: ValidateModelConfig, ValidateIOShape and ValidateInstanceGroup (model_config_utils.cc), GenerateWarmupData
(backend_model_instance.cc). TensorRT backend: ValidateGraphSpec, SetCudaGraphShape, and the profile's bounds
(instance_state.cc).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from deepseek.spec import DeploymentSpec, TensorrtSpec
from export.rows import Row
from export.triton_config import config_text, model_config

TEXT, RANKER = (DeploymentSpec.load(f"tests/models/{name}") for name in ("text", "ranker"))


def broken_rules(config: ModelConfig, spec: DeploymentSpec) -> Iterator[str]:
    """What Triton, or its TensorRT backend with an engine of this profile, would refuse."""
    axis, most = spec.axes["batch"], config.max_batch_size
    if not 0 < most <= axis.max:
        yield f"max_batch_size {most}, but the profile ends at {axis.max}"
    for size in config.dynamic_batching.preferred_batch_size:
        if not 0 < size <= most:
            yield f"preferred batch size {size}"
    for entry in (*config.input, *config.output):
        if not entry.name or not entry.data_type or not entry.dims or any(dim < 1 and dim != -1 for dim in entry.dims):
            yield f"tensor {entry.name!r}"
        if entry.HasField("reshape") and not entry.reshape.shape and list(entry.dims) != [1]:
            yield f"an empty reshape of {entry.name!r}"
    for group in config.instance_group:
        if group.profile or (group.gpus and group.kind != ModelInstanceGroup.KIND_GPU):
            yield f"instance group {group}"
    yield from _broken_graphs(config, spec)
    yield from _broken_warmup(config, spec)


def _broken_graphs(config: ModelConfig, spec: DeploymentSpec) -> Iterator[str]:
    for graph in config.optimization.cuda.graph_spec:
        if not 1 <= graph.batch_size <= config.max_batch_size:
            yield f"CUDA graph of batch {graph.batch_size}, max_batch_size {config.max_batch_size}"
        if graph.input.keys() != {entry.name for entry in config.input}:
            yield f"CUDA graph of the inputs {[*graph.input]}"
        for name, each in graph.input.items():
            shape, least, most = (graph.batch_size, *each.dim), spec.shape(name, "min"), spec.shape(name, "max")
            if len(shape) != len(least) or not all(
                low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
            ):
                yield f"CUDA graph of {name} {shape}, the profile is {least} to {most}"


def _broken_warmup(config: ModelConfig, spec: DeploymentSpec) -> Iterator[str]:
    for sample in config.model_warmup:
        if not spec.axes["batch"].min <= sample.batch_size <= config.max_batch_size:
            yield f"warm-up of batch {sample.batch_size}, max_batch_size {config.max_batch_size}"
        for entry in config.input:
            if not entry.optional and entry.name not in sample.inputs:
                yield f"warm-up without {entry.name!r}"
        for name, value in sample.inputs.items():
            (entry,) = (each for each in config.input if each.name == name)
            sizes = [size for dim, size in zip(entry.dims, value.dims, strict=True) if size != dim and dim != -1]
            if sizes or any(dim < 0 for dim in value.dims) or value.data_type != entry.data_type:
                yield f"warm-up input {name!r} of {value.dims}"
            if not value.WhichOneof("input_data_type"):
                yield f"warm-up input {name!r} without data"


def a_spec(choose: random.Random, facts: dict[str, Any]) -> DeploymentSpec:
    """The spec with random axes, batching and CUDA graphs."""
    axes = {
        name: dict(zip(("min", "opt", "max"), sorted(choose.choices(range(1, 130), k=3)), strict=True))
        for name in facts["axes"]
    }
    least, most = axes["batch"]["min"], axes["batch"]["max"]
    batching: dict[str, Any] = {"instances": choose.randint(1, 8)}
    if choose.random() < 0.7:
        batching["max_batch"] = choose.randint(least, most)
    if choose.random() < 0.5:
        batching["preferred_batch"] = choose.randint(least, batching.get("max_batch", most))
    tensorrt: dict[str, Any] = {"cuda_graphs": choose.random() < 0.8}
    if tensorrt["cuda_graphs"] and choose.random() < 0.5:
        tensorrt["cuda_graph_batches"] = [choose.randint(least, most) for _ in range(3)]
    changed = {"axes": axes, "batching": batching, "tensorrt": tensorrt, "targets": {}}
    return DeploymentSpec.model_validate_json(json.dumps(facts | changed))


def a_row(spec: DeploymentSpec) -> Row:
    """A row with every axis at opt."""
    return {name: np.ones((1, *spec.shape(name, "opt")[1:]), tensor.dtype) for name, tensor in spec.inputs.items()}


@pytest.mark.parametrize("model", [TEXT, RANKER], ids=lambda spec: spec.name)
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "torchscript"])
def test_no_generated_configuration_breaks_a_rule_of_triton(target: Any, model: DeploymentSpec) -> None:
    for seed in range(100):
        choose = random.Random(seed)
        spec = a_spec(choose, model.model_dump(mode="json"))
        gpus = choose.choice([[], [1], [0, 2]]) if target == "tensorrt" else []
        device = choose.choice(["cpu", "cuda:1"])
        config = model_config(spec, "fp16", target, {"1": a_row(spec)}, device, gpus=gpus)
        assert list(broken_rules(config, spec)) == [], seed


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("max_batch_size: 8", "max_batch_size: 9", "max_batch_size 9, but the profile ends at 8"),
        ("dynamic_batching {", "dynamic_batching { preferred_batch_size: 9", "preferred batch size 9"),
        ("dims: 32", "dims: 0", "tensor 'embedding'"),
        ("dims: 32", "dims: 32 reshape { }", "an empty reshape of 'embedding'"),
        ("kind: KIND_GPU", 'kind: KIND_GPU profile: "1"', "instance group"),
        ("kind: KIND_GPU", "kind: KIND_CPU gpus: 0", "instance group"),
        (r"(graph_spec \{\s+batch_size: )8", r"\g<1>9", "CUDA graph of batch 9, max_batch_size 8"),
        (r"(graph_spec \{\s+batch_size: 8\s+input \{\s+key: \"\w+)", r"\1_", "CUDA graph of the inputs"),
        ("dim: 16", "dim: 65", "CUDA graph of "),
        (r"(model_warmup \{\s+name: \"1-batch-8\"\s+batch_size: )8", r"\g<1>9", "warm-up of batch 9"),
        (r"(dims: 16\s+)input_data_file: \"1-input_ids\"", r"\1", "warm-up input 'input_ids' without data"),
        (r"dims: 16(\s+input_data_file)", r"dims: -1\1", "warm-up input "),
        (r"TYPE_INT64(\s+dims: 16)", r"TYPE_INT32\1", "warm-up input "),
        (
            r"model_warmup \{",
            'model_warmup { batch_size: 1 name: "none" } model_warmup {',
            "warm-up without 'input_ids'",
        ),
    ],
)
def test_the_rules_see_what_triton_refuses(old: str, new: str, rule: str) -> None:
    spec = TEXT.model_copy(update={"tensorrt": TensorrtSpec(cuda_graphs=True)})
    text = config_text(model_config(spec, "fp16", "tensorrt", {"1": a_row(spec)}))
    assert list(broken_rules(text_format.Parse(text, ModelConfig()), spec)) == []
    changed, count = re.subn(old, new, text, count=1)
    assert count
    found = next(broken_rules(text_format.Parse(changed, ModelConfig()), spec))
    assert found.startswith(rule)
