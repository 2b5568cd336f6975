"""The stages of a build: what each one reads, what it writes, and the command that runs it.

Contract: a stage's inputs are files of earlier stages, the keys of `deploy.toml` that it reads, the model folder, the
data, its settings, our modules that it imports, and the versions of the packages that it uses (`export.stage_inputs`).
`export.build` runs the stages of `stages_of`, in that order.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from deepseek.precisions import EIGHT_BITS, Precision
from deepseek.spec import build_dir
from deepseek.spec.checks import Table
from deepseek.spec.files.image_tag import image_tag
from deepseek.spec.files.measured_batches import batches_path
from deepseek.spec.files.released import last_rollback
from deepseek.spec.machine.cpu import this_cpu
from deepseek.spec.machine.gpus import gpus
from deepseek.spec.tables import PrecisionSpec, TensorrtSpec
from deepseek.targets import TARGETS
from export.artifact import choice_path, engine_path, onnx_path, rows_path, weights_path
from export.dependencies.sources import ROOT
from export.machine import accelerator, cpu, gpu
from export.plan import Plan
from export.publishing.backend_files import backend_files
from export.runtimes.tensorrt_container import image_name

SIGNATURE = ("name", "inputs", "outputs", "axes")
MEASURED = (*SIGNATURE, "precision.metric", "onnxruntime")  # by which a variant's accuracy is measured
BUDGET = ("precision.max_drop", "precision.candidates")  # the confidence depends on the number of candidates
CUDA_GRAPHS = ("tensorrt.cuda_graphs", "tensorrt.cuda_graph_batches")  # Triton reads them, not the builder
MODELOPT = "nvidia-modelopt[onnx]"  # imports the packages of its extra only at run time


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a build. A path in `reads` includes files that extend its name, such as `.data`."""

    name: str
    command: tuple[str, ...]
    """Subcommand of `deepseek` and its flags, without --model and --models; empty for a part."""
    module: str
    reads: tuple[Path, ...] = ()
    keys: tuple[str, ...] = ()
    """Keys of deploy.toml that it reads, dotted."""
    tuned: bool = False
    """Whether the keys are read for the target, with tuned values applied."""
    settings: Mapping[str, str] = field(default_factory=dict)
    runs_model: bool = False
    """Whether it runs model.py; then the model folder, its imports and the data are inputs."""
    leaves_out: tuple[str, ...] = ()
    """Packages of this repository whose code does not affect the result."""
    packages: tuple[str, ...] = ()
    """Packages that it uses beyond its imports."""
    on_compiler: bool = False
    """Whether it runs with the plan's TensorRT; in a container it does not use our installed packages."""
    writes: tuple[Path, ...] = ()
    beside: tuple[Path, ...] = ()
    """Files that must exist with any content: later stages add to them."""
    parts: "tuple[Stage, ...]" = ()
    """Results within the stage that are cached under their own keys."""


def stages_of(plan: Plan) -> Iterator[Stage]:
    """All stages but publishing, in order."""
    yield from graph_stages(plan, plan.precisions)
    for precision in plan.precisions:
        if plan.target in ("tensorrt", "tensorrt_rtx"):
            yield _to_tensorrt(plan, precision)
        elif plan.target == "torchscript":
            yield _to_torchscript(plan)
    yield _select_precision(plan)
    if plan.target == "onnxruntime":
        yield _measure_batches(plan)


def graph_stages(plan: Plan, precisions: list[Precision]) -> Iterator[Stage]:
    """The stages that make the graphs."""
    yield _train(plan)
    if plan.prune:
        yield _prune(plan)
    yield _to_onnx(plan)
    yield from (_quantize(plan, precision) for precision in precisions if precision != "fp32")


def _train(plan: Plan) -> Stage:
    return Stage(
        name="train",
        command=("train",),
        module="export.stages.train",
        keys=SIGNATURE,
        runs_model=True,
        leaves_out=("export", "deepseek.spec"),  # only train() of model.py makes the weights
        writes=(weights_path(plan.model),),
    )


def _prune(plan: Plan) -> Stage:
    fine_tune = Stage(
        name="fine-tune",
        command=(),
        module="export.stages.prune",
        reads=(weights_path(plan.model),),
        keys=(*SIGNATURE, "precision.calibration_samples", "precision.metric"),
        settings={"PRUNE": plan.prune},
        runs_model=True,
    )
    return replace(
        fine_tune,
        name="prune",
        command=("prune", "--ratio", plan.prune),
        keys=(*fine_tune.keys, *BUDGET),
        writes=plan.pruned,
        parts=(fine_tune,),
    )


