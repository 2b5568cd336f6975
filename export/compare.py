"""Every variant against fp32 PyTorch: parity, the task metric, speed; and the choice that follows.

Contract: runs fp32 and each candidate of `deploy.toml` as the target runs them (ONNX Runtime, or the
TensorRT engines) over the evaluation split, times them interleaved in one process, and picks the fastest
that loses at most `max_drop`. fp32 is always measured: a candidate inside the budget that is not faster
is not worth its loss, and fp32 is taken. Writes `build/<name>/choice-<target>.json` and the accuracy
into each manifest. Exit 1 if no candidate is inside the budget.

Words: drop = (fp32 - variant) / fp32 of the metric, larger being better; without a metric it is
1 - the similarity of the outputs (mean cosine for floats, share of common entries for integers).

Examples:
    python -m export.compare --model recommender
    python -m export.compare --model recommender --target onnxruntime --precision int8 --json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    Parser,
    Precision,
    Target,
    add_model_arguments,
    build_dir,
    run_command,
)
from export.accuracy import metric_drop, parity, similarity, task_metrics
from export.artifact import (
    Row,
    batches,
    choice_path,
    engine_path,
    human_bytes,
    load_rows,
    read_manifest,
    sha256,
    staged,
    write_manifest,
)
from export.runners import outputs_of, torch_runner, variant_runner
from export.source import Predict, Source

# Rounds of timing, each variant once a round: as many as fit the time, but no fewer and no more.
TIMING_S = 3.0
LEAST_ROUNDS, MOST_ROUNDS = 9, 300

log = Console(file=sys.stderr)


def time_interleaved(runners: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call, one call of each in turn, so that a noisy moment meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()
    started = time.monotonic()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.monotonic() - started > TIMING_S:
            break
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def choose(
    variants: dict[str, dict[str, Any]], candidates: Sequence[str], max_drop: float
) -> tuple[str, dict[str, str]]:
    """The precision to serve and, for each variant, why it was taken or not.

    A single candidate was asked for by name, and only the budget speaks against it. Raises GateFailed.
    """
    reasons = {}
    for name, variant in variants.items():
        if not variant["drop"] <= max_drop:
            reasons[name] = f"outside the budget: drop {variant['drop']:.2%} > {max_drop:.2%}"
        elif name not in ("fp32", *candidates):
            reasons[name] = "not a candidate"
        elif name != "fp32" and not variant["faster"]:
            reasons[name] = f"inside, but not faster than fp32 ({variant['speedup']:.2f}x)"
        else:
            reasons[name] = "inside"
    inside = [name for name in candidates if variants[name]["drop"] <= max_drop]
    if not inside:
        drops = ", ".join(f"{name} {variants[name]['drop']:.2%}" for name in candidates)
        raise GateFailed(f"no candidate is inside max_drop {max_drop:.2%} (drops: {drops}); raise it, or add fp32")
    if len(candidates) > 1 and variants["fp32"]["drop"] <= max_drop:
        inside = [name for name in inside if variants[name]["faster"]] + ["fp32"]
    chosen = max(inside, key=lambda name: variants[name]["speedup"])
    reasons[chosen] = "chosen: " + (
        "the fastest inside the budget" if len(candidates) > 1 else "asked for, inside the budget"
    )
    return chosen, reasons


def compare(source: Source, target: Target, only: Precision | None) -> dict[str, Any]:
    """Runs the stage; returns the measurements and, under "chosen", the choice ("" where none is)."""
    spec = source.spec
    candidates = [only] if only else list(spec.precision.candidates)
    rows = load_rows(build_dir(spec.name) / "evaluation.npz")
    names: list[Precision] = ["fp32", *(name for name in candidates if name != "fp32")]
    with log.status("fp32 PyTorch"):
        reference_runner = torch_runner(spec, source)
        reference = outputs_of(spec, reference_runner, rows)
        metrics = task_metrics(source, reference_runner)
    variants: dict[str, dict[str, Any]] = {}
    runners: dict[str, Predict] = {}
    for name in names:
        with log.status(f"{name} on {target}"):
            runners[name] = variant_runner(spec, name, target)
            variants[name] = _measure(source, runners[name], rows, reference, metrics)
    _, inputs = max(batches(rows, spec.axes["batch"].opt), key=lambda batch: len(batch[0]))
    with log.status("timing, interleaved"):
        seconds = time_interleaved(
            {
                "pytorch": lambda: reference_runner(inputs),
                **{name: _bound(run, inputs) for name, run in runners.items()},
            }
        )
    for name in names:
        variants[name]["rows_per_s"] = len(next(iter(inputs.values()))) / statistics.median(seconds[name])
        # Of the same round, so that both sides of a ratio met the same noise.
        ratios = sorted(base / own for base, own in zip(seconds["fp32"], seconds[name], strict=True))
        variants[name]["speedup"] = statistics.median(ratios)
        variants[name]["faster"] = ratios[len(ratios) // 4] > 1  # in three rounds of four
        variants[name]["size_bytes"] = read_manifest(engine_path(spec.name, name, target)).size_bytes
    try:
        chosen, reasons = choose(variants, candidates, spec.precision.max_drop)
        failure = ""
    except GateFailed as error:
        chosen, reasons, failure = "", {}, str(error)
    for name in names:
        variants[name]["reason"] = reasons.get(name, f"drop {variants[name]['drop']:.2%}")
    return {
        "model": spec.name,
        "target": target,
        "chosen": chosen,
        "failure": failure,
        "metric": spec.precision.metric or "similarity",
        "max_drop": spec.precision.max_drop,
        "rows": len(rows),
        "timed_shapes": {name: list(array.shape) for name, array in inputs.items()},
        "pytorch": {
            "metrics": metrics,
            "rows_per_s": len(next(iter(inputs.values()))) / statistics.median(seconds["pytorch"]),
        },
        "variants": variants,
    }


def _bound(run: Predict, inputs: Row) -> Callable[[], object]:
    return lambda: run(inputs)


def _measure(
    source: Source, predict: Predict, rows: list[Row], reference: list[Row], baseline: dict[str, float]
) -> dict[str, Any]:
    report = parity(source.spec, outputs_of(source.spec, predict, rows), reference)
    metrics = task_metrics(source, predict)
    metric = source.spec.precision.metric
    drop = 1 - similarity(report) if metric is None else metric_drop(metric, metrics[metric], baseline[metric])
    finite = all(math.isfinite(value) for output in report.values() for value in output.values())
    return {"drop": drop if finite and math.isfinite(drop) else math.inf, "metrics": metrics, "parity": report}


def record(result: dict[str, Any], spec: DeploymentSpec, target: Target) -> None:
    """Writes the accuracy into each manifest, and the choice."""
    for name, variant in result["variants"].items():
        path = engine_path(spec.name, name, target)
        accuracy = {key: variant[key] for key in ("drop", "metrics", "parity")}
        manifest = read_manifest(path).model_copy(update={"accuracy": {"against": "fp32 PyTorch", **accuracy}})
        write_manifest(path.parent / "manifest.json", manifest)
    result["sha256"] = {name: sha256(engine_path(spec.name, name, target)) for name in result["variants"]}
    with staged(choice_path(spec.name, target)) as file:
        file.write_text(json.dumps(result, indent=2) + "\n")


def show(result: dict[str, Any]) -> None:
    """The table for people, and why each variant was taken or not."""
    metric, base = result["metric"], result["pytorch"]
    print(f"{result['model']} on {result['target']}: {result['rows']} evaluation rows, budget {result['max_drop']:.2%}")
    table = Table("precision", box=box.SIMPLE_HEAD)
    for column in (metric, "drop", "worst error", "cosine", "top", "speed", "size"):
        table.add_column(column, justify="right")
    speed = base["rows_per_s"] / result["variants"]["fp32"]["rows_per_s"]
    reference = f"{base['metrics'][metric]:.4f}" if metric in base["metrics"] else "1"
    table.add_row("PyTorch fp32", reference, "", "", "", "", f"{speed:.2f}x", "")
    for name, variant in result["variants"].items():
        outputs = variant["parity"].values()
        errors = [output["worst_error"] for output in outputs if "worst_error" in output]
        cosines = [output["cosine"] for output in outputs if "cosine" in output]
        table.add_row(
            name,
            f"{variant['metrics'].get(metric, 1 - variant['drop']):.4f}",
            f"{variant['drop']:+.2%}",
            f"{max(errors):.2g}" if errors else "",
            f"{min(cosines):.5f}" if cosines else "",
            f"{min(output['top_agreement'] for output in outputs):.1%}",
            f"{variant['speedup']:.2f}x",
            human_bytes(variant["size_bytes"]),
            style="bold" if name == result["chosen"] else None,
        )
    Console(width=max(Console().width, 100)).print(table)
    for name, variant in result["variants"].items():
        print(f"{name:<9} {variant['reason']}")


def main() -> None:
    """Compares the variants of one model and chooses."""
    parser = Parser(__doc__, prog="python -m export.compare")
    add_model_arguments(parser)
    parser.add_argument(
        "--target",
        default="onnxruntime",
        choices=get_args(Target),
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "fp16", "int8", "fp8"),
        help="judge this one only (default: auto, all candidates)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    source = Source(args.model, args.models)
    result = compare(source, args.target, None if args.precision == "auto" else args.precision)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    if result["failure"]:
        raise GateFailed(result["failure"])
    record(result, source.spec, args.target)


if __name__ == "__main__":
    run_command(main)
