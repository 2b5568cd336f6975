"""The batching and queue that follow from how long batches take, and from the SLO.

Contract: `batching_of` turns a measurement and the SLO into the values of `config.pbtxt`. A value that `deploy.toml` or
tuned.toml sets wins. Imported where a plan is made, so that a change of the arithmetic rebuilds no graph.

The arithmetic, with L the SLO's p99, t(b) the time of a batch of b rows, and n the batches that run at once:

- `run_rows` is the smallest b that keeps 97 % of the best throughput, n b / (t(b) + s), of all with t(b) <= L / 4. A
  request may wait for a running batch, and for one ahead of it in the queue, before its own: three of the four. s is
  what a batch costs the server beside the model (SERVER_MS). More rows run in equal parts of at least b.
- `preferred_batch` is b, but at most as many requests as cost the server L / 4, of REQUEST_MS each. For texts, it is
  the most rows that take up to L / 3, at least b. If one batch runs at once, two whole batches are ahead of a request:
  then it is the rows that take up to L / 8, or up to LEAST_TEXTS if these take up to L / 4. Texts run in parts of
  similar length, and each is answered when its part is done. More texts need less padding, but raise the tail
  (docs/research/2026-11-texts-in-parts.md).
- `queue_timeout_ms` is L - T - t, with t the time of such a batch (of b texts, if several batches run at once), and
  T = t + its cost to the server: a request that waits longer cannot be answered in time. T is its own batch, t a
  reserve for longer rows and noise.
- `max_queue_size` is four times the number of requests, each of the fewest rows, that n instances serve within that
  time, at least LEAST_QUEUE:
  shorter rows take less time, and a caller that a full queue refuses often retries at once, which takes the cores from
  the model. It is at most MOST_QUEUE, since each request that waits takes memory.

Example:
    batching_of(spec.for_target("onnxruntime"), read_measured(spec.name, "onnxruntime")).preferred_batch      # 4
"""

import math

from deepseek.spec.deployment import DeploymentSpec
from deepseek.spec.files.measured_batches import REQUEST_MS, SERVER_MS, BatchingPlan, MeasuredBatches
from deepseek.spec.objectives import SloSpec, latency_limits
from deepseek.spec.tables import BATCH

KEPT_THROUGHPUT = 0.97
BATCHES_IN_LIMIT = 4  # a batch takes at most this part of the SLO's p99
TEXTS_IN_LIMIT = 3  # as above, for joined texts, if several batches run at once
TEXTS_ALONE_IN_LIMIT = 8  # the same, if one batch runs at once
LEAST_TEXTS = 4  # fewer need too much padding
QUEUE_RESERVE = 4
LEAST_QUEUE, MOST_QUEUE = 128, 100_000
# Without a measurement.
SHARE_IN_QUEUE = 0.5  # of the SLO's p99
DEFAULT_TIMEOUT_MS, DEFAULT_QUEUE_SIZE = 200, 512


def tail_limit_ms(slo: SloSpec) -> float | None:
    """The SLO's limit for p99 or a higher percentile; without one, its strictest latency limit. None without both."""
    limits = latency_limits(slo.all_objectives())
    return min([limit for percent, limit in limits.items() if percent >= 99] or limits.values(), default=None)


def batching_of(spec: DeploymentSpec, measured: MeasuredBatches | None, precision: str | None = None) -> BatchingPlan:
    """The batching and queue to serve. `precision` is by default the one that was measured.

    `spec` is the result of `for_target`.
    """
    fitting = measured if measured is not None and measured.fits(spec, precision) else None
    batching, limit_ms, reasons = spec.batching, tail_limit_ms(spec.slo), dict[str, str]()
    run, reasons["run_rows"] = _run_rows(spec, fitting, limit_ms)
    batch, reasons["preferred_batch"] = run, reasons["run_rows"]
    largest, rows_each = spec.max_served_batch, spec.axes[BATCH].min
    if batching.preferred_batch is not None:
        batch, reasons["preferred_batch"] = batching.preferred_batch, "set by hand"
        if fitting and not spec.text:
            run, reasons["run_rows"] = batch, "set by hand"
    elif fitting and run and limit_ms is not None:
        joined = _texts(fitting, run, largest, limit_ms) if spec.text else _requests(run, rows_each, limit_ms)
        batch, reasons["preferred_batch"] = joined or (run, reasons["run_rows"])
    typical = min(run or largest, batch or largest)
    model_ms = fitting.ms_of(typical) if fitting else 0.0
    if fitting and run and spec.text and fitting.at_once == 1:
        typical = batch or largest
        model_ms = typical * _text_ms(fitting, run)
    timeout_ms, reasons["queue_timeout_ms"] = _timeout(fitting, model_ms, typical, rows_each, limit_ms)
    timeout_ms = max(timeout_ms, math.ceil(2 * batching.max_queue_delay_us / 1000))
    if batching.queue_timeout_ms is not None:
        timeout_ms, reasons["queue_timeout_ms"] = batching.queue_timeout_ms, "set by hand"
    size, reasons["max_queue_size"] = _queue_size(fitting, typical, batch or largest, rows_each, timeout_ms)
    if batching.max_queue_size is not None:
        size, reasons["max_queue_size"] = batching.max_queue_size, "set by hand"
    follows = fitting is not None and any(reason != "set by hand" for reason in reasons.values())
    return BatchingPlan(
        preferred_batch=batch if batch != largest else None,
        run_rows=run if run != largest else None,
        queue_timeout_ms=timeout_ms,
        max_queue_size=size,
        reasons=reasons,
        measured=fitting if follows else None,
    )


