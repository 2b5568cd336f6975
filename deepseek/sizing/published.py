"""Checks predictions against published TensorRT figures, and fits the roofline's constants to a part of them.

Contract: reads `published.tsv` (NVIDIA's own figures, with their source). The constants in `roofline.py` and the
efficiencies in devices.toml are fitted to BERT-base at batches 1, 8, 32 and 128; every other batch, and all of
BERT-large, is held out. Where several tables have the same device and type, the newest is fitted and judged, and the
others are shown beside it. Exit 1 where a held-out figure at batch 8 or above is missed by more than --worst.

Examples:
    python -m deepseek.sizing.published                       # predicted against published, by device and precision
    python -m deepseek.sizing.published --table --device l4   # each figure
    python -m deepseek.sizing.published --fit                 # the constants anew (needs scipy)
    python -m deepseek.sizing.published --chart docs/plan/published.svg
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepseek.sizing.charts import scatter_chart
from deepseek.sizing.counting import presets
from deepseek.sizing.devices import Device, load_devices, read_devices
from deepseek.sizing.roofline import CONSTANTS, Constants, efficiency, of_ops
from deepseek.spec import GateFailed, InputError, Parser, run_command
from deepseek.spec.folders import write_whole

FITTED_MODEL, FITTED_BATCHES = "bert-base", (1, 8, 32, 128)
OLDER = {
    "examples-7.0": "older engines (TensorRT 7.0)",
    "triton-21.10": "engines from ONNX (Triton 21.10)",
}
SMALL = 8  # the goal is stated from this batch on
GOAL = 0.25


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published latency."""

    device: str
    model: str
    precision: str
    length: int
    batch: int
    latency_ms: float
    release: str

    @property
    def older(self) -> bool:
        """Whether a newer table has the same device and type."""
        return self.release in OLDER and self.precision != "fp32"

    @property
    def fitted(self) -> bool:
        """Whether the constants were fitted to it."""
        return self.model == FITTED_MODEL and self.batch in FITTED_BATCHES and not self.older

    @property
    def key(self) -> tuple[str, str]:
        return self.device, self.precision


@cache
def figures() -> tuple[Figure, ...]:
    """All published figures."""
    text = (files("deepseek.sizing") / "published.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t")
    return tuple(
        Figure(
            device=row["device"],
            model=row["model"],
            precision=row["precision"],
            length=int(row["length"]),
            batch=int(row["batch"]),
            latency_ms=float(row["latency_ms"]),
            release=row["release"],
        )
        for row in rows
    )


def predicted_ms(figure: Figure, device: Device, constants: Constants = CONSTANTS, share: float | None = None) -> float:
    """What the roofline says of a published figure."""
    ops = presets()[figure.model].ops(figure.batch, figure.length)
    found = of_ops(ops, device, precision=figure.precision, batch=figure.batch, constants=constants, share=share)
    return found.latency_s * 1e3


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors of predictions, as shares."""

    count: int
    median: float
    worst: float
    within_goal: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Errors:
        errors = sorted(abs(value) for value in values)
        if not errors:
            raise InputError("no published figure is among those asked for")
        within = sum(error <= GOAL for error in errors)
        return cls(count=len(errors), median=statistics.median(errors), worst=errors[-1], within_goal=within)


def held_out(figure: Figure, *, small: bool = False) -> bool:
    """Whether the constants never saw it, and it is of a batch of 8 or more (or, with `small`, of less)."""
    return not figure.fitted and not figure.older and (figure.batch < SMALL) == small


def _is_held_out_of(key: tuple[str, str], figure: Figure) -> bool:
    return figure.key == key and held_out(figure)


def _is_of_release(device: str | None, release: str, figure: Figure) -> bool:
    wanted = figure.older and figure.release == release and figure.batch >= SMALL
    return wanted and device in (None, figure.device)


def errors(keep: Callable[[Figure], bool], devices: dict[str, Device]) -> Errors:
    """Errors of the figures kept."""
    kept = [figure for figure in figures() if keep(figure)]
    return Errors.of(predicted_ms(figure, devices[figure.device]) / figure.latency_ms - 1 for figure in kept)


def errors_unseen(devices: dict[str, Device]) -> Errors:
    """What to expect of a device without published figures: each predicted with the median efficiency of the others.

    Of types that three devices or more have figures of: a median of one is none.
    """
    newest = [figure for figure in figures() if not figure.older]
    chips = {figure.key: efficiency(devices[figure.device], figure.precision)[0] for figure in newest}
    found = []
    for figure in newest:
        if figure.batch >= SMALL:
            others = [
                share for (device, precision), share in chips.items()
                if device != figure.device and precision == figure.precision
            ]  # fmt: skip
            if len(others) > 1:
                share = statistics.median(others)
                found.append(predicted_ms(figure, devices[figure.device], share=share) / figure.latency_ms - 1)
    return Errors.of(found)


def fit(devices: dict[str, Device]) -> tuple[Constants, dict[tuple[str, str], float]]:
    """The constants and efficiencies that come nearest to the fitted figures: least squares of log ratios, softened."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise InputError("--fit needs scipy; install it with: pip install scipy") from None
    import numpy as np

    chosen = [figure for figure in figures() if figure.fitted]
    keys = sorted({figure.key for figure in chosen})

    def read(x: np.ndarray) -> tuple[Constants, dict[tuple[str, str], float]]:
        names = [each.name for each in fields(Constants)]
        constants = Constants(**dict(zip(names, map(float, x[: len(names)]), strict=True)))
        return constants, dict(zip(keys, map(float, x[len(names) :]), strict=True))

    def residuals(x: np.ndarray) -> list[float]:
        constants, shares = read(x)
        ratios = [
            predicted_ms(each, devices[each.device], constants, shares[each.key]) / each.latency_ms for each in chosen
        ]
        return np.log(ratios).tolist()

    start = np.array([3, 0.8, 2000, 0.3, 0.8, *[0.6] * len(keys)])
    low = np.array([0.3, 0.5, 1, 0.02, 0.02, *[0.1] * len(keys)])
    high = np.array([15, 0.95, 60_000, 1, 1, *[1.0] * len(keys)])
    found = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, x_scale=start)
    return read(found.x)


