"""Compares every variant with fp32 PyTorch (parity, task metric, speed) and chooses the precision to serve.

Contract: runs fp32 and each candidate of `deploy.toml` over the evaluation split, as the target runs them. Times them
interleaved in one process, every axis at its opt (`export.runtimes.timing`), and chooses the fastest that the budget
accepts (`deepseek.spec.paired_drop`). A candidate has to be faster than every more accurate one; within the noise the
more accurate one is served. Writes `build/<name>/choice-<target>.json` and the accuracy into each manifest. Exit 1 if
the budget refuses a precision asked for by name. Definition of drop: export/precision/accuracy_budget.py.
"""

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from deepseek.spec import (
    BATCH,
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    Precision,
    Target,
    build_dir,
    flags_for,
    kept_for_json,
    one_line,
    variables_for,
)
from deepseek.spec.machine.cpu import has_int8_dot_products
from deepseek.targets import in_tf32
from export.artifact import (
    choice_path,
    engine_path,
    json_text,
    onnx_path,
    pruning_of,
    read_manifest,
    refusal,
    sha256,
    staged,
    write_manifest,
)
from export.model_folder import ModelFolder, Predict
from export.precision.accuracy import too_small
from export.precision.accuracy_budget import (
    Baseline,
    accuracy_key,
    judged_variant,
    measured,
    sensitivity_of,
)
from export.precision.choice_table import show
from export.precision.precision_choice import add_speed, choose
from export.rows import Row, load_rows
from export.runtimes.batching import outputs_of
from export.runtimes.isolation import Crashed, in_child
from export.runtimes.onnxruntime_predictor import provider_of
from export.runtimes.pytorch_reference import inputs_at, module_predictor, weights_digest
from export.runtimes.timing import Timer, clocks, time_interleaved, wall
from export.runtimes.variants import variant_predictor, variant_timers

log = Console(file=sys.stderr, markup=False)


def compare(source: ModelFolder, target: Target, only: Precision | None) -> dict[str, Any]:
    """Runs the stage; returns the measurements and, under "chosen", the choice ("" if there is none)."""
    spec = source.spec
    wanted: list[Precision] = [only] if only else list(spec.precision.candidates)
    comparison = _Comparison(source=source, target=target, only=only)
    variants = comparison.accuracies(["fp32", *(name for name in wanted if name != "fp32")])
    metrics, *_ = [variant.pop("pytorch") for variant in variants.values()]  # each has the same
    seconds, speeds = comparison.speeds(variants)
    candidates = [name for name in wanted if name in variants]
    judged = {name: judged_variant(spec, variant) for name, variant in variants.items()}
    chosen, reasons, failure = "", dict[str, str](), ""
    try:
        chosen, reasons = choose(judged, candidates, seconds, asked=only is not None)
    except GateFailed as error:
        failure = str(error)
    for name, variant in variants.items():
        del variant["paired"]
        variant |= {"reason": reasons.get(name, judged[name].reason), "judgement": asdict(judged[name])}
    warning = too_small(spec, metrics)
    provider = provider_of(spec) if target == "onnxruntime" else None
    return {
        "model": spec.name,
        "target": target,
        "provider": provider,
        "int8_dot_products": has_int8_dot_products() if provider == "cpu" else None,
        "chosen": chosen,
        "failure": failure,
        "metric": "similarity" if warning else spec.precision.metric or "similarity",
        "warning": warning,
        "max_drop": spec.precision.max_drop,
        "rows": len(comparison.rows),
        **speeds,
        "pytorch": {"metrics": metrics, "rows_per_s": spec.axes[BATCH].opt / statistics.median(seconds["pytorch"])},
        "variants": variants,
        "refused": comparison.refused,
        "sensitivity": {name: report for name in candidates if (report := sensitivity_of(spec, name))},
    }


