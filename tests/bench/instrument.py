"""The load generator itself: accuracy, the highest rate of one core, and a comparison with perf_analyzer.

Accuracy and ceiling are measured with `tests/fake_endpoint.py`, which computes nothing, logs when it received and
answered, and has its own core if there are two. The ceiling is requests per second of the generator's CPU time, over all
its threads: the most that one core can send. It depends little on what else runs.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from deepseek_client import InferenceClient
from rich.console import Console

from deepseek.spec import DeploymentSpec
from loadtests.load.measure import measure
from loadtests.load.preflight import check
from loadtests.results.run import Run
from loadtests.results.settings import LoadSettings
from tests.bench.served import BATCHING
from tests.bench.setting import Bench, on, perf_analyzer
from tests.failing_servers import url_of
from tests.fake_endpoint import FakeEndpoint, nearest_rank

Protocol = Literal["grpc", "http"]
PROTOCOLS: tuple[Protocol, ...] = ("grpc", "http")
PERCENTS = (50, 90, 99, 99.9)
PATIENT = (BATCHING, f"{BATCHING}queue_timeout_ms = 10000\n")
USERS = 16  # of the closed loop that measures the ceiling
LENGTH = 50  # floats per input
SPEC = """
name = "fake"
inputs.x = { dtype = "float32", shape = ["batch", "length"] }
outputs.y = { dtype = "float32", shape = ["batch", 1] }
axes.batch = { min = 1, opt = 4, max = 8 }
axes.length = { min = 1, opt = 50, max = 50 }
slo = { p99_ms = 50 }
"""


def accuracy(bench: Bench) -> None:
    """Reported latency over the server's own, and a planned stall of 2 s in open and closed loop.

    The server's delays are log-normal: on a smooth curve, unlike on a plateau, a small error of a percentile shows.
    They are long compared with the time on the network, which the server does not see.
    """
    for protocol in PROTOCOLS:
        ratios = {percent: list[float]() for percent in PERCENTS}
        for _ in range(bench.pairs(3)):
            with FakeEndpoint(delay_ms=100, spread=0.5) as endpoint:  # 20 to 500 ms, some 22 in flight
                run = _measured(bench, endpoint, protocol, rate_rps=200.0, duration_s=10.0)
                true_ms = endpoint.true_ms()
            for percent, found in ratios.items():
                found.append(run.window.latency("intended").percentile_ms(percent) / nearest_rank(true_ms, percent))
        for percent, found in ratios.items():
            bench.record(f"reported p{percent:g}: {protocol}", found)
        for how in ("open loop", "closed loop", "perf_analyzer"):
            found = [_stall(bench, protocol, how) for _ in range(bench.pairs(2))]
            note = "p99, the highest that it reports" if how == "perf_analyzer" else ""
            bench.record(f"stall, {how}: {protocol}", found, note)


def _stall(bench: Bench, protocol: Protocol, how: str) -> float:
    """The reported latency over the longest wait at the server, which stalls for 2 s during the load."""
    with FakeEndpoint(stall_at=600, stall_s=2) as endpoint:
        if how.startswith("open"):
            run = _measured(bench, endpoint, protocol, rate_rps=200.0, duration_s=10.0, arrivals="constant")
            seen_ms = run.window.latency("intended").percentile_ms(99.9)
        elif how.startswith("closed"):
            run = _measured(bench, endpoint, protocol, users=1, duration_s=10.0)
            seen_ms = run.window.latency("service").percentile_ms(99.9)
        else:
            flags = ("--percentile", "99", "--measurement-interval", "3000")
            seen_ms = float(_perf_analyzer(bench, endpoint, protocol, 1, *flags)["p99 latency"]) / 1000
        return seen_ms / float(endpoint.true_ms()[-1])


def ceiling(bench: Bench) -> None:
    """Requests per second of CPU time over perf_analyzer's, and the send lag at half of that rate."""
    for protocol in PROTOCOLS:
        ratios, lags_ms, ours, theirs = [], [], [], []
        for _ in range(bench.pairs(3)):
            ours.append(_own_ceiling(bench, protocol))
            theirs.append(_peer_ceiling(bench, protocol))
            ratios.append(ours[-1] / theirs[-1])
            with _apart() as (endpoint, cores):
                run = _measured(bench, endpoint, protocol, cores=cores, rate_rps=round(ours[-1] / 2))
            lags_ms.append(run.window.latency("lag").percentile_ms(99))
        said = f"{np.median(ours):.0f}/s over {np.median(theirs):.0f}/s"
        bench.record(f"generator requests/s: {protocol}", ratios, said)
        bench.record(f"generator send lag, ms: {protocol}", lags_ms)


