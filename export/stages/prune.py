"""Structured pruning of a model: removes heads and channels, fine-tunes, and checks the accuracy budget.

Contract: prunes the module of `load()` and fine-tunes it in place with model.py's `finetune(module)`. Without that
function, the pruned module learns the unpruned one's outputs on the calibration rows that are not evaluation rows. The
evaluation split is used only for the verdict, before and after. Writes `build/<name>/pruned.safetensors`, which every
later stage uses, and `pruning.json`. Exit 1 if deploy.toml's budget refuses the drop; then nothing is written. A killed
fine-tuning resumes. Results are cached, unless model.py has `finetune` or `evaluate` but no `fingerprint` of the data
they read.
"""

import argparse
import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.pruning import PruneConfig, PruneReport, prune_model, save_pruned, weights_digest
from deepseek.pruning.distillation import distil
from deepseek.pruning.prunable import Inputs
from deepseek.spec import GateFailed, InputError, build_dir, kept_for_json
from deepseek.spec.files.folders import scratch_in
from deepseek.spec.paired_drop import DropJudgement
from export.artifact import Stopwatch, human_bytes, json_text, pruned_path, pruning_path, publish
from export.cache import fill, refined, stage_key
from export.model_folder import ModelFolder, as_written
from export.precision.accuracy import check_metric, too_small
from export.precision.accuracy_budget import Baseline, judged_variant
from export.precision.calibration import MOST_READ, check_disjoint, disjoint
from export.rows import EVALUATION_ROWS, Row, batches, row_digest
from export.runtimes.batching import outputs_of
from export.runtimes.pytorch_reference import module_predictor

IMPORTANCE_ROWS = 256

log = Console(file=sys.stderr, highlight=False, soft_wrap=True, markup=False)


def prune_source(source: ModelFolder, ratio: float) -> dict[str, Any]:
    """Runs the stage; returns the content of pruning.json, written with the module if the drop is allowed."""
    spec, config = source.spec, PruneConfig(ratio=ratio)
    with log.status("reading samples"):
        most, evaluation = spec.precision.calibration_samples, list(source.rows("evaluation", EVALUATION_ROWS))
        rows, shared = disjoint(source.rows("calibration", MOST_READ * most), evaluation, most)
    check_disjoint(rows, shared, f"{source.folder / 'model.py'}: samples('calibration')", "build without PRUNE")
    original = source.unpruned()
    told = source.data_digest(finetunes=True)
    digests = ["".join(sorted(digest.hex() for digest in map(row_digest, split))) for split in (rows, evaluation)]
    own = None if told is None else stage_key("fine-tune")
    key = refined(own, calibration=digests[0], evaluation=digests[1], fingerprint=told or "")
    path = pruned_path(spec.name)
    with scratch_in(path.parent) as scratch:
        fill(scratch, key, lambda folder: _prune(source, original, config, _batches(source, rows), evaluation, folder))
        report = json.loads((scratch / pruning_path(spec.name).name).read_text())
        report["drop"] = math.inf if report["drop"] is None else report["drop"]  # JSON has no infinity
        judged = judged_variant(spec, report)  # a cached report may be of another budget
        if judged.accepted:
            publish(scratch, path)
    return {**report, "max_drop": spec.precision.max_drop, "judgement": asdict(judged)}


