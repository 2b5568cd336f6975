"""Every variant against fp32 PyTorch: parity, the task metric, speed; and the choice that follows.

Contract: runs fp32 and each candidate of `deploy.toml` as the target runs them (ONNX Runtime, or the
TensorRT engines) over the evaluation split, times them interleaved in one process, every axis at its opt, and picks the
fastest that loses at most `max_drop`. fp32 is always measured: a candidate inside the budget that is not faster
is not worth its loss, and fp32 is taken; on a GPU 8 bits have to beat fp16, too. Writes
`build/<name>/choice-<target>.json` and the accuracy into each manifest. Exit 1 if a precision asked for by
name is outside the budget. What drop means: export/budget.py.

Examples:
    python -m export.compare --model recommender
    python -m export.compare --model recommender --target onnxruntime --precision int8 --json
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import (
    BATCH,
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    ParitySpec,
    Parser,
    Precision,
    Target,
    add_model_arguments,
    build_dir,
    flags_for,
    kept_for_json,
    run_command,
)
from export.accuracy import too_small
from export.artifact import (
    Row,
    choice_path,
    engine_path,
    human_bytes,
    json_text,
    load_rows,
    onnx_path,
    read_manifest,
    refusal,
    sha256,
    staged,
    write_manifest,
)
from export.budget import Baseline, accuracy_key, measured
from export.isolation import Crashed, in_child
from export.runners import module_runner, outputs_of, variant_runner
from export.sensitivity import shares_table, verdict
from export.source import Predict, Source

# Rounds of timing, each variant once a round: as many as fit the time, but no fewer and no more.
TIMING_S = 3.0
LEAST_ROUNDS, MOST_ROUNDS = 9, 300

log = Console(file=sys.stderr, markup=False)


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
    variants: dict[str, dict[str, Any]], candidates: Sequence[str], max_drop: float, *, asked: bool = False
) -> tuple[str, dict[str, str]]:
    """The precision to serve and, for each variant, why it was taken or not.

    fp32 is what is left where no candidate is both inside the budget and faster. `asked`: the one candidate was asked
    for by name, and only the budget speaks against it. Raises GateFailed where not even fp32 is inside.
    """
    reasons = {}
    for name, variant in variants.items():
        if not variant["drop"] <= max_drop:
            reasons[name] = f"outside the budget: drop {variant['drop']:.2%} > {max_drop:.2%}"
        elif name not in ("fp32", *candidates):
            reasons[name] = "not a candidate"
        elif name != "fp32" and not variant["faster"]:
            how = "not faster" if variant["over_rival"] <= 1 else "in fewer than three rounds of four faster"
            reasons[name] = f"inside, but {how} than {variant['rival']} ({variant['over_rival']:.2f}x)"
        else:
            reasons[name] = "inside"
    allowed = candidates if asked else ["fp32", *(name for name in candidates if variants[name].get("faster"))]
    inside = [name for name in allowed if variants[name]["drop"] <= max_drop]
    if not inside:
        drops = ", ".join(f"{name} {variants[name]['drop']:.2%}" for name in variants if asked <= (name in candidates))
        advice = "raise it, or choose with PRECISION=auto" if asked else "not even fp32 is"
        raise GateFailed(f"no candidate is inside max_drop {max_drop:.2%} (drops: {drops}); {advice}")
    chosen = max(inside, key=lambda name: variants[name]["speedup"])
    if asked:
        reasons[chosen] = "chosen: asked for, inside the budget"
    elif chosen == "fp32":
        reasons[chosen] = "chosen: no candidate is faster inside the budget"
    else:
        reasons[chosen] = "chosen: the fastest inside the budget"
    return chosen, reasons


def rivals_of(name: str, target: Target, variants: dict[str, dict[str, Any]], max_drop: float) -> list[str]:
    """What a precision has to be faster than: 8 bits on a GPU have to beat fp16, too, whose loss is smaller."""
    fp16_serves = "fp16" in variants and variants["fp16"]["drop"] <= max_drop
    return ["fp32", "fp16"] if target == "tensorrt" and name in ("int8", "fp8") and fp16_serves else ["fp32"]


def add_speed(
    variants: dict[str, dict[str, Any]], seconds: dict[str, list[float]], rows: int, target: Target, max_drop: float
) -> None:
    """Ratios are of the same round, so that both sides met the same noise; of two rivals the harder one is told."""
    for name, variant in variants.items():
        over = {each: _ratios(seconds[each], seconds[name]) for each in rivals_of(name, target, variants, max_drop)}
        three_of_four = {each: ratios[len(ratios) // 4] for each, ratios in over.items()}
        rival = min(over, key=lambda each: three_of_four[each])
        variant["rows_per_s"] = rows / statistics.median(seconds[name])
        variant["speedup"] = statistics.median(over["fp32"])
        variant["rival"], variant["over_rival"] = rival, statistics.median(over[rival])
        variant["faster"] = three_of_four[rival] > 1  # in three rounds of four


def _ratios(base: list[float], own: list[float]) -> list[float]:
    return sorted(slow / fast for slow, fast in zip(base, own, strict=True))


def compare(source: Source, target: Target, only: Precision | None) -> dict[str, Any]:
    """Runs the stage; returns the measurements and, under "chosen", the choice ("" where none is)."""
    spec = source.spec
    max_drop = spec.precision.max_drop
    wanted: list[Precision] = [only] if only else list(spec.precision.candidates)
    tried: list[Precision] = ["fp32", *(name for name in wanted if name != "fp32")]
    refused = {name: why for name in tried if (why := _refusal(spec, name, target) or _failure(spec, name, target))}
    if only in refused or "fp32" in refused:
        raise GateFailed(refused[only if only in refused else "fp32"])
    candidates = [name for name in wanted if name not in refused]
    names = [name for name in tried if name not in refused]
    module = source.load()
    weights = _weights_digest(module)
    keys = {name: accuracy_key(source, weights, engine_path(spec.name, name, target), target) for name in names}
    reference = module_runner(spec, module)
    baseline = functools.cache(lambda: Baseline.of(source, reference))  # not needed where all has been measured
    variants: dict[str, dict[str, Any]] = {}
    runners: dict[str, Predict] = {}
    for name in names:
        with log.status(f"{name} on {target}"):
            runners[name] = variant_runner(spec, name, target)
            variants[name] = measured(
                keys[name],
                spec.name,
                lambda name=name: {**baseline().measure(runners[name]), "pytorch": baseline().metrics},  # type: ignore[misc]
            )
            if name == "fp32":
                _check_fp32(spec, target, variants[name]["parity"], module)
            metrics = variants[name].pop("pytorch")
            variants[name]["size_bytes"] = read_manifest(engine_path(spec.name, name, target)).size_bytes
    rows = load_rows(build_dir(spec.name) / "evaluation.npz")
    inputs = _at_opt(spec, rows)
    timed_rows = spec.axes[BATCH].opt
    with log.status("timing, interleaved"):
        timed = {"pytorch": reference, **runners}
        seconds = time_interleaved({name: functools.partial(run, inputs) for name, run in timed.items()})
    add_speed(variants, seconds, timed_rows, target, max_drop)
    try:
        chosen, reasons = choose(variants, candidates, max_drop, asked=only is not None)
        failure = ""
    except GateFailed as error:
        chosen, reasons, failure = "", {}, str(error)
    warning = too_small(spec, metrics)
    for name in names:
        variants[name]["reason"] = reasons.get(name, f"drop {variants[name]['drop']:.2%}")
    return {
        "model": spec.name,
        "target": target,
        "chosen": chosen,
        "failure": failure,
        "metric": "similarity" if warning else spec.precision.metric or "similarity",
        "warning": warning,
        "max_drop": max_drop,
        "rows": len(rows),
        "timed_shapes": {name: list(array.shape) for name, array in inputs.items()},
        "pytorch": {"metrics": metrics, "rows_per_s": timed_rows / statistics.median(seconds["pytorch"])},
        "variants": variants,
        "refused": refused,
        "sensitivity": {name: report for name in candidates if (report := _sensitivity(spec, name))},
    }


def _check_fp32(spec: DeploymentSpec, target: Target, parity: dict[str, dict[str, float]], module: Any) -> None:
    """Raises GateFailed where fp32 is not what PyTorch gives: a metric may not tell a graph of another model."""
    allowed = spec.parity.fp32.worst_error
    if target == "tensorrt":  # TF32 has fp16's mantissa
        allowed = max(allowed, ParitySpec().fp16.worst_error)
    for name, numbers in parity.items():
        error = numbers.get("worst_error", 0.0)
        if error > allowed and error > _lost_digits(spec, module).get(name, 0.0):
            raise GateFailed(
                f"fp32 on {target}: output {name!r} is off by {error:.2g} from PyTorch, allowed {allowed:g}; where "
                f"the model has changed since, run python -m export.to_onnx {flags_for(spec.name)} and make engine, "
                "else set [parity.fp32] worst_error in deploy.toml"
            )


def _lost_digits(spec: DeploymentSpec, module: Any) -> dict[str, float]:
    """By output, what fp32 may be off in any order of its sums."""
    from export.reference import AS_NEAR, own_errors  # torch, as below

    own = own_errors(spec, module, load_rows(build_dir(spec.name) / "evaluation.npz"))
    return {name: AS_NEAR * error for name, error in own.items()}


def _at_opt(spec: DeploymentSpec, rows: list[Row]) -> Row:
    """Real inputs at the usual sizes, whatever sizes the rows have."""
    from export.reference import inputs_at  # torch, as below

    return inputs_at(spec, rows, {name: axis.opt for name, axis in spec.axes.items()})


def _weights_digest(module: Any) -> str:
    from export.reference import weights_digest  # torch, which takes seconds to import

    return weights_digest(module)


def _refusal(spec: DeploymentSpec, name: Precision, target: Target) -> str | None:
    """Why the graph or the engine of a precision could not be made; None where both were."""
    return refusal(onnx_path(spec.name, name)) or refusal(engine_path(spec.name, name, target))


def _failure(spec: DeploymentSpec, name: Precision, target: Target) -> str | None:
    """Why a graph that was made does not run in ONNX Runtime as it is served; tried in a process of its own."""
    if target not in ("onnxruntime", "tensorrt_rtx"):
        return None
    row = load_rows(build_dir(spec.name) / "evaluation.npz")[:1]
    try:
        in_child("ONNX Runtime", lambda: outputs_of(spec, variant_runner(spec, name, target), row))
    except (InputError, InvalidMeasurement):  # never built, or no such execution provider; short of memory, say
        raise
    except Crashed as crash:
        return f"{crash} on its graph"
    except Exception as error:
        return f"its graph does not run: {' '.join(str(error).split())[:300]}"
    return None


def _sensitivity(spec: DeploymentSpec, name: Precision) -> dict[str, Any] | None:
    """What the sensitivity pass found, where there was one, and the precision of the layers kept high."""
    path = onnx_path(spec.name, name)
    report = path.with_name("sensitivity.json")
    if name not in ("int8", "fp8") or not report.is_file():
        return None
    return {**json.loads(report.read_text()), "high": read_manifest(path).settings["high_precision"]}


def record(result: dict[str, Any], spec: DeploymentSpec, target: Target) -> None:
    """Writes the accuracy into each manifest, and the choice."""
    for name, variant in result["variants"].items():
        path = engine_path(spec.name, name, target)
        accuracy = {key: variant[key] for key in ("drop", "metrics", "parity")}
        manifest = read_manifest(path).model_copy(update={"accuracy": {"against": "fp32 PyTorch", **accuracy}})
        write_manifest(path.parent / "manifest.json", manifest)
    result["sha256"] = {name: sha256(engine_path(spec.name, name, target)) for name in result["variants"]}
    with staged(choice_path(spec.name, target)) as file:
        file.write_text(json_text(result) + "\n")


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
    Console(width=max(Console().width, 100), markup=False).print(table)
    if result["warning"]:
        print(f"warning: {result['warning']}")
    for name, variant in result["variants"].items():
        print(f"{name:<9} {variant['reason']}")
    for name, reason in result["refused"].items():
        print(f"{name:<9} could not be made: {reason}")
    for name, report in result["sensitivity"].items():
        if report["layers"]:
            print(f"{name:<9} sensitivity: {verdict(report, name, report['high'])}")
            Console(width=max(Console().width, 100), markup=False).print(shares_table(report, name, report["high"]))


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
    with kept_for_json(args.json):
        source = Source(args.model, args.models)
        result = compare(source, args.target, None if args.precision == "auto" else args.precision)
    if args.json:
        print(json_text(result))
    else:
        show(result)
    if result["failure"]:
        raise GateFailed(result["failure"])
    record(result, source.spec, args.target)


if __name__ == "__main__":
    run_command(main)
