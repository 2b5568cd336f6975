"""Whether a new model or version is worse than a base on this machine: interleaved runs, a table for a pull request.

BASE and NEW are each a model repository, a version in `--repository` (`recommender/2`), or a folder of runs that were
recorded. Served ones are measured in turn (`loadtests.interleaved`), judged by `loadtests.regression`. The table is
printed and written to `build/<model>/compare-runs.md`, all figures to `compare-runs.json` beside it; the runs are kept
under `build/<model>/compare-runs/`, and can be judged again.

Exit codes: 0 no worse; 1 worse, or the new one does not load or dies; 2 wrong input; 3 inconclusive.

Examples:
    python -m loadtests.compare_runs --base recommender/1 --new recommender/2
    python -m loadtests.compare_runs --base ../main/model_repository --new model_repository --pairs 12 --threshold 3
    python -m loadtests.compare_runs --base build/m/compare-runs/2026-11-25T12-00-00Z/base/runs --new build/m/new-runs
"""

from __future__ import annotations

import argparse
import json
import math
import signal
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    Parser,
    Target,
    add_model_arguments,
    build_dir,
    run_command,
)
from deepseek.spec.folders import write_whole
from loadtests.endpoint import inputs_of
from loadtests.interleaved import How, interleaved
from loadtests.limits import add_timeout_argument, timeout_for
from loadtests.local_server import EMBEDDED
from loadtests.regression import EXIT_CODES, LEAST_PAIRS, Comparison, Row, Thresholds, Verdict, compare, method
from loadtests.results import Run, Settings
from loadtests.sides import Side, side_of
from loadtests.slo import formatted

PAIRS = 10  # two may be left out


def measured(sides: tuple[Side, Side], args: argparse.Namespace, spec: DeploymentSpec) -> tuple[list[Run], list[Run]]:
    """The runs of both, made now."""
    settings = Settings(
        model=args.model,
        models=args.models,
        target=args.target,
        protocol=args.protocol,
        url="",
        inputs=args.inputs or inputs_of(args.model),
        users=1,
        warmup_s=args.warmup_s,
        duration_s=1.0,
        timeout_s=timeout_for(args.timeout_s, spec.slo),
    )
    how = How(
        spec=spec,
        settings=settings,
        server=args.server,
        rate_rps=args.rate,
        duration_s=args.duration_s,
        pairs=args.pairs,
        max_s=args.max_s,
        capacity=args.capacity,
    )
    folder = build_dir(args.model) / "compare-runs" / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    pairs = interleaved(sides, how, folder, Console(stderr=True, markup=False))
    return [base for base, _ in pairs], [new for _, new in pairs]


def thresholds_of(args: argparse.Namespace) -> Thresholds:
    """Percent become shares."""
    share = args.threshold / 100
    return Thresholds(p50=share, p99=args.threshold_p99 / 100, capacity=share)


def markdown(comparison: Comparison, sides: tuple[Side, Side], model: str, machine: dict[str, Any]) -> str:
    """The table as a pull request takes it."""
    lines = [
        _title(comparison.verdict, sides, model),
        "",
        "| | base | new | new / base | interval | allowed | |",
        "|---|--:|--:|--:|--:|--:|---|",
        *map(_line, comparison.rows),
        "",
        f"{method(comparison)} Measured on {machine.get('cpu', 'an unknown CPU')}, {machine.get('cores', '?')} cores.",
    ]
    if comparison.dropped:
        lines += ["", f"{len(comparison.dropped)} runs left out, the generator was the limit: {comparison.dropped[0]}"]
    return "\n".join(lines) + "\n"


TITLES = {"no worse": "no worse than", "worse": "worse than", "inconclusive": "not to be told apart from"}


def _title(verdict: Verdict, sides: tuple[Side, Side], model: str) -> str:
    base, new = sides
    return f"### {model}: `{new.given}` is {TITLES[verdict]} `{base.given}`"


def without_figures(error: Exception, sides: tuple[Side, Side], model: str) -> tuple[str, dict[str, Any]]:
    """What takes the place of an earlier table and its figures where a side did not get as far: the reason."""
    verdict: Verdict = "worse" if isinstance(error, GateFailed) else "inconclusive"
    said = {side.name: side.given for side in sides}
    return f"{_title(verdict, sides, model)}\n\n{error}\n", {
        "rows": [],
        "reason": str(error),
        "verdict": verdict,
    } | said


def _write(place: Path, text: str, data: dict[str, Any]) -> None:
    write_whole(place, text)
    write_whole(place.with_suffix(".json"), json.dumps(data, indent=2) + "\n")


