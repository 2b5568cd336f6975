"""Compares predicted latencies with NVIDIA's published TensorRT figures (`published.tsv`), and fits the constants.

The constants in `deepseek/sizing/roofline.py` and the efficiencies in devices.toml are fitted to BERT-base at batches 1,
8, 32 and 128; every other batch, and all of BERT-large, is held out. If several tables have the same device and type,
the newest is fitted and judged, and the others are only shown.

Examples:
    python -m tests.bench.published
    python -m tests.bench.published --fit
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from deepseek.sizing import presets
from deepseek.sizing.devices import Device, load_devices
from deepseek.sizing.roofline import CONSTANTS, Constants, efficiency, of_ops
from deepseek.spec.command import exit_code

FITTED_MODEL, FITTED_BATCHES = "bert-base", (1, 8, 32, 128)
OLDER = {
    "examples-7.0": "older engines (TensorRT 7.0)",
    "triton-21.10": "engines from ONNX (Triton 21.10)",
}
SMALL = 8  # the goal applies from this batch size
GOAL = 0.25


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published latency."""

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
    def held_out(self) -> bool:
        return not self.fitted and not self.older

    @property
    def key(self) -> tuple[str, str]:
        return self.device, self.precision


@cache
def figures() -> tuple[Figure, ...]:
    """All published figures."""
    lines = Path(__file__).with_name("published.tsv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader((line for line in lines if not line.startswith("#")), delimiter="\t")
    kinds = {"length": int, "batch": int, "latency_ms": float}
    names = [field.name for field in fields(Figure)]
    return tuple(Figure(**{name: kinds.get(name, str)(row[name]) for name in names}) for row in rows)


def predicted_ms(figure: Figure, device: Device, constants: Constants = CONSTANTS, share: float | None = None) -> float:
    """The roofline's prediction for a published figure."""
    ops = presets()[figure.model].ops(figure.batch, figure.length)
    found = of_ops(ops, device, precision=figure.precision, constants=constants, share=share)
    return found.latency_s * 1e3


def errors(keep: Callable[[Figure], bool], devices: dict[str, Device]) -> list[float]:
    """Relative errors of the figures for which `keep` is true."""
    return [predicted_ms(each, devices[each.device]) / each.latency_ms - 1 for each in figures() if keep(each)]


def errors_unseen(devices: dict[str, Device]) -> list[float]:
    """Relative errors to expect on a device without published figures.

    Each device is predicted with the median efficiency of the others, for types with figures of three devices or more.
    """
    newest = [figure for figure in figures() if not figure.older]
    shares = {figure.key: efficiency(devices[figure.device], figure.precision)[0] for figure in newest}
    found = []
    for figure in newest:
        others = [share for (name, kind), share in shares.items() if name != figure.device and kind == figure.precision]
        if figure.batch >= SMALL and len(others) > 1:
            ms = predicted_ms(figure, devices[figure.device], share=statistics.median(others))
            found.append(ms / figure.latency_ms - 1)
    return found


def summary(devices: dict[str, Device]) -> dict[str, list[float]]:
    """Errors by group of figures."""
    rows: dict[str, Callable[[Figure], bool]] = {
        "held out, batch >= 8": lambda each: each.held_out and each.batch >= SMALL,
        "held out, batch < 8": lambda each: each.held_out and each.batch < SMALL,
        "fitted": lambda each: each.fitted,
    }
    for release, name in OLDER.items():
        rows[f"{name}, batch >= 8"] = lambda each, of=release: (  # type: ignore[misc]
            each.older and each.release == of and each.batch >= SMALL
        )
    for key in sorted({figure.key for figure in figures() if not figure.older}):
        rows[f"{' '.join(key)}, held out, batch >= 8"] = lambda each, of=key: (  # type: ignore[misc]
            each.key == of and each.held_out and each.batch >= SMALL
        )
    found = {name: errors(keep, devices) for name, keep in rows.items()}
    return found | {"as an unknown device, batch >= 8": errors_unseen(devices)}


def fit(devices: dict[str, Device]) -> tuple[Constants, dict[tuple[str, str], float]]:
    """Fits the constants and efficiencies: robust least squares of log ratios."""
    chosen = [figure for figure in figures() if figure.fitted]
    keys = sorted({figure.key for figure in chosen})
    names = [each.name for each in fields(Constants)]

    def read(x: np.ndarray) -> tuple[Constants, dict[tuple[str, str], float]]:
        constants = Constants(**dict(zip(names, map(float, x), strict=False)))
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
    """Prints the errors; exit code 1 if a held-out figure at batch 8 or above is off by more than a quarter."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fit", action="store_true", help="fit the constants again and print them")
    args = parser.parse_args()
    devices, rows = load_devices(), summary(load_devices())
    if args.fit:
        constants, shares = fit(devices)
        for name, value in {**vars(constants), **{" ".join(key): share for key, share in shares.items()}}.items():
            print(f"{name:<22} {value:.4g}")
        return 0
    table = Table("figures", "count", "median error", "worst", f"within {GOAL:.0%}", box=None, pad_edge=False)
    for name, row in rows.items():
        sizes = [abs(error) for error in row]
        within = sum(size <= GOAL for size in sizes)
        table.add_row(name, str(len(sizes)), f"{statistics.median(sizes):.1%}", f"{max(sizes):.1%}", str(within))
    Console(highlight=False, markup=False).print(table)
    return int(max(map(abs, rows["held out, batch >= 8"])) > GOAL)


if __name__ == "__main__":
    sys.exit(exit_code(main))
