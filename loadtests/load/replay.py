"""Plans a replay: which row of the inputs is sent at which time, for each model of recorded traffic.

Contract: a plan is an array of `PLAN`, by time. It lies beside the settings of a run as a file that master and workers
map into memory, so they need little memory. `row` names the input. `length` and `bytes` choose the input nearest to
them, by the sizes that differ between inputs or by the bytes of the encoded request. Among equally near inputs, `key`
chooses by its hash; without one they take turns.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import DeploymentSpec, InputError
from loadtests.load.inputs import Row, lengths_of, shuffled
from loadtests.load.preflight import checked_rows
from loadtests.load.traffic_file import LONGEST_S, Requests, Traffic
from loadtests.load.wire.route import RouteClient
from loadtests.results.settings import LoadSettings, Replay

PLAN = np.dtype([("time_s", "f8"), ("row", "i4")])


def plan_file(folder: Path, model: str) -> Path:
    return folder / f"{model}.replay.npy"


def open_plan(folder: Path, settings: LoadSettings) -> np.ndarray | None:
    """The plan of a running load, mapped into memory; None if it is no replay."""
    return np.load(plan_file(folder, settings.model), mmap_mode="r") if settings.replay else None


def rows_in(plan: np.ndarray) -> list[int]:
    return np.unique(plan["row"]).tolist()


def with_replay(settings: LoadSettings, traffic: Traffic, speed: float) -> LoadSettings:
    """The settings with the times of the recorded requests of their model; InputError if they take too long."""
    times_s = traffic.of(settings.model).times_s / speed
    last_s = traffic.requests.times_s[-1] / speed  # of all models, which are measured together
    if last_s > LONGEST_S:
        raise InputError(f"--speed {speed:g}: {traffic.path} then takes {last_s:.0f} s; allowed: {LONGEST_S} s")
    _, counts = np.unique(np.floor(times_s), return_counts=True)
    replay = Replay(
        file=str(traffic.path),
        sha256=traffic.sha256,
        speed=speed,
        requests=len(times_s),
        peak_rps=float(counts.max()),
    )
    return replace(settings, replay=replay, duration_s=float(math.floor(last_s) + 1))


def replay_of(traffic: Traffic, settings: LoadSettings, spec: DeploymentSpec) -> np.ndarray:
    """The plan of the model of the settings; InputError if it needs inputs that do not exist or fit."""
    assert settings.replay is not None
    requests = traffic.of(settings.model)
    plan = np.empty(len(requests.times_s), PLAN)
    plan["time_s"] = requests.times_s / settings.replay.speed
    if requests.choice == "row":
        plan["row"] = requests.values
        checked_rows(settings, spec, rows_in(plan))
    else:
        plan["row"] = _chosen(requests, checked_rows(settings, spec), settings, spec)
    return plan


def _chosen(requests: Requests, rows: dict[int, Row], settings: LoadSettings, spec: DeploymentSpec) -> np.ndarray:
    """The row of each request that names none."""
    numbers = np.array(shuffled(list(rows), settings.seed))
    if requests.choice is None:
        return numbers[_places(requests.keys, np.arange(len(requests.times_s)), len(numbers))]
    arrays = [rows[number] for number in numbers.tolist()]
    if requests.choice == "length":
        sizes = np.array(lengths_of(arrays, spec, on_route=settings.route is not None))
    else:
        sizes = np.array(sizes_bytes(arrays, settings))
    kinds = np.unique(sizes)
    nearest = np.searchsorted((kinds[:-1] + kinds[1:]) / 2, requests.values)  # between two, the smaller
    chosen = np.empty(len(nearest), np.int64)
    by_kind = np.argsort(nearest.astype(np.uint16), kind="stable")
    ends = np.cumsum(np.bincount(nearest, minlength=len(kinds)))
    for kind, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own, members = by_kind[start:end], numbers[sizes == kinds[kind]]
        keys = requests.keys[own] if len(requests.keys) else requests.keys
        chosen[own] = members[_places(keys, np.arange(len(own)), len(members))]
    return chosen


def _places(keys: np.ndarray, turns: np.ndarray, count: int) -> np.ndarray:
    return (keys if len(keys) else turns) % count


def sizes_bytes(rows: list[Row], settings: LoadSettings) -> list[int]:
    """The bytes of each row's encoded request."""
    options = {"timeout_s": settings.timeout_s, **settings.access}
    try:
        client = InferenceClient(settings.url, settings.protocol, **options)
        if settings.route is not None:
            client = RouteClient(settings.route, **options)
        with client:
            parts = [client.prepare(settings.model, row).parts for row in rows]
    except InferenceError as error:
        raise InputError(str(error)) from None
    return [sum(map(len, each[1:] or each)) for each in parts]  # over KServe's HTTP the first part is the path
