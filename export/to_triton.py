"""An engine to Triton's model repository: the next version directory and `config.pbtxt`.

Contract: takes the precision that `export.compare` chose (or `--precision`); adds
`<repository>/<name>/<next version>/` and replaces `config.pbtxt`, which is built as Triton's own
protobuf message and parsed back. Both come into place by a rename, once they are on the disk, so that a running server
never sees half of one. What a release into the same repository refused, or a rollback took out of it, is not published
without `--anyway` (docs/release.md). Batching, queue and time-out come from `deploy.toml` and its tuned values
(docs/tuning.md), the warm-up from real samples.

Examples:
    python -m export.to_triton --model recommender
    python -m export.to_triton --model recommender --target tensorrt --precision fp16 --repository /models
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from deepseek.spec import (
    BATCH,
    DeploymentSpec,
    GateFailed,
    InputError,
    Parser,
    Precision,
    PublishedManifest,
    Target,
    add_model_arguments,
    build_dir,
    flags_for,
    histogram_bounds_ms,
    run_command,
    variables_for,
)
from deepseek.spec.folders import alone_in, let_all_read, onto_disk, scratch_in
from deepseek.spec.released import last_fate
from deepseek.spec.repository import retired, versions_of
from export.artifact import (
    Row,
    choice_path,
    digests,
    engine_path,
    load_rows,
    need,
    read_manifest,
    sha256,
    write_manifest,
)
from export.runners import optimizers_left_out

ROOT = Path(__file__).parent.parent
# What the Python backend runs, by its name in a version.
BACKEND_SOURCES = {
    "model.py": ROOT / "serving" / "onnxruntime_backend.py",
    "onnxruntime_session.py": ROOT / "deepseek" / "onnxruntime_session.py",
    "turns.py": ROOT / "serving" / "turns.py",
}


def model_config(
    spec: DeploymentSpec,
    precision: Precision,
    target: Target,
    warmup: dict[str, Row],
    device: str = "cpu",
    left_out: Sequence[str] = (),
) -> ModelConfig:
    """Triton's configuration of a model.

    `warmup` maps a file-name prefix to the row that is there; `device` is what a TorchScript module was made for,
    `left_out` the optimizers of ONNX Runtime that the graph does without.
    """
    spec = spec.for_target(target)
    config = ModelConfig(name=spec.name, max_batch_size=spec.max_served_batch)
    for tensors, added in ((spec.inputs, config.input), (spec.outputs, config.output)):
        for name, tensor in tensors.items():
            entry = added.add(name=name, data_type=_data_type(tensor.dtype))
            entry.dims.extend(_dim(spec, dim) for dim in tensor.shape[1:])
    _set_backend(config, spec, target, device)
    if target == "onnxruntime" and left_out:
        _leave_out(config, left_out)
    config.parameters["precision"].string_value = precision
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = spec.batching.max_queue_delay_us
    policy = batching.default_queue_policy
    policy.max_queue_size = spec.batching.max_queue_size
    policy.timeout_action = ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = spec.batching.queue_timeout_ms * 1000
    policy.allow_timeout_override = True  # a client's shorter deadline counts
    if config.backend != "python":
        _set_buckets(config, spec)
    for prefix, row in warmup.items():
        for batch in sorted({spec.axes[BATCH].min, spec.max_served_batch}):
            sample = config.model_warmup.add(name=f"{prefix}-batch-{batch}", batch_size=batch)
            for name, array in row.items():
                entry = sample.inputs[name]
                entry.data_type = _data_type(spec.inputs[name].dtype)
                entry.dims.extend(array.shape[1:])
                entry.input_data_file = f"{prefix}-{name}"
    return config


def _set_backend(config: ModelConfig, spec: DeploymentSpec, target: Target, device: str) -> None:
    """Which of Triton's backends runs the model, on how many instances of what kind."""
    group = config.instance_group.add(count=spec.batching.instances, kind=ModelInstanceGroup.KIND_GPU)
    if target == "tensorrt":
        config.backend = "tensorrt"
        config.default_model_filename = "model.plan"
        for batch in cuda_graph_batches(spec):
            _capture(config, spec, batch)
    elif target == "torchscript":
        config.backend, config.platform = "pytorch", "pytorch_libtorch"
        config.default_model_filename = "model.pt"
        if device == "cpu":
            group.kind = ModelInstanceGroup.KIND_CPU
        else:
            group.gpus.append(int(device.removeprefix("cuda:")))  # a trace holds its device's number
        if spec.batching.threads:
            config.parameters["INTRA_OP_THREAD_COUNT"].string_value = str(spec.batching.threads)
    elif spec.onnxruntime.backend == "onnxruntime":
        _set_own_onnxruntime(config, group, spec)
    else:
        config.backend = "python"
        # One device for auto, since what runs there is known only then; Triton itself knows of no AMD or Ascend.
        if spec.onnxruntime.provider not in ("cuda", "tensorrt"):
            group.kind = ModelInstanceGroup.KIND_CPU
        config.parameters["threads"].string_value = str(spec.batching.threads or 0)
        config.parameters["provider"].string_value = spec.onnxruntime.provider
        config.parameters["provider_options"].string_value = json.dumps(spec.provider_options)