@dataclass(kw_only=True)
class _Comparison:
    """The variants of a model on a target, beside fp32 PyTorch."""

    source: ModelFolder
    target: Target
    only: Precision | None
    refused: dict[str, str] = field(default_factory=dict)
    """Why a candidate could not be made or compared."""
    predictors: dict[Precision, Predict] = field(default_factory=dict)
    """By variant that was compared."""

    @functools.cached_property
    def module(self) -> Any:
        return self.source.load()

    @functools.cached_property
    def reference(self) -> Predict:
        return module_predictor(self.source.spec, self.module)

    @functools.cached_property
    def weights(self) -> str:
        return weights_digest(self.module)

    @functools.cached_property
    def baseline(self) -> Baseline:  # not needed if all results are cached
        return Baseline.of(self.source, self.reference)

    @functools.cached_property
    def rows(self) -> list[Row]:
        return load_rows(build_dir(self.source.spec.name) / "evaluation.npz")

    def accuracies(self, tried: Sequence[Precision]) -> dict[str, dict[str, Any]]:
        """Accuracy and size of each variant. Raises GateFailed if fp32, or the one asked for, cannot be compared."""
        spec, needed = self.source.spec, [name for name in (self.only, "fp32") if name]
        for name in tried:
            if why := _refusal(spec, name, self.target) or _outdated(spec, name) or _failure(spec, name, self.target):
                self.refused[name] = why
        if refused := [name for name in needed if name in self.refused]:
            raise GateFailed(f"{refused[0]} could not be made: {self.refused[refused[0]]}")
        variants: dict[str, dict[str, Any]] = {}
        for name in [name for name in tried if name not in self.refused]:
            with log.status(f"{name} on {self.target}"):
                predict = variant_predictor(spec, name, self.target)
                try:
                    variants[name] = self._accuracy(name, predict)
                except GateFailed as error:
                    if name in needed:
                        raise
                    self.refused[name] = str(error)
                else:
                    self.predictors[name] = predict
        return variants

    def _accuracy(self, name: Precision, predict: Predict) -> dict[str, Any]:
        """Accuracy and size of a variant, with PyTorch's metrics. All but the size may come from the cache."""
        spec, engine = self.source.spec, read_manifest(engine_path(self.source.spec.name, name, self.target))

        def measure() -> dict[str, Any]:
            found = _measured(self.baseline, predict, sensitivity_of(spec, name))
            return {**found, "pytorch": self.baseline.metrics}

        found = measured(accuracy_key(self.source, name, self.weights), spec.name, measure)
        if name == "fp32":
            provider = provider_of(spec) if self.target == "onnxruntime" else None
            _check_fp32(spec, self.target, found["parity"], tf32=in_tf32(self.target, provider, engine.found))
        return {**found, "size_bytes": engine.size_bytes}

    def speeds(self, variants: dict[str, dict[str, Any]]) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """Times all variants and PyTorch, and adds the speeds to `variants`.

        Returns the seconds of each round, and the conditions of the timing.
        """
        spec = self.source.spec
        inputs = inputs_at(spec, self.rows, {name: axis.opt for name, axis in spec.axes.items()})
        with log.status("timing, interleaved"):
            timers = {
                name: variant_timers(spec, name, self.target, predict, inputs)
                for name, predict in self.predictors.items()
            }
            before = clocks()
            seconds, copies = _timed(timers, wall(lambda: self.reference(inputs)))
        add_speed(variants, seconds, spec.axes[BATCH].opt)
        for name, each in copies.items():
            variants[name]["copies_ms"] = 1000 * statistics.median(each)
        shapes = {name: list(array.shape) for name, array in inputs.items()}
        return seconds, {"clocks": {"before": before, "after": clocks()}, "timed_shapes": shapes}


