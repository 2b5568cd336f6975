"""A day of traffic: from a file, or of a named shape.

Contract: a rate for each tick of TICK_S seconds, the same for the same arguments. A file is CSV with the header
`seconds,rate_rps`: each rate holds until the next line's time, the last one as long as the one before it. The shapes
are a working day (quiet at four, peaks at noon and in the evening), the same with a spike, a launch, and a flat line,
scaled to a peak; a few per cent of noise that lasts some minutes lies on each.

Example:
    rates = shape_of_day("day", peak_rps=4000, seed=1)     # 17280 rates
    rates = read_traffic(Path("monday.csv"))
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Literal

import numpy as np

from deepseek.spec import InputError

TICK_S = 5
DAY_S = 86400
MOST_S = 31 * DAY_S
Shape = Literal["day", "spike", "launch", "flat"]
NIGHT = 0.15  # of the peak
NOISE = 0.03  # of the rate, standard deviation
NOISE_S = 120  # how long it lasts
SPIKE, SPIKE_AT_H, SPIKE_S = 3.0, 15.0, 600  # times the rate, o'clock, seconds
LAUNCH_AT_H, LAUNCH_BEFORE = 12.0, 0.2


def shape_of_day(shape: Shape, peak_rps: float, seed: int = 0) -> np.ndarray:
    """Rates in requests/s, of which the highest is about `peak_rps` (of a spike: before the spike)."""
    hours = np.arange(0, DAY_S, TICK_S) / 3600
    if shape in ("day", "spike"):
        level = NIGHT + 0.75 * _hump(hours, 13, 3.5) + 0.8 * _hump(hours, 20, 2.2)
        level /= level.max()
    elif shape == "launch":
        level = np.where(hours < LAUNCH_AT_H, LAUNCH_BEFORE, 1.0)
    else:
        level = np.ones_like(hours)
    if shape == "spike":
        level = level * np.where((hours >= SPIKE_AT_H) & (hours < SPIKE_AT_H + SPIKE_S / 3600), SPIKE, 1.0)
    return peak_rps * level * np.clip(1 + NOISE * _noise(len(hours), seed), 0, None)


def _hump(hours: np.ndarray, at: float, width: float) -> np.ndarray:
    """A bell around an hour, across midnight, too."""
    apart = np.abs(hours - at)
    return np.exp(-0.5 * (np.minimum(apart, 24 - apart) / width) ** 2)


def _noise(count: int, seed: int) -> np.ndarray:
    """Of mean 0 and deviation 1, each value near the one before."""
    kept = math.exp(-TICK_S / NOISE_S)
    steps = np.random.default_rng(seed).standard_normal(count) * math.sqrt(1 - kept**2)
    found, value = np.empty(count), 0.0
    for index, step in enumerate(steps):
        value = kept * value + step
        found[index] = value
    return found


def read_traffic(path: Path) -> np.ndarray:
    """Rates in requests/s from a file; InputError in one line with its number where it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}; it must be a CSV file") from None
    if not rows or [cell.strip() for cell in rows[0]] != ["seconds", "rate_rps"]:
        raise InputError(
            f"{path}: line 1: seen {','.join(rows[0]) if rows else 'nothing'!r}; it must be seconds,rate_rps"
        )
    times: list[float] = []
    rates: list[float] = []
    for line, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        time_s, rate = _numbers(path, line, row)
        if times and time_s <= times[-1]:
            raise InputError(f"{path}: line {line}: {time_s:g} s does not come after {times[-1]:g} s")
        times.append(time_s)
        rates.append(rate)
    if len(times) < 2:
        raise InputError(f"{path}: {len(times)} rates; it takes two or more")
    end_s = times[-1] + times[-1] - times[-2]
    if end_s - times[0] > MOST_S:
        raise InputError(f"{path}: {(end_s - times[0]) / DAY_S:.0f} days; at most {MOST_S // DAY_S} are replayed")
    # The mean of each tick: what comes and goes within one is load all the same.
    edges = np.array([*times, end_s])
    requests = np.concatenate([[0.0], np.cumsum(np.array(rates) * np.diff(edges))])
    ticks = np.append(np.arange(times[0], end_s, TICK_S), end_s)
    return np.diff(np.interp(ticks, edges, requests)) / np.diff(ticks)


def _numbers(path: Path, line: int, row: list[str]) -> tuple[float, float]:
    try:
        time_s, rate = map(float, row)
    except ValueError:
        raise InputError(f"{path}: line {line}: seen {','.join(row)!r}; it must be two numbers") from None
    if not (math.isfinite(time_s) and math.isfinite(rate) and rate >= 0):
        raise InputError(f"{path}: line {line}: seen {','.join(row)!r}; a rate is 0 or more, and both are finite")
    return time_s, rate