def _set_buckets(config: ModelConfig, spec: DeploymentSpec) -> None:
    """Bounds of Triton's own latency histogram, by the SLO; without a latency in it Triton's defaults.

    Source: docs/user_guide/metrics.md, "Histograms", of NVIDIA's server, 24.11 and later. The embedded 2.51 loads no
    model with a field that it does not know, so what it may serve (the Python backend) goes without.
    """
    limits_ms = [line.limit for line in spec.slo.all_objectives() if line.percent and line.rate_rps is None]
    if limits_ms:
        control = config.model_metrics.metric_control.add()
        control.metric_identifier.family = "nv_inference_first_response_histogram_ms"
        control.histogram_options.buckets.extend(histogram_bounds_ms(spec.slo.p99_ms or max(limits_ms), limits_ms))


def _leave_out(config: ModelConfig, optimizers: Sequence[str]) -> None:
    """Has ONNX Runtime do without some of its optimizers.

    Triton's own backend has no switch for one: on a CPU it stops at the basic ones there, which these are not among.
    """
    if config.backend == "python":
        config.parameters["left_out"].string_value = " ".join(optimizers)
    elif config.instance_group[0].kind != ModelInstanceGroup.KIND_GPU:
        config.optimization.graph.level = -1


def cuda_graph_batches(spec: DeploymentSpec) -> list[int]:
    """Batch sizes that are captured: those named, or the powers of two and opt and max of the batch axis.

    Triton's own default is 1 and the largest alone, where batching is dynamic.
    """
    if not spec.tensorrt.cuda_graphs:
        return []
    axis = spec.axes[BATCH]
    powers = {1 << power for power in range(axis.max.bit_length())}
    return sorted(
        spec.tensorrt.cuda_graph_batches or {size for size in powers | {axis.opt, axis.max} if size >= axis.min}
    )


def _capture(config: ModelConfig, spec: DeploymentSpec, batch: int) -> None:
    """Has a batch captured as a CUDA graph, other axes at opt: any other shape is launched kernel by kernel."""
    config.optimization.cuda.graphs = True
    captured = config.optimization.cuda.graph_spec.add(batch_size=batch)
    for name in spec.inputs:
        captured.input[name].dim.extend(spec.shape(name, "opt")[1:])


def _set_own_onnxruntime(config: ModelConfig, group: ModelInstanceGroup, spec: DeploymentSpec) -> None:
    """Triton's own ONNX Runtime backend, which puts all on the GPU that its instance is on."""
    provider = spec.onnxruntime.provider
    config.backend = "onnxruntime"
    config.default_model_filename = "model.onnx"
    if provider in ("auto", "cpu"):
        group.kind = ModelInstanceGroup.KIND_CPU if provider == "cpu" else ModelInstanceGroup.KIND_AUTO
    else:
        accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
        accelerators.add(name=provider, parameters=spec.provider_options)
    if spec.batching.threads:
        config.parameters["intra_op_thread_count"].string_value = str(spec.batching.threads)


def _data_type(dtype: str) -> Any:
    from tritonclient.grpc import model_config_pb2

    names = {"float16": "TYPE_FP16", "float32": "TYPE_FP32"}
    return model_config_pb2.DataType.Value(names.get(dtype, f"TYPE_{dtype.upper()}"))


def _dim(spec: DeploymentSpec, dim: int | str) -> int:
    if isinstance(dim, int):
        return dim
    axis = spec.axes[dim]
    return axis.max if axis.min == axis.max else -1


def config_text(config: ModelConfig) -> str:
    """The text form, proved to mean the same when Triton reads it."""
    text = text_format.MessageToString(config)
    assert text_format.Parse(text, ModelConfig()) == config
    return text