def _to_onnx(plan: Plan) -> Stage:
    graph = onnx_path(plan.model, "fp32")
    return Stage(
        name="to_onnx",
        command=("to-onnx",),
        module="export.stages.to_onnx",
        reads=(weights_path(plan.model), *plan.pruned),
        keys=(*SIGNATURE, "precision.calibration_samples", "precision.metric", "parity.fp32"),
        settings={"candidates": "fp32" if plan.spec.precision.candidates == ("fp32",) else "others"},
        runs_model=True,
        writes=(rows_path(plan.model, "calibration"), rows_path(plan.model, "evaluation"), graph),
        beside=(graph.with_name("manifest.json"),),
    )


def _quantize(plan: Plan, precision: Precision) -> Stage:
    graph = onnx_path(plan.model, precision)
    rows = [rows_path(plan.model, split) for split in ("calibration", "evaluation")]
    high = TARGETS[plan.target].high_precision if precision in EIGHT_BITS else ""
    calibrate = Stage(
        name=f"calibrate {precision}",
        command=(),
        module="export.precision.calibrated_graph",
        reads=(onnx_path(plan.model, "fp32"), *rows),
        keys=(*SIGNATURE, "onnxruntime", *_keys_but("precision", PrecisionSpec, *BUDGET, "precision.metric")),
        settings={"--precision": precision, "high precision": high, "accelerator": _accelerator(plan)},
        packages=(MODELOPT,),
    )
    quantize = replace(
        calibrate,
        name=f"quantize {precision}",
        command=("quantize", "--precision", precision, "--target", plan.target, *_candidate(plan, precision)),
        module="export.stages.quantize",
        writes=(graph,),
        beside=(graph.with_name("manifest.json"),),
    )
    if precision not in EIGHT_BITS:
        return quantize
    return replace(  # the sensitivity pass runs PyTorch, and judges by the budget
        quantize,
        reads=(*quantize.reads, weights_path(plan.model), *plan.pruned),
        keys=(*quantize.keys, *BUDGET, "precision.metric"),
        runs_model=True,
        parts=(calibrate,),
    )


def _to_tensorrt(plan: Plan, precision: Precision) -> Stage:
    engine = engine_path(plan.model, precision, plan.target)
    not_of_rtx = ("hardware_compatibility", "version_compatible", "timing_cache")
    others = [f"tensorrt.{key}" for key in not_of_rtx] if plan.target == "tensorrt_rtx" else []
    return Stage(
        name=f"to_tensorrt {precision}",
        command=("to-tensorrt", "--precision", precision, "--target", plan.target, *_candidate(plan, precision)),
        module="export.stages.to_tensorrt",
        reads=(onnx_path(plan.model, precision),),
        keys=(*SIGNATURE, *_keys_but("tensorrt", TensorrtSpec, *CUDA_GRAPHS, *others)),
        settings=_device(plan),
        packages=(plan.target.replace("_", "-"),),
        on_compiler=True,
        writes=(engine,),
        beside=(engine.with_name("manifest.json"),),
    )


def _keys_but(name: str, table: type[Table], *others: str) -> tuple[str, ...]:
    """The keys of a table of deploy.toml but `others`: so a new key is an input at once."""
    return tuple(key for field in table.model_fields if (key := f"{name}.{field}") not in others)


def _candidate(plan: Plan, precision: Precision) -> tuple[str, ...]:
    """Lets a candidate fail alone. fp32, the baseline, and a precision asked for by name end the build instead."""
    return ("--candidate",) if plan.precision is None and precision != "fp32" else ()


def _device(plan: Plan) -> dict[str, str]:
    """Settings that identify the TensorRT and the GPU that compile and run engines."""
    compilers = {"container": lambda: image_name(plan.triton_tag), "inside": lambda: plan.triton_tag}
    compiler = compilers.get(plan.compiler, lambda: plan.compiler)()
    return {"target": plan.target, "TensorRT": compiler, "GPU": gpu() if plan.compiler else _accelerator(plan)}


def _accelerator(plan: Plan) -> str:
    """The accelerator that ONNX Runtime may use: only if it serves the model, and not if deploy.toml says the CPU."""
    return accelerator() if plan.target == "onnxruntime" and plan.spec.onnxruntime.provider != "cpu" else ""


def _to_torchscript(plan: Plan) -> Stage:
    module = engine_path(plan.model, "fp32", "torchscript")
    return Stage(
        name="to_torchscript",
        command=("to-torchscript",),
        module="export.stages.to_torchscript",
        reads=(weights_path(plan.model), *plan.pruned, rows_path(plan.model, "evaluation")),
        keys=(*SIGNATURE, "parity.fp32"),
        settings={"GPU": gpu()},
        runs_model=True,
        writes=(module,),
        beside=(module.with_name("manifest.json"),),
    )


