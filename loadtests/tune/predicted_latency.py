"""Predicts the p99 of serving settings from measured batches, without serving them.

Contract: a prediction is the p99 of a simulated queue under Poisson arrivals of one row each: an instance that is free
takes up to `max_batch` waiting requests, waits for a core if all are busy, and computes as long as the curve says, and
SERVER_MS more. A model that takes texts computes in parts, and answers each at once. What the default answers in a
closed loop says how much slower the served model is than the measured one. Predictions rank settings and promise
nothing. Layouts with as many batches at once, and as many threads for each, share a curve.

Example:
    curves = Curves.measured(conditions, settings, cores=2)
    curves.p99_ms(settings[0], 120.0)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from deepseek.spec.checks import checked
from deepseek.spec.files.batching_plan import KEPT_THROUGHPUT, batching_of
from deepseek.spec.files.measured_batches import SERVER_MS, MeasuredBatches, read_measured
from loadtests.tune.candidate_server import TuneConditions, run_with
from loadtests.tune.search_space import ServingSettings

ARRIVALS = 5000  # of a simulated queue
FIRST = 200  # arrivals that find an empty server, left out
KEPT = KEPT_THROUGHPUT - 0.02  # of the best throughput; curves are measured to about 2 %
BUSY = 0.9  # of the throughput: beyond, a short run measures how its queue grows
STEPS = 10  # of the bisection for a rate: to a thousandth of the throughput


@dataclass(frozen=True)
class Curves:
    """Curves by batches at once and threads of each."""

    of: dict[tuple[int, int], MeasuredBatches]
    cores: int
    slower: float = 1.0
    """Times that a batch takes longer than measured."""
    run_rows: int | None = None
    """Rows of a part, however many are joined; None: all run at once."""

    @classmethod
    def measured(cls, conditions: TuneConditions, settings: Iterable[ServingSettings], cores: int) -> Curves | None:
        """Measures a curve for each kind of layout, in about ten seconds each; None if the target has none."""
        spec, path = conditions.spec, conditions.folder / "curve.json"
        plan = batching_of(spec, read_measured(spec.name, "onnxruntime"), conditions.precision)
        found = cls({}, cores, run_rows=plan.run_rows if spec.text else None)  # without texts: all that is joined
        for each in settings:
            key = found._key(each)
            if key in found.of:
                continue
            with conditions.console.status(f"measuring batches: {key[0]} at once, {key[1]} threads each"):
                run_with(each, conditions, "measure-batches", conditions.folder, "--output", str(path))
            curve = checked(MeasuredBatches, path.read_bytes(), path)
            path.unlink()
            if not curve.times:
                return None
            found.of[key] = curve
        return found

    def _key(self, settings: ServingSettings) -> tuple[int, int]:
        """Batches at once, threads: instances with more threads than cores take turns."""
        threads = settings.threads or max(1, self.cores // settings.instances)
        return min(settings.instances, max(1, self.cores // threads)), threads

    def as_fast_as(self, settings: ServingSettings, throughput_rps: float) -> Curves:
        """The same curves on a machine that answers so many requests/s with these settings."""
        return replace(self, slower=self.slower * self.throughput_rps(settings) / throughput_rps)

    @property
    def sizes(self) -> list[int]:
        return sorted({point.rows for curve in self.of.values() for point in curve.times})

    def throughput_rps(self, settings: ServingSettings) -> float:
        curve = self.of[self._key(settings)]
        return max(map(curve.rows_per_s, range(1, self._at_once(settings) + 1))) / self.slower

    def _at_once(self, settings: ServingSettings) -> int:
        return min(settings.max_batch, self.run_rows or settings.max_batch)

    def keeping_throughput(self, settings: Iterable[ServingSettings]) -> list[ServingSettings]:
        """Those that keep KEPT of the best throughput of them."""
        found = {each: self.throughput_rps(each) for each in settings}
        best = max(found.values(), default=0.0)
        return [each for each, throughput in found.items() if throughput >= KEPT * best]

    def p99_ms(self, settings: ServingSettings, rate_rps: float) -> float:
        curve, most = self.of[self._key(settings)], settings.max_batch
        batch_s = [self.slower * (curve.ms_of(rows) + SERVER_MS) / 1000 for rows in range(1, most + 1)]
        arrived = np.random.default_rng(0).exponential(1 / rate_rps, ARRIVALS).cumsum().tolist()
        free, cores, taken, waited = [0.0] * settings.instances, [0.0] * curve.at_once, 0, list[float]()
        while taken < ARRIVALS:
            formed = max(heapq.heappop(free), arrived[taken])
            if settings.max_queue_delay_us and taken + most <= ARRIVALS:
                full = arrived[taken + most - 1]
                formed = max(formed, min(full, arrived[taken] + settings.max_queue_delay_us / 1e6))
            rows = 1
            while rows < most and taken + rows < ARRIVALS and arrived[taken + rows] <= formed:
                rows += 1
            done = max(formed, heapq.heappop(cores))
            parts = -(-rows // self._at_once(settings))
            for part in range(parts):
                first, end = taken + part * rows // parts, taken + (part + 1) * rows // parts
                done += batch_s[end - first - 1]
                waited += [done - each for each in arrived[first:end]]
            heapq.heappush(free, done)
            heapq.heappush(cores, done)
            taken += rows
        return 1000 * float(np.percentile(waited[FIRST:], 99))

    def highest_rps(self, settings: ServingSettings, limit_ms: float | None) -> float:
        """The highest rate up to BUSY with a predicted p99 within the limit, if there is one."""
        low, high = 0.0, BUSY * self.throughput_rps(settings)
        if limit_ms is None or self.p99_ms(settings, high) <= limit_ms:
            return high
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.p99_ms(settings, middle) <= limit_ms else (low, middle)
        return low or high
