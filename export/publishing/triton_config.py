"""Builds `config.pbtxt`, Triton's configuration of a model, as Triton's own protobuf message."""

import json
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from deepseek.spec import (
    BATCH,
    BULK,
    ONLINE,
    TEXT,
    TOKENS,
    TRITON_DTYPES,
    DeploymentSpec,
    Precision,
    Target,
    TextSpec,
    histogram_bounds_ms,
)
from deepseek.spec.files.batching_plan import batching_of
from deepseek.spec.files.measured_batches import BatchingPlan
from deepseek.spec.text import OFFSETS, text_axis, token_outputs
from deepseek.spec.vocabulary import HISTORY, MOST_NAMES, UNKNOWN, VOCABULARY, K
from deepseek.targets import TARGETS, is_accelerator, is_nvidia
from deepseek.vocabulary import Vocabulary
from export.rows import Row

# Options of the CUDA provider that Triton's ONNX Runtime backend sets to its defaults unless they are parameters of the
# model, with these numbers for names (LoadModel in its onnxruntime.cc).
MODEL_PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "cudnn_conv_algo_search": {"EXHAUSTIVE": "0", "HEURISTIC": "1", "DEFAULT": "2"},
    "gpu_mem_limit": {},
    "arena_extend_strategy": {"kNextPowerOfTwo": "0", "kSameAsRequested": "1"},
    "do_copy_in_default_stream": {},
}


def model_config(
    spec: DeploymentSpec,
    precision: Precision,
    target: Target,
    warmup: dict[str, Row],
    device: str = "cpu",
    left_out: Sequence[str] = (),
    gpus: Sequence[int] = (),
    plan: BatchingPlan | None = None,
    vocabulary: Vocabulary | None = None,
) -> ModelConfig:
    """Triton's configuration of a model.

    `warmup` maps a file-name prefix to the row stored under it. `device` is the one a TorchScript module was made for,
    `left_out` the optimizers of ONNX Runtime to disable for the graph, `gpus` the GPUs that run a TensorRT engine if
    there are others. `plan` is the batching and queue; None: without a measurement. `vocabulary` has the names of the
    items if callers send these.
    """
    spec = spec.for_target(target)
    plan = plan or batching_of(spec, None, precision)
    config = ModelConfig(name=spec.name, max_batch_size=spec.max_served_batch)
    for tensors, added in ((spec.inputs, config.input), (spec.outputs, config.output)):
        for name, tensor in tensors.items():
            entry = added.add(name=name, data_type=_data_type(tensor.dtype))
            entry.dims.extend(_dim(spec, dim) for dim in tensor.triton_dims)
            if len(tensor.shape) == 1:
                entry.reshape.SetInParent()  # to no dimension: the engine takes [batch] where callers send [batch, 1]
    _set_backend(config, spec, target, device)
    config.instance_group[0].gpus.extend(gpus)
    if target == "onnxruntime" and left_out:
        _leave_out(config, left_out)
    config.parameters["precision"].string_value = precision
    if plan.run_rows is not None:
        config.parameters["run_rows"].string_value = str(plan.run_rows)
    _set_batching(config, spec, plan)
    _let_bulk_wait(config)
    if config.backend != "python":
        _set_buckets(config, spec)
    if _warms_up(config, spec):
        _warm_up(config, spec, warmup)
    if (text := spec.text_for(target)) and not spec.has_front(target):
        take_text(config, spec, text, warmup)
    if vocabulary is not None and not spec.has_front(target):
        take_names(config, spec, vocabulary, warmup)
    return config


def _set_batching(config: ModelConfig, spec: DeploymentSpec, plan: BatchingPlan) -> None:
    """Sets how requests join in batches, and how many of them wait for how long."""
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = spec.batching.max_queue_delay_us
    if plan.preferred_batch is not None:
        batching.preferred_batch_size.append(plan.preferred_batch)
    policy = batching.default_queue_policy
    policy.max_queue_size = plan.max_queue_size
    policy.timeout_action = ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = plan.queue_timeout_ms * 1000
    policy.allow_timeout_override = True  # clients may set a shorter timeout


def _warms_up(config: ModelConfig, spec: DeploymentSpec) -> bool:
    """Whether the model takes Triton's warm-up: as many requests of one row as the batch has rows.

    The Python backend checks each request, so it would refuse these below the profile's smallest batch.
    """
    return config.backend != "python" or spec.axes[BATCH].min == 1


def _warm_up(config: ModelConfig, spec: DeploymentSpec, warmup: Mapping[str, Row]) -> None:
    """Adds the smallest and the largest batch of each row to the warm-up."""
    for prefix, row in warmup.items():
        for batch in sorted({spec.axes[BATCH].min, spec.max_served_batch}):
            sample = config.model_warmup.add(name=f"{prefix}-batch-{batch}", batch_size=batch)
            for name, array in row.items():
                entry = sample.inputs[name]
                entry.data_type = _data_type(spec.inputs[name].dtype)
                entry.dims.extend(array.shape[1:] or (1,))
                entry.input_data_file = f"{prefix}-{name}"


