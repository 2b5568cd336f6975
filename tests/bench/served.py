"""What `make engine && make serve` gives over raw ONNX Runtime, dynamic batching on over off, and online beside bulk.

Requests have one row each. Callers send them over HTTP as binary tensors, the texts as JSON. A row that is refused does
not count as served. Raw ONNX Runtime has the server's cores, and its fastest setting on them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from deepseek_client import BULK
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import np_to_triton_dtype

from deepseek.spec import DeploymentSpec
from export.rows import Row
from models.minilm import data
from tests.bench.peers.calls import kserve
from tests.bench.peers.load import Load, Sender, closed_loop, http, poisson
from tests.bench.setting import SIDE_S, Bench, Side, begun_on, on

USERS = 32
APART = "apart"
TOGETHER = "shared"
BATCHING = "[targets.onnxruntime.batching]\n"
BATCHES_OF_ONE = (BATCHING, f"{BATCHING}max_batch = 1\n")
SLO_1_S = ("p99_ms = 200", "p99_ms = 1000")
BULK_USERS = 16
ONLINE_SHARE = 0.2  # of the served throughput
TAIL_S = 10.0


def apart(bench: Bench) -> None:
    """MiniLM with a core for the load generator alone, so that the difference is the server's."""
    cores, load_cores = generator_apart()
    begun_on(cores, _minilm, bench, APART, load_cores)


def shared(bench: Bench) -> None:
    """MiniLM with the load generator on the server's cores, as on a small machine."""
    _minilm(bench, TOGETHER, every_core())


def _minilm(bench: Bench, where: str, load_cores: list[int]) -> None:
    with ExitStack() as running:
        sides = {"raw": bench.raw("minilm"), "raw defaults": bench.raw("minilm", without=((),))}
        for name, how in (("fp32", ()), ("fp32 of 1 s", ("fp32", SLO_1_S)), ("auto", ("auto",))):
            server = running.enter_context(bench.server(bench.repository("minilm", *how)))
            sides[name] = closed(binary(server.http_url, bench.specs["minilm"], bench.rows["minilm"]), load_cores)
        found = bench.rounds(sides, 8)
    for name, other in (("fp32", "raw"), ("fp32 of 1 s", "raw"), ("fp32", "raw defaults"), ("auto", "raw defaults")):
        bench.record_loads(f"served {where}: minilm {name} over {other}", found[name], found[other])


def recommender(bench: Bench) -> None:
    """The recommender, a small model, in both ways."""
    cores, load_cores = generator_apart()
    begun_on(cores, _recommender, bench, APART, load_cores)
    _recommender(bench, TOGETHER, every_core())


def _recommender(bench: Bench, where: str, load_cores: list[int]) -> None:
    name = "recommender"
    raw = bench.raw(name)
    with bench.server(bench.repository(name)) as server:
        served = closed(binary(server.http_url, bench.specs[name], bench.rows[name]), load_cores)
        found = bench.rounds({"raw": raw, "served": served}, 10)
    bench.record_loads(f"served {where}: {name} fp32 over raw", found["served"], found["raw"])


def batching(bench: Bench) -> None:
    """Dynamic batching on over off, on all cores."""
    for name in ("minilm", "recommender"):
        with ExitStack() as running:
            sides = {}
            for how, change in (("on", ()), ("off", BATCHES_OF_ONE)):
                server = running.enter_context(
                    bench.server(bench.repository(name, "fp32", *([change] if change else [])))
                )
                sides[how] = closed(binary(server.http_url, bench.specs[name], bench.rows[name]), every_core())
            found = bench.rounds(sides, 10)
        bench.record_loads(f"batching: {name} on over off", found["on"], found["off"])


def bulk(bench: Bench) -> None:
    """p99 of online requests while bulk requests saturate the server, over alone; load generator apart."""
    cores, load_cores = generator_apart()
    begun_on(cores, _bulk, bench, load_cores)


def _bulk(bench: Bench, load_cores: list[int]) -> None:
    texts = data.texts("evaluation", 256)
    cases: dict[str, Callable[[str, bool], Sender]] = {
        "recommender": lambda url, is_bulk: binary(url, bench.specs["recommender"], bench.rows["recommender"], is_bulk),
        "minilm text": lambda url, is_bulk: (
            kserve(
                f"http://{url}/v2/models/minilm/infer",
                [{"text": text} for text in texts],
                "embedding",
                **(BULK if is_bulk else {}),
            ).sender
        ),
    }
    for name, sender in cases.items():
        with bench.server(bench.repository(name.split()[0], "auto")) as server:
            online, offline = sender(server.http_url, False), sender(server.http_url, True)
            rate_rps = ONLINE_SHARE * closed(online, load_cores)(0).answered_per_s
            sides = {
                how: partial(_online, online, offline if how == "beside" else None, rate_rps, load_cores)
                for how in ("alone", "beside")
            }
            found = bench.rounds(sides, 3)
        bench.record_loads(f"bulk: {name}", found["beside"], found["alone"], "p99_ms")


def _online(online: Sender, bulk: Sender | None, rate_rps: float, cores: list[int], turn: int) -> Load:
    """Poisson arrivals, beside callers of bulk requests that wait for nothing but their answers."""

    async def both() -> Load:
        sending = bulk and asyncio.create_task(closed_loop(bulk, BULK_USERS, TAIL_S + 1))
        found = await poisson(online, rate_rps, TAIL_S, seed=turn)
        if sending:
            await sending
        return found

    with on(cores):
        return asyncio.run(both())


def every_core() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def generator_apart() -> tuple[list[int], list[int]]:
    """The cores of the server, and of the load generator: the last core, if there are several."""
    every = every_core()
    return every[:-1] or every, every[-1:]


def closed(sender: Sender, cores: list[int]) -> Side[Load]:
    """A side: USERS requests in flight, sent from these cores."""

    def side(turn: int) -> Load:
        with on(cores):
            return asyncio.run(closed_loop(sender, USERS, SIDE_S))

    return side


def binary(url: str, spec: DeploymentSpec, rows: Sequence[Row], is_bulk: bool = False) -> Sender:
    """Rows of one shape as binary tensors. The answers have the model's own outputs, as raw gives them, in binary."""
    bodies, lengths, custom = [], set(), dict(BULK) if is_bulk else {}
    priority = custom.pop("priority", 0)
    outputs = [InferRequestedOutput(name) for name in spec.outputs]
    for row in rows:
        inputs = []
        for name, array in row.items():
            inputs.append(InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        body, length = InferenceServerClient.generate_request_body(
            inputs, outputs=outputs, priority=priority, parameters=custom
        )
        bodies.append(body)
        lengths.add(length)
    (length,) = lengths
    return http(f"http://{url}/v2/models/{spec.name}/infer", bodies, f"Inference-Header-Content-Length: {length}")