def check_profile(spec: DeploymentSpec, engine: Path) -> None:
    """Raises InputError where the engine was built for another profile than deploy.toml now has."""
    built = read_manifest(engine).axes
    now = {name: axis.model_dump() for name, axis in spec.axes.items()}
    if built != now:
        raise InputError(
            f"{engine} was built for the axes {json.dumps(built)}, deploy.toml now has {json.dumps(now)}; "
            f"build it again: make engine {variables_for(spec.name)}"
        )


def check_fate(spec: DeploymentSpec, staged: Path, repository: Path) -> None:
    """Raises InputError where what is to be published failed a gate or was rolled back, and was not released since.

    What is served already is no news, whatever became of another configuration of it.
    """
    files = PublishedManifest.load(staged / "manifest.json").files
    fate = last_fate(spec.name, files, repository)
    served = [repository / spec.name / str(version) for version in versions_of(repository / spec.name)[:1]]
    if fate is not None and fate.bad and not any(_is_the_same(staged, each) for each in served):
        variables = variables_for(spec.name)
        raise InputError(
            f"{spec.name}: what is built was {fate.outcome} as version {fate.version}, {fate.at[:16]} ({fate.folder}); "
            f"take it through the gates: make release {variables}, or publish it all the same: make engine {variables} "
            "ANYWAY=1 (--anyway)"
        )


def _is_the_same(staged: Path, served: Path) -> bool:
    """Whether two versions are the same files under the same configuration, whose warm-up is named by the number."""
    if not all((folder / name).is_file() for folder in (staged, served) for name in ("manifest.json", "config.pbtxt")):
        return False
    configs = [re.sub(rf'"{folder.name}-', '"', (folder / "config.pbtxt").read_text()) for folder in (staged, served)]
    files = [PublishedManifest.load(folder / "manifest.json").files for folder in (staged, served)]
    return configs[0] == configs[1] and files[0] == files[1]


def publish_version(
    spec: DeploymentSpec, precision: Precision, target: Target, repository: Path, *, anyway: bool = False
) -> dict[str, Any]:
    """Adds the next version of a model to the repository; returns what it added.

    Raises InputError where a release or rollback decided against what is built, unless it is to be `anyway`.
    """
    if target == "tensorrt_rtx":
        raise InputError(
            "target tensorrt_rtx: Triton cannot load such an engine; publish onnxruntime, tensorrt or torchscript"
        )
    engine = need(
        engine_path(spec.name, precision, target), f"make engine {variables_for(spec.name)} PRECISION={precision}"
    )
    check_profile(spec, engine)
    row = load_rows(build_dir(spec.name) / "evaluation.npz")[0]
    model = repository / spec.name
    with alone_in(repository), scratch_in(_staging(spec.name, repository)) as scratch:
        version = _stage(scratch, spec, precision, target, engine, row, model)
        if not anyway:
            check_fate(spec, scratch / str(version), repository)
        onto_disk(scratch)
        if not model.exists():
            (scratch / "model").mkdir()
            let_all_read(scratch)
            for part in (str(version), "warmup", "config.pbtxt"):
                os.rename(scratch / part, scratch / "model" / part)
            _rename(scratch / "model", model)
        else:
            (model / "warmup").mkdir(exist_ok=True)
            let_all_read(scratch)
            for file in (scratch / "warmup").iterdir():
                _rename(file, model / "warmup" / file.name)
            # The version first: beside the old configuration it is whole, and the server that polls
            # either loads it or goes on with the one that it has.
            _rename(scratch / str(version), model / str(version))
            _rename(scratch / "config.pbtxt", model / "config.pbtxt")
            _retire(model, scratch)
    return {"path": str(model / str(version)), "version": version, "precision": precision, "target": target}


def _staging(name: str, repository: Path) -> Path:
    """Where a version is laid out: on the repository's disk, so that a full one changes nothing.

    Where that is not the build's, in the model's folder: what a killed publisher leaves in the repository itself,
    NVIDIA's Triton would take for a model.
    """
    build, model = build_dir(name), repository / name
    if build.stat().st_dev == repository.stat().st_dev:
        return build
    return model if model.is_dir() else repository