def _timed(
    timers: Mapping[Precision, tuple[Timer, Timer | None]], pytorch: Timer
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each round by variant, and of PyTorch; seconds of the copies to and from a GPU."""
    # PyTorch gets rounds of its own: it evicts the caches, which doubles the time of a small graph that runs next.
    seconds = time_interleaved({name: run for name, (run, _) in timers.items()})
    seconds |= time_interleaved({"pytorch": pytorch})
    return seconds, time_interleaved({name: copy for name, (_, copy) in timers.items() if copy is not None})


def _measured(baseline: Baseline, predict: Predict, sensitivity: dict[str, Any] | None) -> dict[str, Any]:
    """What `Baseline.measure` returns; the drop is of the rows that judge, if layers were chosen on the others."""
    found = baseline.measure(predict)
    if not (sensitivity or {}).get("judged"):
        return found
    drop, paired = baseline.drop_on_half(predict, choosing=False)
    halves = baseline.half_sizes()
    rows = {"drop": halves["judged_on"] if paired is None else paired.rows, "chosen_on": halves["chosen_on"]}
    return {
        **found,
        "drop": drop,
        "paired": None if paired is None else asdict(paired),
        "rows": {**found["rows"], **rows},
    }


def _check_fp32(spec: DeploymentSpec, target: Target, parity: dict[str, dict[str, float]], *, tf32: bool) -> None:
    """Raises GateFailed if fp32 differs from PyTorch: a metric might not reveal a graph of another model."""
    allowed = (spec.parity.of_tf32() if tf32 else spec.parity.of("fp32")).worst_error
    for name, numbers in parity.items():
        error = numbers.get("worst_error", 0.0)
        if error > allowed:
            raise GateFailed(
                f"fp32 on {target}: output {name!r} is off by {error:.2g} from PyTorch, allowed {allowed:g}; if "
                f"the model has changed since the build, run deepseek to-onnx {flags_for(spec.name)} and "
                "make engine, else set [parity.fp32] worst_error in deploy.toml"
            )


def _refusal(spec: DeploymentSpec, name: Precision, target: Target) -> str | None:
    """Why the graph or the engine of a precision could not be made; None if both were."""
    return refusal(onnx_path(spec.name, name)) or refusal(engine_path(spec.name, name, target))


def _outdated(spec: DeploymentSpec, name: Precision) -> str | None:
    """Why a graph is not a candidate: it was made from another fp32 graph, as one with PRUNE; None if from this one."""
    fp32 = onnx_path(spec.name, "fp32")
    if name == "fp32" or read_manifest(onnx_path(spec.name, name)).sources["onnx"] == sha256(fp32):
        return None
    return f"its graph was made from another fp32 graph: make engine {variables_for(spec.name)}"


def _failure(spec: DeploymentSpec, name: Precision, target: Target) -> str | None:
    """Why a graph or an engine does not run as it is served, tried in a child process; None if it runs."""
    runtime, what = ("TensorRT", "engine") if target == "tensorrt" else ("ONNX Runtime", "graph")
    if target == "torchscript":  # has fp32 only, without which there is nothing to compare
        return None
    row = load_rows(build_dir(spec.name) / "evaluation.npz")[:1]
    try:
        in_child(runtime, lambda: outputs_of(spec, variant_predictor(spec, name, target), row))
    except (InputError, InvalidMeasurement):  # never built, no such execution provider, or out of memory
        raise
    except Crashed as crash:
        return f"{crash} on its {what}"
    except Exception as error:
        return f"its {what} does not run: {one_line(error)}"
    return None


def record(result: dict[str, Any], spec: DeploymentSpec, target: Target) -> None:
    """Writes the accuracy into each manifest, with the metric row by row, and the choice."""
    against = "unpruned fp32 PyTorch" if pruning_of(spec.name) else "fp32 PyTorch"
    accuracies: dict[str, dict[str, Any] | None] = {
        name: {"against": against}
        | {key: variant[key] for key in ("drop", "judgement", "rows", "metrics", "values", "parity")}
        for name, variant in result["variants"].items()
    }
    accuracies |= dict.fromkeys(result["refused"])  # an earlier choice may have written one
    for name, accuracy in accuracies.items():
        path = engine_path(spec.name, name, target)
        if path.with_name("manifest.json").is_file():  # not if it could not be made
            manifest = read_manifest(path).model_copy(update={"accuracy": accuracy})
            write_manifest(path.with_name("manifest.json"), manifest)
    result = without_rows(result)
    result["sha256"] = {name: sha256(engine_path(spec.name, name, target)) for name in result["variants"]}
    with staged(choice_path(spec.name, target)) as file:
        file.write_text(json_text(result) + "\n")


def without_rows(result: dict[str, Any]) -> dict[str, Any]:
    """The result without the metric's values row by row, which only the manifests keep."""
    variants = {
        name: {key: value for key, value in each.items() if key != "values"}
        for name, each in result["variants"].items()
    }
    return {**result, "variants": variants}


def main(options: argparse.Namespace) -> None:
    # Many a model.py asks torch.cuda.is_available(). Without this, that initializes CUDA, and no fork can use it then.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    with kept_for_json(options.json):
        source = ModelFolder(options.model, options.models)
        result = compare(source, options.target, None if options.precision == "auto" else options.precision)
    if options.json:
        print(json_text(without_rows(result)))
    else:
        show(result)
    if result["failure"]:
        raise GateFailed(result["failure"])
    record(result, source.spec, options.target)
