"""Structured pruning of a model folder: heads and channels out, fine-tuned, judged, and handed on.

Contract: prunes what `load()` gives (`deepseek.pruning`; importance from calibration rows), fine-tunes it by model.py's
`finetune(module)`, in place; where there is none the pruned module learns the unpruned one's outputs on the
calibration rows (`deepseek.distillation`). The evaluation split is read once before and once after, for the
verdict alone. Writes `build/<name>/pruned.safetensors`, from which every later stage works as long as it is
there, and `build/<name>/pruning.json`. Exit 1 where more than deploy.toml's `max_drop` is lost: nothing is
written then. A killed fine-tuning goes on where it was; one that ended is in the cache (`export.cache`), by weights,
samples, settings, Python that is loaded, files of the model folder, DATA and what model.py's `fingerprint()` tells. A
model that has `finetune` or is judged by `evaluate`, and has no `fingerprint`, is pruned each time: nobody else knows
what they read.

Examples:
    python -m export.prune --model recommender
    python -m export.prune --models tests/models --model image --ratio 0.2 --json
    PRUNE=0.25 make engine        # and without PRUNE unpruned again
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.distillation import distil
from deepseek.prunable import Inputs
from deepseek.pruning import PruneConfig, PruneReport, prune_model, save_pruned, weights_digest
from deepseek.spec import GateFailed, Parser, add_model_arguments, build_dir, kept_for_json, run_command
from deepseek.spec.folders import scratch_in
from export.accuracy import check_metric, metric_drop, parity, similarity, task_metrics, too_small
from export.artifact import (
    Clock,
    Row,
    batches,
    human_bytes,
    pruned_path,
    pruning_path,
    publish,
    row_digests,
)
from export.cache import alone_with, fetch, key_of, store
from export.runners import module_runner, outputs_of
from export.source import Predict, Source

IMPORTANCE_ROWS = 256
EVALUATION_ROWS = 2000  # as export.to_onnx

log = Console(file=sys.stderr, highlight=False, soft_wrap=True, markup=False)


def prune_source(source: Source, ratio: float) -> dict[str, Any]:
    """Runs the stage; returns what pruning.json says, which is written with the module where the drop is allowed."""
    spec, config = source.spec, PruneConfig(ratio=ratio)
    with log.status("reading samples"):
        rows = list(source.rows("calibration", spec.precision.calibration_samples))
        evaluation = list(source.rows("evaluation", EVALUATION_ROWS))
    original = source.unpruned()
    reads = source.reads()
    asks = source.finetune is not None or spec.precision.metric is not None  # the model's own code, of its own data
    known = not asks or reads["fingerprint"] is not None
    key = key_of(
        "prune",
        weights=weights_digest(original),
        rows=[sorted(digest.hex() for digest in row_digests(split)) for split in (rows, evaluation)],
        reads=reads,
        spec=spec.model_facts(),
        ratio=ratio,
    )
    path = pruned_path(spec.name)
    with scratch_in(path.parent) as scratch, alone_with(key if known else None):
        if not (known and fetch(key, scratch)):
            result = _prune(source, original, config, _batches(source, rows), evaluation, scratch)
            if not result["drop"] <= spec.precision.max_drop:
                return result
            if known:
                store(key, scratch)
        result = json.loads((scratch / pruning_path(spec.name).name).read_text())
        publish(scratch, path)
    return result


def _prune(
    source: Source,
    original: torch.nn.Module,
    config: PruneConfig,
    data: list[Inputs],
    evaluation: list[Row],
    scratch: Path,
) -> dict[str, Any]:
    """Prunes, fine-tunes and judges; writes module and report into `scratch`."""
    spec, clock, module = source.spec, Clock(), source.unpruned()
    with log.status("measuring what heads and channels are worth"):
        few = data[: max(1, IMPORTANCE_ROWS // len(data[0][0]))]
        report = prune_model(module, few[0], config, few[1:])
    judge = _Judge(source, original, evaluation)
    before_tuning = judge.value(module)
    how = _finetune(source, module, original, data)
    pruned = judge.value(module)
    shutil.rmtree(_checkpoints(source), ignore_errors=True)  # of a run that ended: another try may have other settings
    result = {
        "model": spec.name,
        "ratio": config.ratio,
        "metric": judge.metric,
        "unpruned": judge.unpruned,
        "before_finetuning": before_tuning,
        "pruned": pruned,
        "drop": metric_drop(judge.metric, pruned[judge.metric], judge.unpruned[judge.metric]),
        "max_drop": spec.precision.max_drop,
        "finetuned": how,
        **_facts(report),
        "seconds": clock.elapsed_s,
    }
    save_pruned(module, report, scratch / pruned_path(spec.name).name, of=weights_digest(original))
    (scratch / pruning_path(spec.name).name).write_text(json.dumps(result, indent=2) + "\n")
    return result


def _batches(source: Source, rows: list[Row]) -> list[Inputs]:
    """Calibration rows put together, the largest batch first."""
    spec = source.spec
    parts = sorted(batches(rows, spec.axes["batch"].opt), key=lambda part: -len(part[0]))
    return [tuple(torch.from_numpy(inputs[name]) for name in spec.inputs) for _, inputs in parts]


def _checkpoints(source: Source) -> Any:
    return build_dir(source.spec.name) / "checkpoints-pruning"


def _finetune(source: Source, module: torch.nn.Module, original: torch.nn.Module, data: list[Inputs]) -> str:
    """Fine-tunes in place; says how."""
    if source.finetune is not None:
        log.print("fine-tuning with model.py's finetune(module)")
        source.finetune(module)
        module.cpu().eval()
        return "finetune"
    log.print(
        f"{source.folder / 'model.py'} has no finetune(module): the pruned module learns the outputs of the unpruned "
        f"one on {sum(len(batch[0]) for batch in data)} calibration rows; fine-tuning on training data gets back more"
    )
    if len(data) < 2:
        log.print("too few calibration rows even for that: nothing is fine-tuned")
        return "nothing"
    folder = _checkpoints(source) / weights_digest(module)  # of this ratio and these weights, and of no other run
    distil(module, original, data, checkpoints=folder)
    return "distillation"


class _Judge:
    """The metric of deploy.toml; where it names none that can tell a drop, similarity to the unpruned outputs."""

    def __init__(self, source: Source, original: torch.nn.Module, rows: list[Row]) -> None:
        self.source, self.rows = source, rows
        predict = module_runner(source.spec, original)
        self.unpruned = check_metric(source, predict, log)
        if why := too_small(source.spec, self.unpruned):
            log.print(f"warning: {why}")
        metric = None if why else source.spec.precision.metric
        self.by_task, self.metric = metric is not None, metric or "similarity"
        if not self.by_task:
            self.reference = self._outputs(predict)
            self.unpruned = {"similarity": 1.0}

    def value(self, module: torch.nn.Module) -> dict[str, float]:
        predict = module_runner(self.source.spec, module)
        if self.by_task:
            return task_metrics(self.source, predict)
        return {"similarity": similarity(parity(self.source.spec, self._outputs(predict), self.reference))}

    def _outputs(self, predict: Predict) -> list[Row]:
        return outputs_of(self.source.spec, predict, self.rows)


def _facts(report: PruneReport) -> dict[str, Any]:
    """Of the report, what people and later stages read."""
    layers = [vars(layer) for layer in report.layers]
    counts = {kind: report.count(kind) for kind in ("heads", "channels")}
    names = ("parameters", "prunable_parameters", "flops", "size_bytes", "left_alone")
    return {**counts, **{name: getattr(report, name) for name in names}, "layers": layers}


def show(result: dict[str, Any]) -> None:
    """The tables for people."""
    metric, how = result["metric"], result["finetuned"]
    print(f"{result['model']} pruned by {result['ratio']:g}, budget {result['max_drop']:.2%}")
    table = Table("", box=box.SIMPLE_HEAD)
    for column in ("unpruned", "pruned", "gone"):
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
        value = result[key][metric]
        table.add_row(label, f"{before:.4f}", f"{value:.4f}", f"{(before - value) / before:+.2%}")
    Console(width=max(Console().width, 90), markup=False).print(table)
    for layer in result["layers"]:
        print(f"{layer['name']}: {layer['before']} -> {layer['after']} {layer['kind']}")
    for name, reason in result["left_alone"].items():
        print(f"{name}: left alone, {reason}")


def main() -> None:
    """Prunes one model."""
    parser = Parser(__doc__, prog="python -m export.prune")
    add_model_arguments(parser)
    parser.add_argument(
        "--ratio",
        type=float,
        default=PruneConfig.ratio,
        help="of all heads, and of all channels that can go (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    with kept_for_json(args.json):
        result = prune_source(Source(args.model, args.models), args.ratio)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    if not result["drop"] <= result["max_drop"]:
        raise GateFailed(
            f"pruned by {args.ratio:g}, {args.model} loses {result['drop']:.2%} of {result['metric']}; deploy.toml's "
            f"max_drop is {result['max_drop']:.2%}: take a smaller ratio, or fine-tune longer in finetune(module)"
        )


if __name__ == "__main__":
    run_command(main)
