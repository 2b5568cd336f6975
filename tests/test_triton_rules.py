"""Generated configurations keep Triton's own rules, read from its sources of July 2026.

Core: ValidateModelConfig, ValidateIOShape and ValidateInstanceGroup (model_config_utils.cc), GenerateWarmupData
(backend_model_instance.cc). TensorRT backend: ValidateGraphSpec, and the profile's bounds (instance_state.cc).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from deepseek.spec import DeploymentSpec
from export.triton_config import model_config

TEXT = DeploymentSpec.load("tests/models/text")


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
    shapes = {entry.name: list(entry.dims) for entry in config.input}
    for graph in config.optimization.cuda.graph_spec:
        if not max(1, axis.min) <= graph.batch_size <= most:
            yield f"CUDA graph of batch {graph.batch_size}, max_batch_size {most}"
        if graph.input.keys() != shapes.keys() or any(dim < 0 for each in graph.input.values() for dim in each.dim):
            yield f"CUDA graph of the inputs {[*graph.input]}"
    for sample in config.model_warmup:
        if not axis.min <= sample.batch_size <= most:
            yield f"warm-up of batch {sample.batch_size}, max_batch_size {most}"
        for name, entry in sample.inputs.items():
            if any(dim < 0 for dim in entry.dims) or not entry.WhichOneof("input_data_type"):
                yield f"warm-up input {name!r}"


def a_spec(choose: random.Random) -> DeploymentSpec:
    """A valid spec with random axes, batching and CUDA graphs."""
    least, usual, most = sorted(choose.choices(range(1, 130), k=3))
    batching: dict[str, Any] = {"instances": choose.randint(1, 8)}
    if choose.random() < 0.7:
        batching["max_batch"] = choose.randint(least, most)
    tensorrt: dict[str, Any] = {"cuda_graphs": choose.random() < 0.8}
    if tensorrt["cuda_graphs"] and choose.random() < 0.5:
        tensorrt["cuda_graph_batches"] = [choose.randint(least, most) for _ in range(3)]
    facts = TEXT.model_dump(mode="json") | {"batching": batching, "tensorrt": tensorrt, "targets": {}}
    facts["axes"]["batch"] = {"min": least, "opt": usual, "max": most}
    return DeploymentSpec.model_validate_json(json.dumps(facts))


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "torchscript"])
def test_no_generated_configuration_breaks_a_rule_of_triton(target: Any) -> None:
    row = {name: np.ones((1, 16), np.int64) for name in TEXT.inputs}
    for seed in range(200):
        spec = a_spec(random.Random(seed))
        assert list(broken_rules(model_config(spec, "fp16", target, {"1": row}), spec)) == [], seed


def test_the_rules_see_what_triton_refuses() -> None:
    spec = a_spec(random.Random(0))
    config = model_config(spec, "fp16", "tensorrt", {})
    config.optimization.cuda.graph_spec.add(batch_size=config.max_batch_size + 1)
    config.instance_group[0].profile.append("1")
    config.input[0].dims[:] = []
    assert len(list(broken_rules(config, spec))) >= 3