def _stage(
    scratch: Path, spec: DeploymentSpec, precision: Precision, target: Target, engine: Path, row: Row, model: Path
) -> int:
    """Lays out version, warm-up and configuration in `scratch`; returns the version."""
    version = max(versions_of(model), default=0) + 1
    folder = scratch / str(version)
    folder.mkdir()
    for file in engine.parent.glob(f"{engine.name}*"):
        shutil.copyfile(file, folder / file.name)
    if target == "onnxruntime" and spec.onnxruntime.backend == "python":
        for name, source in BACKEND_SOURCES.items():
            shutil.copyfile(source, folder / name)
    write_manifest(folder / "manifest.json", published_manifest(spec, target, engine, folder))
    (scratch / "warmup").mkdir()
    for name, array in row.items():
        (scratch / "warmup" / f"{version}-{name}").write_bytes(array.tobytes())
    device = read_manifest(engine).settings.get("device", "cpu")
    left_out = optimizers_left_out(engine) if target == "onnxruntime" else []
    config = config_text(model_config(spec, precision, target, {str(version): row}, device, left_out))
    for place in (scratch, folder):  # the version's own copy is what a server that goes back to it takes
        (place / "config.pbtxt").write_text(config)
    return version


def published_manifest(spec: DeploymentSpec, target: Target, engine: Path, folder: Path) -> PublishedManifest:
    """The manifest of a copy of an engine in `folder`; raises GateFailed where the copy is not what was built."""
    built = read_manifest(engine)
    files = digests(folder)
    for name, digest in built.files.items():
        if name.startswith(engine.name) and files.get(name) != digest:
            raise GateFailed(
                f"{engine.parent / name} is not what was built; build it again: make clean engine "
                f"{variables_for(spec.name)}"
            )
    signature = {"inputs": spec.inputs, "outputs": spec.outputs}
    graphs = {"cuda_graph_batches": cuda_graph_batches(spec)} if target == "tensorrt" else {}
    settings = {**built.settings, **graphs}
    return PublishedManifest(**{**dict(built), "target": target, "files": files, "settings": settings, **signature})


def _rename(source: Path, destination: Path) -> None:
    """Renames; across file systems copies beside the destination first."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, destination)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise InputError(f"{destination} was added by another build meanwhile; run it again") from None
        if error.errno != errno.EXDEV:
            raise
        with scratch_in(destination.parent) as beside:
            copied = Path(shutil.move(source, beside / source.name))
            onto_disk(copied)
            os.rename(copied, destination)


def _retire(model: Path, scratch: Path) -> None:
    """Takes versions out that are too old to go back to, with their warm-up files."""
    for old in retired(model):
        _rename(model / str(old), scratch / f"retired-{old}")
        for file in (model / "warmup").glob(f"{old}-*"):
            file.unlink()


def chosen_precision(name: str, target: Target) -> Precision:
    """What `export.compare` chose; InputError where it chose another file than the one that is there now."""
    again = f"python -m export.compare {flags_for(name)} --target {target}"
    path = need(choice_path(name, target), again)
    choice = json.loads(path.read_text())
    chosen, digests = choice["chosen"], choice.get("sha256", {})
    engine = engine_path(name, chosen, target)
    if chosen in digests and engine.is_file() and digests[chosen] != sha256(engine):
        raise InputError(f"{engine}: not the one that {path} chose; compare anew: {again}")
    return chosen


def main() -> None:
    """Publishes one model."""
    parser = Parser(__doc__, prog="python -m export.to_triton")
    add_model_arguments(parser)
    parser.add_argument(
        "--target",
        default="onnxruntime",
        choices=("onnxruntime", "tensorrt", "torchscript"),
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "int8", "fp8"), help="(default: what export.compare chose)"
    )
    parser.add_argument("--repository", default="model_repository", help="(default: %(default)s)")
    parser.add_argument(
        "--tuned", help="tuned values to go by, in place of those that deploy.toml names (/dev/null: none)"
    )
    parser.add_argument("--anyway", action="store_true", help="even what a gate refused, or was rolled back")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    spec = DeploymentSpec.of_model(args.model, args.models, tuned=args.tuned)
    precision = args.precision or chosen_precision(spec.name, args.target)
    if spec.for_target(args.target).batching.instances == 1:
        print(
            "warning: batching.instances = 1: a Triton that this project does not start can stall, see docs/triton.md",
            file=sys.stderr,
        )
    result = publish_version(spec, precision, args.target, Path(args.repository), anyway=args.anyway)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{result['path']}: {result['precision']} for {result['target']}, "
            f"batches of up to {spec.for_target(args.target).max_served_batch}"
        )


if __name__ == "__main__":
    run_command(main)