def _line(row: Row) -> str:
    kind = {"ms": "ms", "rps": "throughput", "share": "error_rate"}[row.unit]
    figures = f"{formatted(kind, row.base)} | {formatted(kind, row.new)}"
    sign = "≥" if row.unit == "rps" else "≤"
    said = "better" if row.better and row.verdict == "no worse" else str(row.verdict)
    said = f"**{said}**" if row.verdict == "worse" else said
    interval = "-" if math.isnan(row.change.low) else f"{_ratio(row.change.low)} to {_ratio(row.change.high)}"
    note = f" ({row.note})" if row.note else ""
    ratios = f"{_ratio(row.change.ratio)} | {interval} | {sign} {row.allowed:.2f}"
    return f"| {row.name} | {figures} | {ratios} | {said}{note} |"


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.3f}"


def as_json(comparison: Comparison, sides: tuple[Side, Side], machine: dict[str, Any]) -> dict[str, Any]:
    """For machines; what is no number is null."""
    data = asdict(comparison) | {"verdict": comparison.verdict, "machine": machine}
    data |= {side.name: side.given for side in sides}
    return json.loads(json.dumps(data), parse_constant=lambda _: None)


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m loadtests.compare_runs")
    add_model_arguments(parser)
    parser.add_argument("--base", required=True, help="repository, <model>/<version> or folder of runs")
    parser.add_argument("--new", required=True, help="what is held against it, of the same kinds")
    parser.add_argument("--repository", default="model_repository", help="of versions (default: %(default)s)")
    parser.add_argument(
        "--target", choices=get_args(Target), default="onnxruntime", help="whose SLO (default: %(default)s)"
    )
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, help="requests/s of the latencies (default: the SLO's, or 70%% of base's capacity)"
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"{LEAST_PAIRS} or more (default: %(default)s)")
    parser.add_argument("--duration-s", type=float, default=30, help="of a run, ladder included (default: %(default)s)")
    parser.add_argument("--warmup-s", type=float, default=2, help="of each run (default: %(default)s)")
    add_timeout_argument(parser)
    parser.add_argument(
        "--max-s", type=float, default=1200, help="longest time in all; fewer pairs fit (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold", type=float, default=5, help="%% that p50 and capacity may lose (default: %(default)s)"
    )
    parser.add_argument("--threshold-p99", type=float, default=10, help="%% that p99 may lose (default: %(default)s)")
    parser.add_argument(
        "--no-capacity", dest="capacity", action="store_false", help="latencies alone: no ladder, half the time"
    )
    parser.add_argument("--inputs", help="file of real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument(
        "--server", default=EMBEDDED, help="command with {repository}, {http_port}, {grpc_port}, {metrics_port}"
    )
    parser.add_argument("--output", help="Markdown file (default: build/<model>/compare-runs.md)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    for name in ("rate", "duration_s", "timeout_s", "max_s", "threshold", "threshold_p99"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value:g}: it must be more than 0")
    if not 0 <= args.warmup_s < math.inf:
        raise InputError(f"--warmup-s {args.warmup_s:g}: it must be 0 or more")
    if args.output and Path(args.output).suffix == ".json":
        raise InputError(f"--output {args.output}: the Markdown file; the figures go beside it, as .json")
    if args.pairs < LEAST_PAIRS:
        raise InputError(f"--pairs {args.pairs}: {LEAST_PAIRS} or more are needed for an interval")
    return args


def main() -> int:
    """Measures or reads, judges, writes, prints."""
    args = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the servers end, too
    base, new = (
        side_of(name, getattr(args, name).strip(), args.model, Path(args.repository)) for name in ("base", "new")
    )
    if base.recorded != new.recorded:
        raise InputError(
            "one of BASE= and NEW= is a folder of runs, the other is not; what is compared is measured alike"
        )
    spec = DeploymentSpec.of_model(args.model, args.models).for_target(args.target)
    place = Path(args.output) if args.output else build_dir(args.model) / "compare-runs.md"
    try:
        if base.recorded:
            runs = base.load_runs(args.model), new.load_runs(args.model)
        else:
            runs = measured((base, new), args, spec)
        wanted = args.capacity and not base.recorded
        comparison = compare(*runs, spec.slo, thresholds_of(args), capacity=wanted)
    except (GateFailed, InvalidMeasurement) as error:
        _write(place, *without_figures(error, (base, new), args.model))
        raise
    machine = runs[0][0].machine
    text = markdown(comparison, (base, new), args.model, machine)
    data = as_json(comparison, (base, new), machine)
    _write(place, text, data)
    print(json.dumps(data, indent=2) if args.json else f"{text}\n{place}")
    return EXIT_CODES[comparison.verdict]


if __name__ == "__main__":
    run_command(main)