@contextmanager
def _apart() -> Iterator[tuple[FakeEndpoint, list[int]]]:
    """A fake endpoint without delay on the first core, and the last core for the generator."""
    every = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        with on(every[:1]):
            endpoint = stack.enter_context(FakeEndpoint())
        yield endpoint, every[-1:]


def _own_ceiling(bench: Bench, protocol: Protocol) -> float:
    with _apart() as (endpoint, cores):
        run = _measured(bench, endpoint, protocol, cores=cores, users=USERS)
    return run.window.throughput_rps / run.generator["process_cpu"]


def _peer_ceiling(bench: Bench, protocol: Protocol) -> float:
    with _apart() as (endpoint, cores), on(cores):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _perf_analyzer(bench, endpoint, protocol, USERS, "--measurement-interval", "2000")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        endpoint.stop()
        sent = endpoint.log().shape[1]
    return sent / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _perf_analyzer(bench: Bench, endpoint: FakeEndpoint, protocol: Protocol, users: int, *flags: str) -> dict[str, str]:
    """The row of perf_analyzer's table."""
    url, table, shape = url_of(endpoint, protocol), bench.folder / "fake.csv", ("--shape", f"x:{LENGTH}")
    return perf_analyzer(url, "fake", protocol, users, table, *shape, *flags)


def _measured(
    bench: Bench, endpoint: FakeEndpoint, protocol: Protocol, cores: list[int] | None = None, **load: Any
) -> Run:
    """A load test of the endpoint, with the generator on `cores` only."""
    inputs, spec = _given(bench)
    fixed: dict[str, Any] = {"model": "fake", "models": str(bench.folder / "models"), "target": "onnxruntime"}
    fixed |= {"protocol": protocol, "url": url_of(endpoint, protocol), "inputs": str(inputs)}
    wanted = LoadSettings(**{**fixed, "warmup_s": 0.0, "duration_s": 5.0, **load})
    with on(cores or sorted(os.sched_getaffinity(0))):
        return measure(wanted, spec, check(wanted, spec), Console(quiet=True))


def _given(bench: Bench) -> tuple[Path, DeploymentSpec]:
    """The inputs and the spec of the endpoint's model."""
    models, inputs = bench.folder / "models", bench.folder / "fake.npz"
    if not inputs.exists():
        (models / "fake").mkdir()
        (models / "fake" / "deploy.toml").write_text(SPEC)
        rows = {f"{row:05d}/x": np.full((1, LENGTH), row, np.float32) for row in range(64)}
        np.savez(inputs, **rows)  # type: ignore[arg-type]
    return inputs, DeploymentSpec.of_model("fake", models)


def encoding(bench: Bench) -> None:
    """CPU time of a request encoded once over one encoded for each send: an image of 600 kB."""
    image = {"x": np.random.default_rng(0).random((1, 3 * 224 * 224), np.float32)}
    for protocol in PROTOCOLS:
        with FakeEndpoint() as endpoint, InferenceClient(url_of(endpoint, protocol), protocol) as client:
            once = partial(client.send, client.prepare("fake", image))
            anew = partial(client.infer, "fake", image)
            ratios = [_cpu_s(once) / _cpu_s(anew) for _ in range(bench.pairs(12))]
        bench.record(f"generator encoding: {protocol}", ratios)


def _cpu_s(call: Callable[[], object]) -> float:
    start_s = time.process_time()
    for _ in range(50):
        call()
    return time.process_time() - start_s


def peer(bench: Bench) -> None:
    """The load test over perf_analyzer: throughput, p50 and p99 on the same server under the same load."""
    with bench.server(bench.repository("minilm", "fp32", PATIENT)) as server:  # perf_analyzer ends if it is refused
        for protocol in PROTOCOLS:
            ours, theirs = [], []
            for _ in range(bench.pairs(3)):
                ours.append(bench.loadtest(server, "minilm", protocol, "--users", "4"))
                theirs.append(bench.peer_figures(server, "minilm", protocol, 4))
            for key in ("throughput", "p50_us", "p99_us"):
                ratios = [own[key] / other[key] for own, other in zip(ours, theirs, strict=True)]
                bench.record(f"load test over perf_analyzer, {key.removesuffix('_us')}: {protocol}", ratios)