def _select_precision(plan: Plan) -> Stage:
    engines = {name: engine_path(plan.model, name, plan.target) for name in plan.precisions}
    graphs = [onnx_path(plan.model, name) for name in plan.precisions]
    asked, batching = plan.precision or "auto", ("batching.instances", "batching.threads")
    reference = (weights_path(plan.model), *plan.pruned, rows_path(plan.model, "evaluation"))
    select = Stage(
        name=f"select_precision {plan.target}",
        command=("select-precision", "--target", plan.target, "--precision", asked),
        module="export.stages.select_precision",
        reads=(*dict.fromkeys([*engines.values(), *graphs]), *reference),
        keys=(*MEASURED, *BUDGET, "parity.fp32", *batching, f"targets.{plan.target}.batching"),
        settings={**_device(plan), "CPU": cpu(), "PRECISION": asked},
        runs_model=True,
        on_compiler=True,
        packages=("tensorrt",) if plan.target == "tensorrt" else (),
        writes=(choice_path(plan.model, plan.target),),
    )
    accuracies = [
        replace(
            select,
            name=f"accuracy {name}",
            command=(),
            module="export.precision.accuracy_budget",
            reads=(engine, *reference),
            keys=MEASURED,
            settings={**_device(plan), "CPU": cpu()},
            writes=(),
        )
        for name, engine in engines.items()
    ]
    return replace(select, parts=tuple(accuracies))


def _measure_batches(plan: Plan) -> Stage:
    layout = tuple(f"batching.{key}" for key in ("instances", "threads", "max_batch"))
    measure = Stage(
        name=f"measure-batches {plan.target}",
        command=("measure-batches", "--target", plan.target),
        module="export.stages.measure_batches",
        reads=(choice_path(plan.model, plan.target), rows_path(plan.model, "evaluation")),
        keys=(*SIGNATURE, *layout, "slo", "onnxruntime"),
        tuned=True,
        settings={**_device(plan), "CPU": f"{this_cpu()}: {cpu()}"},
        writes=(batches_path(plan.model, plan.target),),
    )
    times = replace(measure, name="times", reads=measure.reads[1:], writes=())  # of the engine that was chosen
    return replace(measure, parts=(times,))


def publish_stage(plan: Plan) -> Stage:
    """The stage that adds the next version to the repository."""
    text, vocabulary = plan.spec.text_for(plan.target), plan.spec.vocabulary_for(plan.target)
    file = text.tokenizer if text else vocabulary.file if vocabulary else ""
    settings = {"target": plan.target, "GPUs": ", ".join(map(str, gpus() if plan.target == "tensorrt" else ()))}
    if rollback := last_rollback(plan.model, plan.repository):  # it may have removed what this stage published
        settings["the last rollback"] = rollback
    return Stage(
        name=f"publish {plan.repository}",
        command=(
            *("publish", "--target", plan.target, "--repository", str(plan.repository), "--if-changed"),
            *(("--anyway",) if plan.anyway else ()),
        ),
        module="export.stages.publish",
        reads=(
            choice_path(plan.model, plan.target),
            *((batches_path(plan.model, plan.target),) if plan.target == "onnxruntime" else ()),
            *backend_files(plan.spec, plan.target).values(),
            *((plan.folder / file, build_dir(plan.model) / file) if file else ()),
        ),
        keys=(*SIGNATURE, "batching", "slo", "onnxruntime", "text", "vocabulary", *CUDA_GRAPHS),
        tuned=True,
        settings=settings,
        beside=(plan.repository / plan.model / "config.pbtxt",),
    )


STACK_IMAGES = ("server", "server-cpu", "gateway", "loadtests")


def stack_stage(plan: Plan, options: argparse.Namespace) -> Stage:
    """The stage that rewrites the env file when the repository, a setting or the certificate changed."""
    env_file, given = Path(options.env_file), list[str]()
    tag = plan.triton_tag if plan.compiler else options.triton_tag  # the release that a TensorRT engine needs
    kept = (("--gateway-port", options.gateway_port), ("--local-ports", options.local_ports))
    for flag, value in (("--triton-tag", tag), *kept, ("--project", options.project)):
        given += [flag, str(value)] if value else []  # otherwise the env file keeps its value
    given += [word for host in options.host or () for word in ("--host", host)]
    settings = " ".join([plan.model, str(plan.repository), str(plan.models), str(build_dir("")), *given[1::2]])
    return Stage(
        name=f"stack {env_file}",
        command=(
            *("stack", "--repository", str(plan.repository), "--env-file", str(env_file)),
            *given,
        ),
        module="serving.stack.stack",
        reads=(
            *sorted({plan.repository / plan.model / "config.pbtxt", *plan.repository.glob("*/config.pbtxt")}),
            *sorted(path for path in (ROOT / "docker" / "observe").rglob("*.*") if path.is_file()),
        ),
        keys=("slo",),  # for alerts and limits: not all of it is in config.pbtxt
        tuned=True,
        settings={"settings": settings, "images": " ".join(map(image_tag, STACK_IMAGES))},
        writes=(env_file, build_dir("gateway") / "tls.crt"),
    )
