"""Predicts the p99 of serving settings from measured batches, without serving them.

Contract: a prediction is the p99 of a simulated queue under Poisson arrivals of the smallest requests: an instance that
is free takes up to `max_batch` waiting rows, waits for a core if all are busy, and computes as long as the curve says,
plus what the batch and its requests cost the server. A model that takes texts computes in parts, and answers each at
once. What the default answers in a closed loop says how much slower the served model is than the measured one.
Predictions rank settings and promise nothing. Layouts with as many batches at once, and as many threads for each, share
a curve.

Example:
    curves = Curves.measured(conditions, settings, cores=2)
    curves.p99_ms(settings[0], 120.0)
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from deepseek.spec import BATCH
from deepseek.spec.checks import checked
from deepseek.spec.files.batching_plan import KEPT_THROUGHPUT, batching_of
from deepseek.spec.files.measured_batches import MeasuredBatches, read_measured
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
    rows_each: int = 1
    """Rows of a request."""

    @classmethod
    def measured(cls, conditions: TuneConditions, settings: Iterable[ServingSettings], cores: int) -> "Curves | None":
        """Measures a curve for each kind of layout, in about ten seconds each; None if the target has none."""
        spec, path = conditions.spec, conditions.folder / "curve.json"
        plan = batching_of(spec, read_measured(spec.name, "onnxruntime"), conditions.precision)
        run_rows = plan.run_rows if spec.text else None  # without texts: all that is joined
        found = cls({}, cores, run_rows=run_rows, rows_each=spec.axes[BATCH].min)
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

    def as_fast_as(self, settings: ServingSettings, throughput_rps: float, users: int) -> "Curves":
        """The same curves on a machine that answers `throughput_rps` requests/s to `users` users in a closed loop."""
        return replace(self, slower=self.slower * self.throughput_rps(settings, users) / throughput_rps)

    @property
    def sizes(self) -> list[int]:
        return sorted({point.rows for curve in self.of.values() for point in curve.times})

    def throughput_rps(self, settings: ServingSettings, users: int | None = None) -> float:
        """Most requests/s; of `users` in a closed loop, who never fill larger batches than they can send."""
        curve, each = self.of[self._key(settings)], self.rows_each
        most = min(self._at_once(settings), -(-users // curve.at_once) if users else self._at_once(settings))
        return max(curve.requests_per_s(each * count, each) for count in range(1, most + 1)) / self.slower

    def _at_once(self, settings: ServingSettings) -> int:
        """Requests that run at once."""
        return min(settings.max_batch, self.run_rows or settings.max_batch) // self.rows_each

    def keeping_throughput(self, settings: Iterable[ServingSettings]) -> list[ServingSettings]:
        """Those that keep KEPT of the best throughput of them."""
        found = {each: self.throughput_rps(each) for each in settings}
        best = max(found.values(), default=0.0)
        return [each for each, throughput in found.items() if throughput >= KEPT * best]

    def p99_ms(self, settings: ServingSettings, rate_rps: float) -> float:
        curve, each, most = self.of[self._key(settings)], self.rows_each, settings.max_batch // self.rows_each
        batch_s = [self.slower * curve.joined_ms(each * count, each) / 1000 for count in range(1, most + 1)]
        arrived = np.random.default_rng(0).exponential(1 / rate_rps, ARRIVALS).cumsum().tolist()
        free, cores, taken, waited = [0.0] * settings.instances, [0.0] * curve.at_once, 0, list[float]()
        while taken < ARRIVALS:
            formed = max(heapq.heappop(free), arrived[taken])
            if settings.max_queue_delay_us and taken + most <= ARRIVALS:
                full = arrived[taken + most - 1]
                formed = max(formed, min(full, arrived[taken] + settings.max_queue_delay_us / 1e6))
            count = 1
            while count < most and taken + count < ARRIVALS and arrived[taken + count] <= formed:
                count += 1
            done = max(formed, heapq.heappop(cores))
            parts = -(-count // self._at_once(settings))
            for part in range(parts):
                first, end = taken + part * count // parts, taken + (part + 1) * count // parts
                done += batch_s[end - first - 1]
                waited += [done - begin for begin in arrived[first:end]]
            heapq.heappush(free, done)
            heapq.heappush(cores, done)
            taken += count
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
