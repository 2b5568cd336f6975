"""config.pbtxt: what Triton reads of deploy.toml, for each target."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from deepseek.spec import DeploymentSpec, SloSpec, TensorrtSpec
from deepseek.spec.files.measured_batches import BatchingPlan
from deepseek.vocabulary import Vocabulary
from export.publishing.triton_config import config_text, model_config
from export.rows import Row
from export.stages.publish import publish_version

IMAGE, TEXT, RANKER, SHOP = (
    DeploymentSpec.load(f"tests/models/{name}") for name in ("image", "text", "ranker", "shop")
)


def changed(spec: DeploymentSpec, **tables: object) -> DeploymentSpec:
    """The spec with other tables."""
    return DeploymentSpec.model_validate_json(json.dumps(spec.model_dump(mode="json") | tables))


def with_batch(spec: DeploymentSpec, **ends: int) -> DeploymentSpec:
    """The spec with another end of its axis `batch`."""
    axes = spec.model_dump(mode="json")["axes"]
    return changed(spec, axes=axes | {"batch": axes["batch"] | ends})


def config_of(spec: DeploymentSpec, precision: Any = "fp32", target: Any = "onnxruntime", **known: Any) -> ModelConfig:
    return model_config(spec, precision, target, {}, **known)


def test_config_pbtxt_has_the_values_of_deploy_toml() -> None:
    config = config_of(TEXT, "int8", "onnxruntime")
    assert text_format.Parse(config_text(config), ModelConfig()) == config
    assert (config.name, config.backend, config.max_batch_size) == ("text", "python", 8)
    assert {entry.name: list(entry.dims) for entry in config.input} == {"input_ids": [-1], "attention_mask": [-1]}
    policy = config.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 512
    assert policy.default_timeout_microseconds == 1_000_000
    assert policy.timeout_action == ModelQueuePolicy.REJECT
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000


def test_names_may_fill_the_widest_input_of_a_model() -> None:
    names = Vocabulary("tests/models/shop/catalogue.csv")
    seen = {"seen": {"dtype": "int64", "shape": ["batch", 512]}}
    wide = changed(SHOP, inputs=SHOP.model_dump(mode="json")["inputs"] | seen)
    for spec, most in ((SHOP, 256), (wide, 512)):
        config = config_of(spec, vocabulary=names)
        assert json.loads(config.parameters["vocabulary"].string_value)["names"] == most


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "torchscript"])
def test_one_number_per_row_is_one_dimension_for_callers_and_none_for_the_engine(target: Any) -> None:
    row: Row = {"user_id": np.zeros(1, np.int64), "user_features": np.zeros((1, 16), np.float16)}
    config = model_config(RANKER, "fp32", target, {"1": row})
    for entry in (config.input[0], config.output[1]):
        assert (list(entry.dims), entry.HasField("reshape"), list(entry.reshape.shape)) == ([1], True, [])
    assert not config.input[1].HasField("reshape")
    assert list(config.model_warmup[0].inputs["user_id"].dims) == [1]


def test_tensorrt_uses_its_own_backend_on_the_gpu() -> None:
    config = config_of(IMAGE, "fp16", "tensorrt")
    assert config.backend == "tensorrt"
    assert config.default_model_filename == "model.plan"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


@pytest.mark.parametrize("target", ["tensorrt", "torchscript"])
def test_configurations_only_for_nvidias_server_take_histogram_bounds_from_the_slo(target: Any) -> None:
    slo = {"p50_ms": 3, "p99_ms": 80, "rate_rps": 40, "objectives": ["p99.9_ms < 200", "p99_ms < 7 @ 5 rps"]}
    control = config_of(changed(IMAGE, slo=slo), "fp32", target).model_metrics.metric_control[0]
    assert control.metric_identifier.family == "nv_inference_first_response_histogram_ms"
    assert list(control.histogram_options.buckets) == [3, 8, 20, 40, 60, 80, 120, 160, 200, 320, 800]


def test_configurations_for_the_embedded_server_have_no_field_unknown_to_it() -> None:
    assert not config_of(IMAGE).HasField("model_metrics")
    rateless = IMAGE.model_copy(update={"slo": SloSpec(rate_rps=5)})
    assert not config_of(rateless, "fp16", "tensorrt").HasField("model_metrics")


def test_torchscript_uses_the_pytorch_backend_on_the_device_it_was_made_for() -> None:
    config = config_of(IMAGE, "fp32", "torchscript")
    assert (config.backend, config.platform) == ("pytorch", "pytorch_libtorch")
    assert config.default_model_filename == "model.pt"
    assert [entry.name for entry in config.output] == ["scores", "features"]  # the backend uses the order
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    group = model_config(IMAGE, "fp32", "torchscript", {}, "cuda:1").instance_group[0]
    assert (group.kind, list(group.gpus)) == (ModelInstanceGroup.KIND_GPU, [1])


@pytest.mark.parametrize(
    ("provider", "kind"),
    [("auto", "KIND_CPU"), ("cpu", "KIND_CPU"), ("cuda", "KIND_GPU"), ("tensorrt", "KIND_GPU"), ("migraphx", "KIND_CPU")],
)  # fmt: skip
def test_a_named_nvidia_provider_uses_all_gpus(provider: str, kind: str) -> None:
    config = config_of(changed(TEXT, onnxruntime={"provider": provider}), "fp32", "onnxruntime")
    assert config.backend == "python"
    assert ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == kind
    assert config.parameters["provider"].string_value == provider


def test_provider_options_reach_the_server_and_those_of_tensorrt_include_the_profile() -> None:
    spec = changed(
        TEXT, onnxruntime={"provider": "tensorrt", "options": {"trt_engine_cache_enable": True, "device_id": 1}}
    )
    config = config_of(spec)
    assert json.loads(config.parameters["provider_options"].string_value) == {
        "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "trt_profile_opt_shapes": "input_ids:4x16,attention_mask:4x16",
        "trt_profile_max_shapes": "input_ids:8x64,attention_mask:8x64",
        "trt_engine_cache_enable": "1",
        "device_id": "1",
    }
    plain = config_of(changed(TEXT, onnxruntime={"provider": "cuda"}), "fp32", "onnxruntime")
    assert plain.parameters["provider_options"].string_value == "{}"


@pytest.mark.parametrize(
    ("provider", "kind", "accelerators"),
    [("auto", "KIND_AUTO", []), ("cpu", "KIND_CPU", []), ("cuda", "KIND_GPU", ["cuda"]), ("tensorrt", "KIND_GPU", ["tensorrt"])],
)  # fmt: skip
def test_tritons_own_onnx_runtime_backend_takes_the_same_options(
    build: Path, tmp_path: Path, provider: str, kind: str, accelerators: list[str]
) -> None:
    spec = changed(TEXT, onnxruntime={"backend": "onnxruntime", "provider": provider})
    config = config_of(spec)
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "model.onnx")
    assert ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == kind
    found = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in found] == accelerators
    assert all(accelerator.parameters == spec.provider_options for accelerator in found)
    names = ("gpu_mem_limit", "cudnn_conv_algo_search", "arena_extend_strategy", "do_copy_in_default_stream")
    if provider == "cuda":  # Triton's backend ignores these among the accelerator's
        options = dict(zip(names, (4 << 30, "HEURISTIC", "kSameAsRequested", False), strict=True))
        spec = changed(TEXT, onnxruntime={"backend": "onnxruntime", "provider": provider, "options": options})
        found_in = config_of(spec).parameters
        assert [found_in[name].string_value for name in names] == ["4294967296", "1", "1", "0"]
    if provider == "auto":
        publish_version(spec, "fp32", "onnxruntime", tmp_path)
        assert not list((tmp_path / "text" / "1").glob("*.py"))


@pytest.mark.parametrize(
    ("batches", "batching", "captured"),
    [((), {}, [1, 2, 4, 8]), ((3, 8), {}, [3, 8]), ((), {"max_batch": 4}, [1, 2, 4]), ((3, 8), {"max_batch": 4}, [3])],
    ids=["default", "named", "up to the largest served batch", "named up to it"],
)
def test_cuda_graphs_are_captured_at_opt_for_each_batch_size(
    batches: tuple[int, ...], batching: dict[str, int], captured: list[int]
) -> None:
    tables = {"tensorrt": {"cuda_graphs": True, "cuda_graph_batches": batches}, "batching": batching}
    cuda = config_of(changed(TEXT, **tables), "fp16", "tensorrt").optimization.cuda
    assert cuda.graphs
    assert [graph.batch_size for graph in cuda.graph_spec] == captured
    opt = {"input_ids": [16], "attention_mask": [16]}  # of the axis `length`
    assert all({name: list(shape.dim) for name, shape in graph.input.items()} == opt for graph in cuda.graph_spec)


def test_cuda_graphs_are_opt_in_and_only_for_tensorrt() -> None:
    assert not config_of(TEXT, "fp16", "tensorrt").HasField("optimization")
    spec = TEXT.model_copy(update={"tensorrt": TensorrtSpec(cuda_graphs=True)})
    assert not config_of(spec, "fp16", "onnxruntime").HasField("optimization")


def test_the_warm_up_uses_no_batch_below_the_profile() -> None:
    row = {"pixels": np.zeros((1, 3, 32, 32), np.float32)}
    config = model_config(with_batch(IMAGE, min=2), "fp16", "tensorrt", {"1": row})
    assert [(sample.name, sample.batch_size) for sample in config.model_warmup] == [("1-batch-2", 2), ("1-batch-8", 8)]
    pixels = config.model_warmup[0].inputs["pixels"]
    assert (list(pixels.dims), pixels.input_data_file) == ([3, 32, 32], "1-pixels")


@pytest.mark.parametrize(
    ("target", "backend", "key", "unset"),
    [
        ("onnxruntime", "python", "threads", "0"),
        ("onnxruntime", "onnxruntime", "intra_op_thread_count", ""),
        ("torchscript", "python", "INTRA_OP_THREAD_COUNT", ""),
    ],
)
def test_threads_are_set_under_the_name_that_the_backend_uses(target: Any, backend: str, key: str, unset: str) -> None:
    spec = changed(TEXT, onnxruntime={"backend": backend})
    three = spec.model_copy(update={"batching": spec.batching.model_copy(update={"threads": 3})})
    found = [config_of(each, "fp32", target).parameters for each in (spec, three)]
    assert [each[key].string_value for each in found] == [unset, "3"]


@pytest.mark.parametrize(
    ("target", "keys", "text", "level"),
    [
        ("onnxruntime", {}, "A B", 0),
        ("onnxruntime", {"backend": "onnxruntime", "provider": "cpu"}, "", -1),
        ("onnxruntime", {"backend": "onnxruntime"}, "", -1),
        ("onnxruntime", {"backend": "onnxruntime", "provider": "cuda"}, "", 0),
        ("tensorrt", {}, "", 0),
    ],
    ids=["python", "own on a CPU", "own on any", "own on a GPU", "tensorrt"],
)
def test_optimizers_that_break_a_graph_are_disabled_for_it(target: Any, keys: Any, text: str, level: int) -> None:
    config = config_of(changed(TEXT, onnxruntime=keys), "fp32", target, left_out=["A", "B"])
    assert (config.parameters["left_out"].string_value, config.optimization.graph.level) == (text, level)


def test_batching_and_queue_are_those_of_the_plan() -> None:
    plan = BatchingPlan(run_rows=4, preferred_batch=6, queue_timeout_ms=140, max_queue_size=9, reasons={})
    config = config_of(TEXT, plan=plan)
    policy, joined = config.dynamic_batching.default_queue_policy, config.dynamic_batching.preferred_batch_size
    assert (config.parameters["run_rows"].string_value, list(joined)) == ("4", [6])
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (140_000, 9)


def test_a_target_overrides_batching() -> None:
    spec = changed(IMAGE, targets={"tensorrt": {"batching": {"instances": 5}}})
    assert config_of(spec, "fp16", "tensorrt").instance_group[0].count == 5
    assert config_of(spec, "fp16", "onnxruntime").instance_group[0].count == 2


def broken_rules(config: ModelConfig, spec: DeploymentSpec) -> Iterator[str]:
    """What Triton, or its TensorRT backend with an engine of this profile, would refuse.

    Read from Triton's sources of July 2026. Core: ValidateModelConfig, ValidateIOShape and ValidateInstanceGroup
    (model_config_utils.cc), GenerateWarmupData (backend_model_instance.cc). TensorRT backend: ValidateGraphSpec,
    SetCudaGraphShape, and the profile's bounds (instance_state.cc).
    """
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