def main() -> int:
    """Prints predicted against published."""
    parser = Parser(__doc__, prog="python -m deepseek.sizing.published")
    parser.add_argument("--devices", help="a file of devices in place of deepseek/devices.toml")
    parser.add_argument("--device", help="of one device alone")
    parser.add_argument("--table", action="store_true", help="print every figure")
    parser.add_argument("--fit", action="store_true", help="fit the constants anew, and print them")
    parser.add_argument("--worst", type=float, default=GOAL, help="largest error allowed (default: %(default)s)")
    parser.add_argument("--chart", type=Path, help="draw predicted against published as an SVG file")
    parser.add_argument("--json", action="store_true", help="print the errors as JSON")
    args = parser.parse_args()
    devices = read_devices(Path(args.devices)) if args.devices else load_devices()
    missing = sorted({figure.device for figure in figures()} - devices.keys())
    if missing and not args.device:
        raise InputError(f"{args.devices}: no device {missing[0]!r}, of which figures are published")
    if args.fit:
        _print_fit(devices)
        return 0
    known = sorted({figure.device for figure in figures() if not figure.older})
    if args.device and args.device not in known:
        raise InputError(f"--device: seen {args.device!r}; figures are published of {', '.join(known)}")
    rows = summary(devices, args.device)
    if args.json:
        print(json.dumps({name: vars(each) for name, each in rows.items()}, indent=2))
    else:
        _print(rows, devices, args.device if args.table else None, args.table)
    if args.chart:
        write_whole(args.chart, _chart(devices))
    held = rows["held out, batch >= 8"]
    if held.worst > args.worst:
        raise GateFailed(f"a held-out figure is missed by {held.worst:.1%}; at most {args.worst:.0%} is allowed")
    return 0


def summary(devices: dict[str, Device], only: str | None = None) -> dict[str, Errors]:
    """Errors by what is looked at."""

    def looked_at(each: Figure) -> bool:
        return only in (None, each.device)

    rows = {
        "held out, batch >= 8": errors(lambda each: looked_at(each) and held_out(each), devices),
        "held out, batch < 8": errors(lambda each: looked_at(each) and held_out(each, small=True), devices),
        "fitted": errors(lambda each: looked_at(each) and each.fitted, devices),
    }
    for release, name in OLDER.items():
        if any(looked_at(each) and each.older and each.release == release for each in figures()):
            rows[f"{name}, batch >= 8"] = errors(partial(_is_of_release, only, release), devices)
    for key in sorted({figure.key for figure in figures() if looked_at(figure) and not figure.older}):
        of_key = partial(_is_held_out_of, key)
        rows[f"{key[0]} {key[1]}, held out, batch >= 8"] = errors(of_key, devices)
    if only is None:
        rows["as an unknown device, batch >= 8"] = errors_unseen(devices)
    return rows


def _print(rows: dict[str, Errors], devices: dict[str, Device], only: str | None, table: bool) -> None:
    console = Console(highlight=False, markup=False)
    shown = Table("figures", "count", "median error", "worst", f"within {GOAL:.0%}", box=None, pad_edge=False)
    for name, each in rows.items():
        shown.add_row(name, str(each.count), f"{each.median:.1%}", f"{each.worst:.1%}", str(each.within_goal))
    console.print(shown)
    if table:
        listing = Table("device", "model", "type", "length", "batch", "published", "predicted", "error", box=None)
        for figure in figures():
            if only in (None, figure.device):
                found = predicted_ms(figure, devices[figure.device])
                cells = (figure.device, figure.model, figure.precision, str(figure.length), str(figure.batch))
                error = found / figure.latency_ms - 1
                listing.add_row(*cells, f"{figure.latency_ms:.2f} ms", f"{found:.2f} ms", f"{error:+.0%}")
        console.print(listing)


def _print_fit(devices: dict[str, Device]) -> None:
    constants, shares = fit(devices)
    for name, value in vars(constants).items():
        print(f"{name:<22} {value:.4g}")
    for (device, precision), share in shares.items():
        print(f"{device + ' ' + precision:<22} {share:.3f}")


def _chart(devices: dict[str, Device]) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for each in figures():
        name = "older engines" if each.older else each.device.removesuffix("-16").removesuffix("-32")
        points.setdefault(name, []).append((each.latency_ms, predicted_ms(each, devices[each.device])))
    title = "Latency of BERT in TensorRT: predicted against published"
    return scatter_chart(points, title=title, unit="ms", x_label="published", y_label="predicted", band=GOAL)


if __name__ == "__main__":
    run_command(main)
