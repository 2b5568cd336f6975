"""Compares every variant with fp32 PyTorch (parity, task metric, speed) and chooses the precision to serve.

Contract: runs fp32 and each candidate of `deploy.toml` over the evaluation split, as the target runs them. Times them
interleaved in one process, every axis at its opt (`export.runtimes.timing`), and chooses the fastest that the budget
accepts (`deepseek.spec.paired_drop`). A candidate has to be faster than every more accurate one; within the noise the
more accurate one is served. Writes `build/<name>/choice-<target>.json` and the accuracy into each manifest. Exit 1 if
the budget refuses a precision asked for by name. Definition of drop: export/precision/accuracy_budget.py.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.onnxruntime_session import choose_provider
from deepseek.precisions import PRECISIONS
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
)
from deepseek.spec.machine.cpu import has_int8_dot_products
from deepseek.spec.paired_drop import interval_text
from export.artifact import (
    choice_path,
    engine_path,
    human_bytes,
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
from export.precision.precision_choice import add_speed, choose
from export.precision.sensitivity import shares_table, verdict
from export.rows import load_rows
from export.runtimes.batching import outputs_of
from export.runtimes.isolation import Crashed, in_child
from export.runtimes.pytorch_predictor import module_predictor
from export.runtimes.pytorch_reference import inputs_at, weights_digest
from export.runtimes.timing import Timer, clocks, time_interleaved, wall
from export.runtimes.variants import variant_predictor, variant_timers

log = Console(file=sys.stderr, markup=False)


def compare(source: ModelFolder, target: Target, only: Precision | None) -> dict[str, Any]:
    """Runs the stage; returns the measurements and, under "chosen", the choice ("" if there is none)."""
    spec = source.spec
    wanted: list[Precision] = [only] if only else list(spec.precision.candidates)
    tried: list[Precision] = ["fp32", *(name for name in wanted if name != "fp32")]
    refused = {name: why for name in tried if (why := _refusal(spec, name, target) or _failure(spec, name, target))}
    if only in refused or "fp32" in refused:
        raise GateFailed(refused[only if only in refused else "fp32"])
    module = source.load()
    reference, weights = module_predictor(spec, module), weights_digest(module)
    baseline = functools.cache(lambda: Baseline.of(source, reference))  # not needed if all results are cached
    variants: dict[str, dict[str, Any]] = {}
    runners: dict[Precision, Predict] = {}
    for name in [name for name in tried if name not in refused]:
        with log.status(f"{name} on {target}"):
            runner = variant_predictor(spec, name, target)
            try:
                variants[name] = _variant(source, target, name, weights, baseline, runner)
            except GateFailed as error:
                if name in ("fp32", only):
                    raise
                refused[name] = str(error)
            else:
                runners[name] = runner
    metrics, *_ = [variant.pop("pytorch") for variant in variants.values()]  # each has the same
    rows = load_rows(build_dir(spec.name) / "evaluation.npz")
    inputs = inputs_at(spec, rows, {name: axis.opt for name, axis in spec.axes.items()})
    with log.status("timing, interleaved"):
        timers = {name: variant_timers(spec, name, target, runner, inputs) for name, runner in runners.items()}
        before = clocks()
        seconds, copies = _timed(timers, wall(lambda: reference(inputs)))
    timed_rows = spec.axes[BATCH].opt
    add_speed(variants, seconds, timed_rows)
    for copied, each in copies.items():
        variants[copied]["copies_ms"] = 1000 * statistics.median(each)
    candidates = [name for name in wanted if name in variants]
    judged = {name: judged_variant(spec, variant) for name, variant in variants.items()}
    chosen, reasons, failure = "", dict[str, str](), ""
    try:
        chosen, reasons = choose(judged, candidates, seconds, asked=only is not None)
    except GateFailed as error:
        failure = str(error)
    for compared, variant in variants.items():
        del variant["paired"]
        variant |= {"reason": reasons.get(compared, judged[compared].reason), "judgement": asdict(judged[compared])}
    warning = too_small(spec, metrics)
    provider = choose_provider(spec.onnxruntime.provider) if target == "onnxruntime" else None
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
        "rows": len(rows),
        "clocks": {"before": before, "after": clocks()},
        "timed_shapes": {name: list(array.shape) for name, array in inputs.items()},
        "pytorch": {"metrics": metrics, "rows_per_s": timed_rows / statistics.median(seconds["pytorch"])},
        "variants": variants,
        "refused": refused,
        "sensitivity": {name: report for name in candidates if (report := sensitivity_of(spec, name))},
    }


def _variant(
    source: ModelFolder,
    target: Target,
    name: Precision,
    weights: str,
    baseline: Callable[[], Baseline],
    predict: Predict,
) -> dict[str, Any]:
    """The accuracy of a variant, the metrics of PyTorch (both may come from the cache), and the variant's size."""
    spec = source.spec

    def measure() -> dict[str, Any]:
        return {**_measured(baseline(), predict, sensitivity_of(spec, name)), "pytorch": baseline().metrics}

    found = measured(accuracy_key(source, name, weights), spec.name, measure)
    if name == "fp32":
        _check_fp32(spec, target, found["parity"])
    return {**found, "size_bytes": read_manifest(engine_path(spec.name, name, target)).size_bytes}


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


