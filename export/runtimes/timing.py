"""Times variants in turn and compares them: faster, slower or not distinguishable. One rule for CPUs and GPUs.

Contract: a timer runs a variant and returns the seconds that count. On a CPU that is the whole call; a TensorRT engine
times itself with CUDA events (`export.runtimes.tensorrt_predictor`). Each round calls every timer once, so that noise
affects all alike, and ratios compare seconds of one round. The order changes from round to round, because a call finds
the caches as the one before it left them. A variant is faster (or slower) if it is so in three of four rounds;
otherwise the difference is within the noise.
"""

import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Timer = Callable[[], float]
"""Runs a variant; returns seconds."""
# Rounds: as many as fit in TIMING_S, within these limits.
TIMING_S = 3.0
LEAST_ROUNDS, MOST_ROUNDS = 9, 300


def wall(run: Callable[[], object]) -> Timer:
    """A timer of the whole call."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def time_interleaved(timers: Mapping[str, Timer]) -> dict[str, list[float]]:
    """Seconds of each round, by name; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    order = random.Random(0)
    for timer in timers.values():
        timer()
    started = time.monotonic()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.monotonic() - started > TIMING_S:
            break
        for name in order.sample(list(timers), len(timers)):
            seconds[name].append(timers[name]())
    return seconds


@dataclass(frozen=True, kw_only=True)
class SpeedComparison:
    """One variant's speed against another's."""

    result: Literal["faster", "slower", "not distinguishable"]
    ratio: float
    """Median speedup over the rounds."""


def compared(own: Sequence[float], base: Sequence[float]) -> SpeedComparison:
    """Compares the seconds of two variants in the same rounds."""
    ratios = sorted(slow / fast for slow, fast in zip(base, own, strict=True))
    quarter = len(ratios) // 4
    result: Literal["faster", "slower", "not distinguishable"] = "not distinguishable"
    if ratios[quarter] > 1:
        result = "faster"
    elif ratios[-1 - quarter] < 1:
        result = "slower"
    return SpeedComparison(result=result, ratio=statistics.median(ratios))


def clocks() -> str:
    """Clocks of the first GPU now, its highest ones, and why it is throttled; "" without one."""
    query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,clocks_event_reasons.active"
    try:
        run = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    parts = [part.strip() for part in run.stdout.splitlines()[0].split(",")] if run.stdout else []
    if run.returncode or len(parts) != 5:
        return ""
    sm, memory, most_sm, most_memory, throttled = parts
    return f"SM {sm} of {most_sm}, memory {memory} of {most_memory}, throttle reasons {throttled}"