def _let_bulk_wait(config: ModelConfig) -> None:
    """Adds a queue for bulk requests behind the others': with half of the places, and ten times the time-out.

    So bulk requests are refused first, and time out before the gateway gives up (`ServedModel.timeout_s`). Both levels
    get a policy: Triton removes the queue of a level without one whenever it is empty, but may still read it.
    """
    batching = config.dynamic_batching
    batching.priority_levels, batching.default_priority_level = BULK, ONLINE
    batching.priority_queue_policy[ONLINE].CopyFrom(batching.default_queue_policy)
    bulk = batching.priority_queue_policy[BULK]
    bulk.CopyFrom(batching.default_queue_policy)
    bulk.max_queue_size = max(1, bulk.max_queue_size // 2)
    bulk.default_timeout_microseconds *= 10


def take_text(
    config: ModelConfig, spec: DeploymentSpec, text: TextSpec, warmup: Iterable[str] = (), lengths: Sequence[int] = ()
) -> None:
    """Adds the input for texts beside the others, which become optional, and the output with the tokens.

    Warm-up then covers texts too: the file `<prefix>-text` holds one, or a pair. `lengths` are the only ones to pad to.
    """
    for entry in config.input:
        entry.optional = True
    size = 2 if text.pairs else 1
    config.input.add(name=TEXT, data_type=DataType.TYPE_STRING, dims=[size], optional=True)
    config.output.add(name=TOKENS, data_type=DataType.TYPE_INT32, dims=[1])
    axis = spec.axes[text_axis(text, spec.inputs)]
    settings = {
        "inputs": text.fills(spec.inputs),
        "max_tokens": text.max_tokens or axis.max,
        "min_tokens": axis.min,
        **({"lengths": lengths} if lengths else {}),
        "max_bytes": text.max_bytes,
        "batch_tokens": text.batch_tokens,
        "pairs": text.pairs,
        "token_outputs": token_outputs(spec.outputs, text_axis(text, spec.inputs)),
        "dimensions": text.dimensions,  # this and the next for serving/openai
        "prompts": text.prompts,
        "default_prompt": text.default_prompt,
    }
    if settings["token_outputs"]:
        config.output.add(name=OFFSETS, data_type=DataType.TYPE_INT32, dims=[-1, 2])
    config.parameters[TEXT].string_value = json.dumps(settings)
    _warm_up_strings(config, spec, TEXT, size, warmup)


def take_names(config: ModelConfig, spec: DeploymentSpec, names: Vocabulary, warmup: Iterable[str] = ()) -> None:
    """Adds the inputs and outputs with names of items. All inputs become optional, and outputs may have k items.

    Names come in lists of any length, which Triton may batch. Warm-up sends one: the file `<prefix>-history`.
    """
    vocabulary = spec.vocabulary
    assert vocabulary is not None
    for entry in config.input:
        entry.optional = True
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for name, dtype in vocabulary.added(kind).items():
            entry = tensors.add(name=name, data_type=DataType.Value(f"TYPE_{dtype.replace('BYTES', 'STRING')}"))
            entry.dims.append(1 if name in (K, UNKNOWN) else -1)
            if kind == "input":
                entry.optional, entry.allow_ragged_batch = True, dtype == "BYTES"
    shape = spec.outputs[vocabulary.items].shape
    cut = [name for name, tensor in spec.outputs.items() if tensor.shape == shape]
    for entry in config.output:
        if entry.name in cut:
            entry.dims[:] = [-1]
    fills = {source: (name, int(spec.inputs[name].shape[1])) for source, name in vocabulary.fills().items()}
    settings = {
        "fills": fills,
        "items": vocabulary.items,
        "cut": cut,
        "most": shape[1],
        "names": max(MOST_NAMES, *(width for _, width in fills.values())),
        "name_bytes": max(map(len, names.names)),  # this and the next for the stack's limits
        "title_bytes": max(map(len, names.titles)),
    }
    config.parameters[VOCABULARY].string_value = json.dumps(settings)
    _warm_up_strings(config, spec, HISTORY, 1, warmup)


def _warm_up_strings(config: ModelConfig, spec: DeploymentSpec, name: str, size: int, warmup: Iterable[str]) -> None:
    """Adds the file `<prefix>-<name>`, a row with `size` strings, to the warm-up."""
    for prefix in warmup:
        for batch in sorted({1, spec.max_served_batch}):
            sample = config.model_warmup.add(name=f"{prefix}-{name}-batch-{batch}", batch_size=batch)
            entry = sample.inputs[name]
            entry.data_type = DataType.TYPE_STRING
            entry.dims.append(size)
            entry.input_data_file = f"{prefix}-{name}"


def _set_backend(config: ModelConfig, spec: DeploymentSpec, target: Target, device: str) -> None:
    """Sets the Triton backend that runs the model, and the number and kind of its instances."""
    group = config.instance_group.add(count=spec.batching.instances, kind=ModelInstanceGroup.KIND_GPU)
    if target == "tensorrt":
        config.backend = "tensorrt"
        config.default_model_filename = TARGETS[target].engine
        for batch in cuda_graph_batches(spec):
            _capture(config, spec, batch)
    elif target == "torchscript":
        config.backend, config.platform = "pytorch", "pytorch_libtorch"
        config.default_model_filename = TARGETS[target].engine
        if device == "cpu":
            group.kind = ModelInstanceGroup.KIND_CPU
        else:
            group.gpus.append(int(device.removeprefix("cuda:")))  # a trace is bound to its device's number
        if spec.batching.threads:
            config.parameters["INTRA_OP_THREAD_COUNT"].string_value = str(spec.batching.threads)
    elif spec.onnxruntime.backend == "onnxruntime":
        _set_own_onnxruntime(config, group, spec)
    else:
        config.backend = "python"
        # `auto` is resolved only when the model loads, so it gets one device; Triton has no kind for AMD or Ascend.
        if not is_nvidia(spec.onnxruntime.provider):
            group.kind = ModelInstanceGroup.KIND_CPU
        config.parameters["threads"].string_value = str(spec.batching.threads or 0)
        config.parameters["provider"].string_value = spec.onnxruntime.provider
        config.parameters["provider_options"].string_value = json.dumps(spec.provider_options)


def _set_buckets(config: ModelConfig, spec: DeploymentSpec) -> None:
    """Bounds of Triton's latency histogram, derived from the SLO; Triton's defaults if it has no latency.

    Source: docs/user_guide/metrics.md, "Histograms", of NVIDIA's server, 24.11 and later. The embedded 2.51 rejects
    unknown fields, so configurations that it may load (Python backend) go without.
    """
    limits_ms = [line.limit for line in spec.slo.all_objectives() if line.percent and line.rate_rps is None]
    if limits_ms:
        control = config.model_metrics.metric_control.add()
        control.metric_identifier.family = "nv_inference_first_response_histogram_ms"
        control.histogram_options.buckets.extend(histogram_bounds_ms(spec.slo.p99_ms or max(limits_ms), limits_ms))


def _leave_out(config: ModelConfig, optimizers: Sequence[str]) -> None:
    """Disables some of ONNX Runtime's optimizers.

    Triton's own backend cannot disable single ones: on a CPU it is set to the basic level, which excludes these.
    """
    if config.backend == "python":
        config.parameters["left_out"].string_value = " ".join(optimizers)
    elif config.instance_group[0].kind != ModelInstanceGroup.KIND_GPU:
        config.optimization.graph.level = -1


def cuda_graph_batches(spec: DeploymentSpec) -> list[int]:
    """Batch sizes to capture as CUDA graphs: those named, else powers of two, opt and the largest batch.

    Sizes above `max_batch_size` are left out: Triton would refuse the model. With dynamic batching, its own default is
    only 1 and the largest. Call it on the result of `for_target`.
    """
    if not spec.tensorrt.cuda_graphs:
        return []
    axis, most = spec.axes[BATCH], spec.max_served_batch
    powers = {1 << power for power in range(most.bit_length())}
    sizes = spec.tensorrt.cuda_graph_batches or powers | {axis.opt, most}
    return sorted(size for size in set(sizes) if axis.min <= size <= most)


def _capture(config: ModelConfig, spec: DeploymentSpec, batch: int) -> None:
    """Captures a batch size as a CUDA graph, other axes at opt; other shapes are launched kernel by kernel."""
    config.optimization.cuda.graphs = True
    captured = config.optimization.cuda.graph_spec.add(batch_size=batch)
    for name in spec.inputs:
        captured.input[name].dim.extend(spec.shape(name, "opt")[1:])


def _set_own_onnxruntime(config: ModelConfig, group: ModelInstanceGroup, spec: DeploymentSpec) -> None:
    """Sets Triton's own ONNX Runtime backend, which runs everything on its instance's GPU."""
    provider = spec.onnxruntime.provider
    config.backend = "onnxruntime"
    config.default_model_filename = "model.onnx"
    if not is_accelerator(provider):
        group.kind = ModelInstanceGroup.KIND_CPU if provider == "cpu" else ModelInstanceGroup.KIND_AUTO
    else:
        accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
        accelerators.add(name=provider, parameters=spec.provider_options)
        if provider == "cuda":
            for name in MODEL_PARAMETERS.keys() & spec.provider_options.keys():
                value = spec.provider_options[name]
                config.parameters[name].string_value = MODEL_PARAMETERS[name].get(value, value)
    if spec.batching.threads:
        config.parameters["intra_op_thread_count"].string_value = str(spec.batching.threads)


def _data_type(dtype: str) -> DataType:
    return DataType.Value(f"TYPE_{TRITON_DTYPES[dtype]}")


def _dim(spec: DeploymentSpec, dim: int | str) -> int:
    if isinstance(dim, int):
        return dim
    axis = spec.axes[dim]
    return axis.max if axis.min == axis.max else -1


def config_text(config: ModelConfig) -> str:
    """The configuration as text, checked to parse back to the same message."""
    text = text_format.MessageToString(config)
    assert text_format.Parse(text, ModelConfig()) == config
    return text