def _check_fp32(spec: DeploymentSpec, target: Target, parity: dict[str, dict[str, float]]) -> None:
    """Raises GateFailed if fp32 differs from PyTorch: a metric might not reveal a graph of another model."""
    allowed = spec.parity.of("fp32").worst_error
    if target == "tensorrt":  # TF32 has fp16's mantissa
        allowed = max(allowed, PRECISIONS["fp16"].worst_error)
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
        return f"its {what} does not run: {' '.join(str(error).split())[:300]}"
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


def show(result: dict[str, Any]) -> None:
    """Prints the table, and why each variant was chosen or not."""
    print(f"{result['model']} on {result['target']}: {result['rows']} evaluation rows, budget {result['max_drop']:.2%}")
    Console(width=max(Console().width, 118), markup=False).print(_table(result))
    for line in (*_about_rows(result), *_about_variants(result)):
        print(line)
    for name, report in result["sensitivity"].items():
        if report["layers"]:
            print(f"{name:<9} sensitivity: {verdict(report, name, report['high'])}")
            Console(width=max(Console().width, 100), markup=False).print(shares_table(report, name, report["high"]))


def _table(result: dict[str, Any]) -> Table:
    """One row per variant."""
    metric, base = result["metric"], result["pytorch"]
    table = Table("precision", box=box.SIMPLE_HEAD)
    for column in (metric, "drop", "interval", "rows", "worst error", "cosine", "top", "speed", "size"):
        table.add_column(column, justify="right", no_wrap=column == "interval")
    speed = base["rows_per_s"] / result["variants"]["fp32"]["rows_per_s"]
    reference = f"{base['metrics'][metric]:.4f}" if metric in base["metrics"] else "1"
    table.add_row("PyTorch fp32", reference, "", "", "", "", "", "", f"{speed:.2f}x", "")
    for name, variant in result["variants"].items():
        outputs, judged = variant["parity"].values(), variant["judgement"]
        errors = [output["worst_error"] for output in outputs if "worst_error" in output]
        cosines = [output["cosine"] for output in outputs if "cosine" in output]
        table.add_row(
            name,
            f"{variant['metrics'].get(metric, 1 - variant['drop']):.4f}".replace("-inf", ""),
            f"{variant['drop']:+.2%}",
            interval_text(judged["low"], judged["high"]) if judged["low"] is not None else "",
            "" if variant["rows"]["drop"] is None else str(variant["rows"]["drop"]),
            f"{max(errors):.2g}" if errors else "",
            f"{min(cosines):.5f}" if cosines else "",
            f"{min(output['top_agreement'] for output in outputs):.1%}",
            f"{variant['speedup']:.2f}x",
            human_bytes(variant["size_bytes"]),
            style="bold" if name == result["chosen"] else None,
        )
    return table


def _about_rows(result: dict[str, Any]) -> Iterator[str]:
    """What the table's intervals and rows are."""
    metric, variants = result["metric"], result["variants"]
    confidence = next((each["judgement"]["confidence"] for each in variants.values()), None)
    if confidence is not None:
        yield f"interval: bounds of the drop, each at {confidence:.2%}; rows: those of drop and interval"
    elif metric != "similarity":
        yield f"{metric} is judged by one number, no interval: evaluate() does not return it row by row"
    for name, each in variants.items():
        if "chosen_on" in (rows := each["rows"]):
            also = "" if metric == "similarity" else f", {metric} from all {rows['metric'] or 'rows'}"
            yield f"{name}: layers were chosen on other rows; drop from {rows['drop']} rows{also}"


def _about_variants(result: dict[str, Any]) -> Iterator[str]:
    """Why each variant was chosen or not, and what else is known of its speed."""
    variants = result["variants"]
    if result["warning"]:
        yield f"warning: {result['warning']}"
    for name, variant in variants.items():
        yield f"{name:<9} {variant['reason']}"
    if result["int8_dot_products"] is False and (int8 := variants.get("int8")):
        gain = f"{int8['speedup']:.2f} times fp32"
        yield f"int8      gains less on this CPU ({gain}): it has no 8-bit dot products (VNNI, AMX)"
    if copies := [f"{name} {each['copies_ms']:.3f} ms" for name, each in variants.items() if "copies_ms" in each]:
        yield f"copies to and from the GPU, not part of the speed: {', '.join(copies)}"
        yield f"GPU clocks: {result['clocks']['before']}; after timing: {result['clocks']['after']}"
    for name, reason in result["refused"].items():
        yield f"{name:<9} could not be made: {reason}"


def main(options: argparse.Namespace) -> None:
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
