"""Measures how long batches of 1, 2, 4, ... rows take on ONNX Runtime on this CPU, with the layout that will serve.

Contract: as many sessions as the server runs at once each run a batch at the same time, every axis but the batch at its
opt. Sizes take turns, so noise affects all alike, and each one's time is the median of its turns. A time is the CPU
time of the thread that calls the session: it computes, or spins until the session's other threads are done. So it is
the time of a batch without what other processes take away. Ends after `BUDGET_S`, and skips sizes beyond the first that
is too slow for the SLO. Writes `build/<name>/batches-<target>.json` (`deepseek.spec.files.measured_batches`), from
which `publish` sets batching and queue.

Not measured, with the reason in the file: an accelerator of ONNX Runtime, and Triton's own ONNX Runtime backend.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from deepseek.spec import BATCH, DeploymentSpec, Precision, Target, build_dir
from deepseek.spec.files.batching_plan import BATCHES_IN_LIMIT, batching_of, tail_limit_ms
from deepseek.spec.files.measured_batches import BatchTime, MeasuredBatches, batches_path
from deepseek.spec.machine.cpu import this_cpu
from export.artifact import choice_of, engine_path, need, sha256, staged
from export.cache import fill, refined, stage_key
from export.model_folder import Predict
from export.rows import Row, load_rows
from export.runtimes.onnxruntime_predictor import onnx_predictor, provider_of
from export.runtimes.pytorch_reference import inputs_at

BUDGET_S = 5.0
LEAST_TURN_S = 0.02  # a turn repeats a short batch until it lasts this long
MOST_TURNS = 30
FIRST_TURNS = 3  # of each size, to find the sizes worth measuring

log = Console(file=sys.stderr, markup=False)
Turn = Callable[[int], float]
"""Runs batches of so many rows on all sessions at once; returns the mean seconds of a batch."""


def sizes_to_measure(least: int, most: int) -> list[int]:
    """Powers of two, and both ends."""
    powers = (1 << power for power in range(most.bit_length()))
    return sorted({least, most, *(size for size in powers if least < size < most)})


def measure(
    turn: Turn,
    sizes: Sequence[int],
    longest_s: float,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> dict[int, float]:
    """Median seconds of a batch by its rows; always has the first size, and the first that takes over `longest_s`.

    The budget limits the seconds of the first turns, which do not depend on what else runs here, so the same sizes are
    measured each time. More turns follow while the clock is within the budget too.
    """
    ends_at, found, spent_s, last_s = clock() + budget_s, dict[int, list[float]](), 0.0, 0.0
    for size in sizes:
        if found and spent_s + 2 * last_s > budget_s:  # it takes about twice as long as the size before
            break
        found[size] = [turn(size) for _ in range(FIRST_TURNS)]
        last_s = sum(found[size])
        spent_s += last_s
        if min(found[size]) > longest_s:
            break
    for _ in range(MOST_TURNS - FIRST_TURNS):
        if clock() + sum(map(min, found.values())) > ends_at:
            break
        for size, seconds in found.items():
            seconds.append(turn(size))
    return {size: statistics.median(seconds) for size, seconds in found.items()}


class BusySessions:
    """Sessions that run batches at the same time, one thread of ours for each."""

    def __init__(self, predictors: Sequence[Predict], inputs: Callable[[int], Row]) -> None:
        self._predictors, self._inputs = predictors, inputs
        self._repeats: dict[int, int] = {}
        self._rows: dict[int, Row] = {}

    def turn(self, size: int) -> float:
        """A `Turn`. The first one of a size warms up, and finds how often to repeat it."""
        if size not in self._rows:
            self._rows[size] = self._inputs(size)
            self._run_all(size, 1)
            self._repeats[size] = max(1, int(LEAST_TURN_S / max(1e-9, self._run_all(size, 1))))
        return self._run_all(size, self._repeats[size])

    def _run_all(self, size: int, repeats: int) -> float:
        start, rows = threading.Barrier(len(self._predictors)), self._rows[size]

        def run(predict: Predict) -> float:
            start.wait()
            started = time.thread_time()
            for _ in range(repeats):
                predict(rows)
            return (time.thread_time() - started) / repeats

        with ThreadPoolExecutor(len(self._predictors)) as pool:
            return statistics.fmean(pool.map(run, self._predictors))


def measured_batches(
    spec: DeploymentSpec, precision: Precision, provider: str | None, target: Target
) -> MeasuredBatches:
    """Measures the graph that will serve. `spec` is the result of `for_target`."""
    cpu, instances = this_cpu(), spec.batching.instances
    threads = spec.batching.threads or max(1, cpu.cores // instances)
    at_once = instances if instances * threads <= cpu.cores else max(1, cpu.cores // threads)
    sizes = {name: axis.opt for name, axis in spec.axes.items() if name != BATCH}
    facts = MeasuredBatches(
        precision=precision, instances=instances, threads=threads, at_once=at_once, cpu=cpu, sizes=sizes
    )
    if provider != "cpu" or spec.onnxruntime.backend != "python":
        runs = f"execution provider {provider}" if provider != "cpu" else "Triton's own ONNX Runtime backend"
        return facts.model_copy(update={"skipped": f"not measured on {runs}"})
    rows = load_rows(build_dir(spec.name) / "evaluation.npz")
    path = need(engine_path(spec.name, precision, target), "make engine")
    sessions = BusySessions(
        [onnx_predictor(spec, path, target) for _ in range(at_once)],
        lambda size: inputs_at(spec, rows, {**sizes, BATCH: size}),
    )
    limit_ms = tail_limit_ms(spec.slo)
    longest_s = float("inf") if limit_ms is None else limit_ms / BATCHES_IN_LIMIT / 1000
    with log.status("measuring batches"):
        found = measure(sessions.turn, sizes_to_measure(spec.axes[BATCH].min, spec.max_served_batch), longest_s)
    times = tuple(BatchTime(rows=size, ms=round(1000 * seconds, 4)) for size, seconds in found.items())
    return facts.model_copy(update={"times": times})


def show(spec: DeploymentSpec, measured: MeasuredBatches, precision: Precision) -> None:
    """Prints the curve and what follows from it."""
    if measured.skipped:
        print(f"batches   {measured.skipped}")
        return
    curve = ", ".join(f"{point.rows}: {point.ms:.3g} ms" for point in measured.times)
    print(f"batches   {measured.at_once} at once, {measured.threads} thread(s) each; rows: time  {curve}")
    plan = batching_of(spec, measured, precision)
    values = {**plan.model_dump(include={"queue_timeout_ms", "max_queue_size"})}
    joined = {key: getattr(plan, key) or spec.max_served_batch for key in ("run_rows", "preferred_batch")}
    for key, value in {**joined, **values}.items():
        print(f"{key:<16} {value:>5}  {plan.reasons[key]}")


def main(options: argparse.Namespace) -> None:
    """The command `measure-batches`."""
    spec = DeploymentSpec.to_build(options.model, options.models, tuned=options.tuned).for_target(options.target)
    if asked := options.precision:
        precision, provider = asked, provider_of(spec)
    else:
        precision, provider = choice_of(spec.name, options.target)  # type: ignore[assignment]
    path = options.output or batches_path(spec.name, options.target)

    def make(folder: Path) -> None:
        measured = measured_batches(spec, precision, provider, options.target)
        (folder / path.name).write_text(measured.model_dump_json(indent=2) + "\n")

    def once_an_engine(folder: Path) -> None:
        """The choice has new speeds each time it is made, often with the same engine."""
        engine = need(engine_path(spec.name, precision, options.target), "make engine")
        files = {file.name: sha256(file) for file in sorted(engine.parent.glob(f"{engine.name}*"))}
        fill(folder, refined(stage_key("times"), precision=precision, provider=str(provider), **files), make)

    with staged(path) as file:
        fill(file.parent, stage_key(), once_an_engine)
    measured = MeasuredBatches.model_validate_json(path.read_bytes())
    if options.json:
        print(path.read_text())
    else:
        show(spec, measured, precision)
