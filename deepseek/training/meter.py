"""Metrics of a run, step by step: curves of bounded size, time spent waiting for data, exploding losses.

Contract: the state is plain values, so a checkpoint can hold it and a resumed run continues its curves. A curve has at
most `MOST` points: when it is full, pairs of points are merged. Only the time of training steps counts, not that of
validation and checkpoints.
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

MOST = 512  # points of a curve
STARVED = 0.2  # a larger share of the time spent waiting for data is reported
WINDOW = 16  # steps whose median is the level of the loss: a few bad rows do not change it
Item = TypeVar("Item")


class Meter:
    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.stride = 1  # steps per point
        self._open: list[dict[str, float]] = []  # steps of the next point
        self._waited_s = self._spent_s = 0.0
        self._began: float | None = None

    def state(self) -> dict[str, Any]:
        return {"points": self.points, "stride": self.stride, "open": self._open}

    def load(self, state: dict[str, Any]) -> None:
        self.points, self.stride, self._open = state["points"], state["stride"], state["open"]

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yields the batches, and measures how long each took to arrive."""
        iterator = iter(batches)
        self._began = None
        while True:
            self._pass()
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - asked
            yield batch

    def _pass(self) -> None:
        now = time.perf_counter()
        if self._began is not None:
            self._spent_s += now - self._began
        self._began = now

    def step(self, **values: float) -> None:
        """Ends a step: `step`, `loss`, `learning_rate`, `gradient_norm`, `rows`, `memory_bytes`."""
        self._pass()
        self._open.append(values | {"seconds": self._spent_s, "waited_s": self._waited_s})
        self._waited_s = self._spent_s = 0.0
        self._began = None  # time until the next batch is requested does not count
        if len(self._open) == self.stride:
            self.points.append(_merged(self._open))
            self._open = []
        if len(self.points) == MOST:
            self.points = [_merged(self.points[at : at + 2]) for at in range(0, MOST, 2)]
            self.stride *= 2

    @property
    def curve(self) -> list[dict[str, float]]:
        """All points, including the unfinished one."""
        return [*self.points, _merged(self._open)] if self._open else list(self.points)

    def _sum(self, name: str) -> float:
        return math.fsum(point[name] for point in self.curve)

    @property
    def seconds(self) -> float:
        return self._sum("seconds")

    @property
    def data_share(self) -> float:
        """Share of the time of training steps spent waiting for the next batch."""
        return self._sum("waited_s") / self.seconds if self.seconds else 0.0

    @property
    def rows_per_s(self) -> float:
        return self._sum("rows") / self.seconds if self.seconds else 0.0

    @property
    def peak_memory_bytes(self) -> int:
        return int(max((point["memory_bytes"] for point in self.curve), default=0))

    def starved(self, workers: int) -> str | None:
        """A one-line warning if the model waits for data; None if it hardly waits."""
        if self.data_share <= STARVED:
            return None
        cure = "raise num_workers (seen 0)" if workers == 0 else f"raise num_workers (seen {workers}), or read faster"
        return f"the model waited for data {self.data_share:.0%} of the time: {cure}"


def _merged(points: list[dict[str, float]]) -> dict[str, float]:
    """Merges points: sums of rows and times, mean loss, largest norm and memory, last step and learning rate."""
    last = points[-1]
    found = {name: math.fsum(point[name] for point in points) for name in ("rows", "seconds", "waited_s")}
    found["loss"] = statistics.fmean(point["loss"] for point in points)
    found |= {name: max(point[name] for point in points) for name in ("gradient_norm", "memory_bytes")}
    return found | {"step": last["step"], "learning_rate": last["learning_rate"]}


class LossWatch:
    """Detects an exploding loss: the median over 16 steps exceeds `factor` times the median of the first 16."""

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.level: float | None = None
        self.limit = math.inf
        self.usual_norm = self.largest_norm = 0.0
        self.largest_at = 0

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "factor"}

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def see(self, step: int, loss: float, norm: float) -> str | None:
        """Records a step; returns a description if the loss has exploded, else None."""
        self.losses = [*self.losses[1 - WINDOW :], loss]
        if norm > self.largest_norm:
            self.largest_norm, self.largest_at = norm, step
        if self.factor is None:
            return None
        if len(self.losses) < WINDOW:
            self.norms.append(norm)
            return None
        now = statistics.median(self.losses)
        if self.level is None:
            self.level, self.usual_norm, self.norms = now, statistics.median([*self.norms, norm]), []
            scale = abs(now) or max(self.losses) - min(self.losses)
            self.limit = now + (self.factor - 1) * scale if scale else math.inf
        if now <= self.limit:
            return None
        times = f", {now / self.level:.0f} times" if self.level > 0 else ", from"
        return (
            f"the loss exploded to {now:.3g}{times} its initial {self.level:.3g} (medians of {WINDOW} steps); the "
            f"largest gradient norm was {self.largest_norm:.3g}, at step {self.largest_at}, and the median "
            f"{self.usual_norm:.3g}"
        )


def cure(clip_norm: float | None, usual_norm: float) -> str:
    if clip_norm is None or clip_norm > 10 * max(usual_norm, 1e-12):
        seen = "not clipped" if clip_norm is None else f"clipped only at {clip_norm:g}"
        return f"Gradients were {seen}: set clip_norm=1.0, and check the rows of that step"
    return (
        f"Gradients were clipped at {clip_norm:g}, so single steps are not the cause: lower the learning rate, or "
        "raise warmup_fraction, and look for huge values in the data"
    )