def _prune(
    source: ModelFolder,
    original: torch.nn.Module,
    config: PruneConfig,
    data: list[Inputs],
    evaluation: list[Row],
    scratch: Path,
) -> None:
    """Prunes, fine-tunes and measures; writes module and report into `scratch`."""
    spec, clock, module = source.spec, Stopwatch(), source.unpruned()
    places, others = ({weight.data_ptr() for weight in each.parameters()} - {0} for each in (module, original))
    if places & others:
        raise InputError(
            f"{source.folder / 'model.py'}: load() returned the same weights twice; let it make new ones each time: "
            "pruning changes them, and compares the module with the unpruned one"
        )
    with log.status("ranking heads and channels"):
        few = data[: max(1, IMPORTANCE_ROWS // len(data[0][0]))]
        report = prune_model(module, few[0], config, few[1:])
    baseline = _baseline(source, original, evaluation)
    before_tuning = baseline.measure(module_predictor(spec, module))
    how = _finetune(source, module, original, data)
    pruned = baseline.measure(module_predictor(spec, module))
    shutil.rmtree(_checkpoints(source), ignore_errors=True)  # the run has ended; the next may have other settings
    result = {
        "model": spec.name,
        "ratio": config.ratio,
        "metric": "similarity" if baseline.by_similarity else spec.precision.metric,
        "unpruned": {"similarity": 1.0} if baseline.by_similarity else baseline.metrics,
        **{
            name: {"similarity": 1 - found["drop"]} if baseline.by_similarity else found["metrics"]
            for name, found in (("before_finetuning", before_tuning), ("pruned", pruned))
        },
        "drop": pruned["drop"],
        "paired": pruned["paired"],
        "max_drop": spec.precision.max_drop,
        "finetuned": how,
        **_facts(report),
        "seconds": clock.elapsed_s,
    }
    save_pruned(module, report, scratch / pruned_path(spec.name).name, of=weights_digest(original))
    (scratch / pruning_path(spec.name).name).write_text(json_text(result) + "\n")


def _batches(source: ModelFolder, rows: list[Row]) -> list[Inputs]:
    """Calibration rows as batches of tensors, the largest batch first."""
    spec = source.spec
    parts = sorted(batches(rows, spec.axes["batch"].opt), key=lambda part: -len(part[0]))
    return [tuple(torch.from_numpy(inputs[name]) for name in spec.inputs) for _, inputs in parts]


def _checkpoints(source: ModelFolder) -> Any:
    return build_dir(source.spec.name) / "checkpoints-pruning"


def _finetune(source: ModelFolder, module: torch.nn.Module, original: torch.nn.Module, data: list[Inputs]) -> str:
    """Fine-tunes in place; returns how."""
    if source.finetune is not None:
        log.print("fine-tuning with model.py's finetune(module)")
        with as_written(module):
            source.finetune(module)
        module.cpu().eval()
        return "finetune"
    log.print(
        f"{source.folder / 'model.py'} has no finetune(module): the pruned module learns the outputs of the unpruned "
        f"one on {sum(len(batch[0]) for batch in data)} calibration rows; fine-tuning on training data recovers more"
    )
    if len(data) < 2:
        log.print("too few calibration rows for that: the module is not fine-tuned")
        return "nothing"
    folder = _checkpoints(source) / weights_digest(module)  # unique to this ratio and these weights
    distil(module, original, data, checkpoints=folder)
    return "distillation"


def _baseline(source: ModelFolder, original: torch.nn.Module, rows: list[Row]) -> Baseline:
    """The unpruned module on the evaluation rows; raises InputError if its metric cannot be used."""
    predict = module_predictor(source.spec, original)
    found = check_metric(source, predict)
    if why := too_small(source.spec, found.metrics):
        log.print(f"warning: {why}")
    outputs = outputs_of(source.spec, predict, rows)
    return Baseline(
        source=source, predict=predict, rows=rows, outputs=outputs, unpruned_outputs=outputs, evaluated=found
    )


def _facts(report: PruneReport) -> dict[str, Any]:
    """The parts of the report that people and later stages read."""
    layers = [vars(layer) for layer in report.layers]
    counts = {kind: report.count(kind) for kind in ("heads", "channels")}
    names = ("parameters", "prunable_parameters", "flops", "size_bytes", "left_alone")
    return {**counts, **{name: getattr(report, name) for name in names}, "layers": layers}


def show(result: dict[str, Any]) -> None:
    metric, how = result["metric"], result["finetuned"]
    judged = DropJudgement(**result["judgement"])
    print(f"{result['model']} pruned by {result['ratio']:g}: {judged.reason}")
    table = Table("", box=box.SIMPLE_HEAD)
    for column in ("unpruned", "pruned", "reduction"):
        table.add_column(column, justify="right")
    named = {
        "heads": "attention heads",
        "channels": "channels",
        "prunable_parameters": "parameters of those layers",
        "parameters": "parameters, all",
        "flops": "FLOPs a row",
        "size_bytes": "size",
    }
    for key, label in named.items():
        before, after = result[key]
        if before:
            shown = [human_bytes(value) if key == "size_bytes" else f"{value:,}" for value in (before, after)]
            table.add_row(label, *shown, f"{1 - after / before:.1%}")
    before = result["unpruned"][metric]
    for label, key in ((f"{metric}, not fine-tuned", "before_finetuning"), (f"{metric}, {how}", "pruned")):
        value = math.nan if result[key][metric] is None else result[key][metric]
        table.add_row(label, f"{before:.4f}", f"{value:.4f}", f"{(before - value) / before:+.2%}")
    Console(width=max(Console().width, 90), markup=False).print(table)
    for layer in result["layers"]:
        print(f"{layer['name']}: {layer['before']} -> {layer['after']} {layer['kind']}")
    for name, reason in result["left_alone"].items():
        print(f"{name}: left alone, {reason}")


def main(options: argparse.Namespace) -> None:
    with kept_for_json(options.json):
        result = prune_source(ModelFolder(options.model, options.models), options.ratio)
    if options.json:
        print(json_text(result))
    else:
        show(result)
    judged = DropJudgement(**result["judgement"])
    if not judged.accepted:
        raise GateFailed(
            f"pruned by {options.ratio:g}, {options.model} loses {result['drop']:.2%} of {result['metric']}; "
            f"deploy.toml's max_drop is {result['max_drop']:.2%}{judged.doubt}: take a smaller ratio, or "
            "fine-tune longer in finetune(module)"
        )
