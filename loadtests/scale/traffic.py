"""A day of traffic, from a file or a named shape.

Contract: one rate for each tick of TICK_S seconds; the same arguments give the same rates. A file is CSV with the
header `seconds,rate_rps`: each rate lasts until the next line's time, the last one as long as the one before it. The
shapes are scaled to a peak: a working day (quiet at four, peaks at noon and in the evening), the same day with a spike,
a launch, and a flat line. Each carries a few per cent of noise that changes over minutes.

Example:
    rates = shape_of_day("day", peak_rps=4000, seed=1)     # 17280 rates
    rates = read_traffic(Path("monday.csv"))
"""

import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from deepseek.spec import InputError

TICK_S = 5
DAY_S = 86400
MOST_S = 31 * DAY_S
Shape = Literal["day", "spike", "launch", "flat"]
NIGHT = 0.15  # of the peak
NOISE = 0.03  # of the rate, standard deviation
NOISE_S = 120  # its correlation time
SPIKE, SPIKE_AT_H, SPIKE_S = 3.0, 15.0, 600  # times the rate, o'clock, seconds
LAUNCH_AT_H, LAUNCH_BEFORE = 12.0, 0.2


def shape_of_day(shape: Shape, peak_rps: float, seed: int = 0) -> np.ndarray:
    """Rates in requests/s; the highest is about `peak_rps` (for "spike": outside the spike)."""
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
    """A bell curve around an hour, which wraps around midnight."""
    apart = np.abs(hours - at)
    return np.exp(-0.5 * (np.minimum(apart, 24 - apart) / width) ** 2)


def _noise(count: int, seed: int) -> np.ndarray:
    """Autocorrelated noise with mean 0 and standard deviation 1."""
    from scipy.signal import lfilter  # a second; only invented traffic needs it

    kept = math.exp(-TICK_S / NOISE_S)
    steps = np.random.default_rng(seed).standard_normal(count) * math.sqrt(1 - kept**2)
    return lfilter([1.0], [1.0, -kept], steps)


def read_traffic(path: Path) -> np.ndarray:
    """Rates in requests/s from a file; InputError if it cannot be read or is invalid."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.partition("#")[0].strip()]
        head = [cell.strip() for cell in lines[0].split(",")] if lines else []
        if head != ["seconds", "rate_rps"]:
            raise ValueError(f"line 1: seen {','.join(head)!r} instead of seconds,rate_rps")
        if len(lines) < 3:
            raise ValueError(f"{len(lines) - 1} rates; at least two are needed")
        times, rates = np.loadtxt(lines[1:], delimiter=",", usecols=(0, 1), unpack=True)
    except (OSError, ValueError) as error:
        why, shapes = getattr(error, "strerror", None) or error, ", ".join(get_args(Shape))
        raise InputError(f"{path}: {why}; give a CSV file or one of the shapes {shapes}") from None
    steps_s = np.diff(times)
    may_sum = float(rates.max()) * len(rates) * MOST_S < math.inf
    if not (np.isfinite(times).all() and may_sum and (rates >= 0).all()):
        raise InputError(f"{path}: a rate is negative, or a number is too large or none; rates must be 0 or more")
    if (steps_s <= 0).any():
        early = int(np.argmax(steps_s <= 0))
        raise InputError(f"{path}: seconds must increase: {times[early + 1]:g} follows {times[early]:g}")
    edges = np.append(times, times[-1] + steps_s[-1]) - times[0]
    if edges[-1] > MOST_S:
        raise InputError(f"{path}: {edges[-1] / DAY_S:.0f} days; at most {MOST_S // DAY_S} are allowed")
    # The mean over each tick, so that load within a tick counts.
    requests = np.concatenate([[0.0], np.cumsum(rates * np.diff(edges))])
    count = max(1, math.ceil(round(edges[-1] / TICK_S, 6)))  # a rounding error must not add a tick
    ticks = np.append(TICK_S * np.arange(count), edges[-1])
    return np.diff(np.interp(ticks, edges, requests)) / np.diff(ticks)