def _run_rows(spec: DeploymentSpec, measured: MeasuredBatches | None, limit_ms: float | None) -> tuple[int | None, str]:
    """The fewest rows of a part, and why; None if nothing was measured."""
    most = spec.max_served_batch
    if measured is None:
        return None, "not measured: batches grow to max_batch"
    sizes = [point.rows for point in measured.times if point.rows <= most] or [most]
    longest_ms = math.inf if limit_ms is None else limit_ms / BATCHES_IN_LIMIT
    if not (inside := [rows for rows in sizes if measured.ms_of(rows) <= longest_ms]):
        took = f"{sizes[0]} takes {measured.ms_of(sizes[0]):.3g} ms"
        return sizes[0], f"the smallest: even a batch of {took}, more than {longest_ms:.3g} ms (p99 / 4)"
    best = max(inside, key=measured.rows_per_s)
    enough = KEPT_THROUGHPUT * measured.rows_per_s(best)
    rows = next(rows for rows in inside if measured.rows_per_s(rows) >= enough)
    bound = "" if limit_ms is None else f" of up to {longest_ms:.3g} ms (p99 / 4)"
    return rows, (
        f"batches of {rows} take {measured.ms_of(rows):.3g} ms + {SERVER_MS} ms in the server and give "
        f"{_rate(measured.rows_per_s(rows))} rows/s; the best{bound}, of {best}, give "
        f"{_rate(measured.rows_per_s(best))} rows/s"
    )


def _rate(per_s: float) -> str:
    """Four digits, without an exponent: 263.9 or 90,220."""
    return f"{float(f'{per_s:.4g}'):,.10g}"


def _text_ms(measured: MeasuredBatches, run: int) -> float:
    """Time of a joined text, while all instances are busy."""
    return measured.turns * measured.ms_of(run) / run


def _texts(measured: MeasuredBatches, run: int, most: int, limit_ms: float) -> tuple[int, str]:
    """The most texts to join, and why."""
    row_ms = _text_ms(measured, run)
    share, least = TEXTS_IN_LIMIT, run
    if measured.at_once == 1:
        share, least = TEXTS_ALONE_IN_LIMIT, max(1, min(LEAST_TEXTS, math.floor(limit_ms / BATCHES_IN_LIMIT / row_ms)))
    part_ms = limit_ms / share
    rows = min(most, max(least, math.floor(part_ms / row_ms)))
    return rows, f"texts of {row_ms:.3g} ms each within {part_ms:.3g} ms (p99 / {share}), at least {least}"


def _requests(run: int, rows_each: int, limit_ms: float) -> tuple[int, str] | None:
    """The most rows to join, and why; None if the server handles the requests of `run` rows in time."""
    part_ms = limit_ms / BATCHES_IN_LIMIT
    count = max(1, math.floor(part_ms / REQUEST_MS))
    rows = count * rows_each
    if rows >= run:
        return None
    within = f"within {part_ms:.3g} ms (p99 / {BATCHES_IN_LIMIT})"
    return rows, f"{count} requests of {REQUEST_MS:g} ms for the server each, {within}"


def _timeout(
    measured: MeasuredBatches | None, model_ms: float, rows: int, rows_each: int, limit_ms: float | None
) -> tuple[int, str]:
    """How long a request may wait, in ms, and why."""
    if limit_ms is None:
        return DEFAULT_TIMEOUT_MS, "the default, for an SLO without a latency"
    if measured is None:
        return max(1, math.floor(SHARE_IN_QUEUE * limit_ms)), f"half of p99, {limit_ms:g} ms; no batch was measured"
    batch_ms = model_ms + measured.server_ms(rows, rows_each)
    left_ms = limit_ms - batch_ms - model_ms
    if left_ms >= batch_ms:
        batch = f"{batch_ms:.3g} ms, a batch in the server - {model_ms:.3g} ms, the model's part again"
        return max(1, math.floor(left_ms)), f"p99 {limit_ms:g} ms - {batch}"
    return math.ceil(batch_ms), f"one batch, {batch_ms:.3g} ms: p99 {limit_ms:g} ms leaves less to wait"


def _queue_size(
    measured: MeasuredBatches | None, rows: int, joined: int, rows_each: int, timeout_ms: int
) -> tuple[int, str]:
    """Requests that may wait, and why."""
    if measured is None:
        return DEFAULT_QUEUE_SIZE, "the default; no batch was measured"
    rate, joins = measured.requests_per_s(rows, rows_each), joined // rows_each
    size = max(math.ceil(QUEUE_RESERVE * rate * timeout_ms / 1000), 2 * joins * measured.instances, LEAST_QUEUE)
    bounds = f"at least {LEAST_QUEUE} and two batches an instance, at most {MOST_QUEUE}"
    return min(size, MOST_QUEUE), f"{QUEUE_RESERVE} x {_rate(rate)} requests/s x {timeout_ms} ms, {bounds}"
