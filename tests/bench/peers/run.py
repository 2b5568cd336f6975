"""`deepseek bench-peers`: compares this project's server with others on the same graphs, machine and arrivals.

Needs the models built (`make engine MODEL=recommender`, `make engine MODEL=minilm`). The first run installs each peer in an
environment of its own under build/bench/peers/. Writes build/bench/peers.json, and two charts for each workload.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deepseek.spec import InputError
from deepseek.spec.files.batching_plan import tail_limit_ms
from deepseek.spec.files.folders import write_whole
from tests.bench import results
from tests.bench.peers.calls import Served, kserve, listed, openai, plain
from tests.bench.peers.load import closed_loop, poisson
from tests.bench.peers.raw import Raw
from tests.bench.peers.report import Result, Run, goals, p99_chart, table, throughput_chart
from tests.bench.peers.servers import ours, running
from tests.bench.peers.table import AUTO, FP32, OURS, PEERS, WORKLOADS
from tests.bench.peers.workloads import Workload, graph_of, workload
from tests.bench.served import USERS, every_core, generator_apart
from tests.bench.setting import Bench, chosen, log, on

SHARES = (0.5, 0.7)  # rates of the open loops over raw
CHECKED = 16  # answers
PROBE_S = 1.0  # of raw, between two servers


def main(options: argparse.Namespace) -> None:
    """Runs the comparison; prints and writes the results."""
    names = chosen("--peers", options.peers, PEERS)
    workloads = chosen("--workloads", options.workloads, WORKLOADS)
    server, load = generator_apart() if options.apart else (every_core(), every_core())
    where = str(results.Run.here("peers", (), took_s=0, shortened=False))
    run = Run(apart=options.apart, where=where, rounds=options.rounds, duration_s=options.duration_s, results=[])
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        bench = Bench(Path(folder), None)
        for name in workloads:
            with on(server):
                run.results += _measured(bench, name, names, run, load)
            _write(run, bench.files)
    print(table(run))
    for goal in goals(run):
        print(goal)


def _write(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "peers.json", run.to_json())
    for name in dict.fromkeys(result.workload for result in run.results):
        write_whole(folder / f"peers-{name}-throughput.svg", throughput_chart(run, name))
        write_whole(folder / f"peers-{name}-p99.svg", p99_chart(run, name))


def _measured(bench: Bench, name: str, names: Sequence[str], run: Run, load: list[int]) -> list[Result]:
    """Starts, measures and ends one server after the other. One that cannot be measured is a result that says why."""
    asked = workload(bench, name)
    run.limits_ms[name] = tail_limit_ms(bench.specs[asked.model].for_target("onnxruntime").slo) or math.inf
    repositories = {FP32: bench.repository(asked.model), AUTO: bench.repository(asked.model, "auto")}
    raw = {
        precision: Raw(bench, graph_of(repository, asked.model), asked.items, asked.encode, asked.output)
        for precision, repository in repositories.items()
    }
    want = {precision: one.outputs(asked.items[:CHECKED]) for precision, one in raw.items()}
    raw_per_s = statistics.median(raw[FP32].per_s(PROBE_S) for _ in range(3))
    log.print(f"{name}: raw fp32 {raw_per_s:.0f}/s")
    rates = [share * raw_per_s for share in SHARES]
    servers = (*OURS, *(peer for peer in names if name in PEERS[peer].workloads))
    found = [Result(workload=name, server=server, rates=rates) for server in servers]
    for turn in range(run.rounds):
        for result in found[:: -1 if turn % 2 else 1]:
            if result.why:
                continue
            try:
                with _started(bench, result.server, name, asked, repositories) as target:
                    answers = asyncio.run(target.answers(CHECKED))
                    result.why = asked.problem(answers, want[OURS.get(result.server, FP32)])
                    if not result.why:
                        _measure(result, target, raw[FP32], run, load, turn)
            except (InputError, OSError, EOFError, ValueError, LookupError, TypeError) as error:
                result.why = " ".join(str(error).split())[:200]
            if result.why:
                log.print(f"  {name}, {result.server}: not measured: {result.why}")
    return found


@contextlib.contextmanager
def _started(
    bench: Bench, server: str, name: str, asked: Workload, repositories: Mapping[str, Path]
) -> Iterator[Served]:
    if server in OURS:
        with ours(bench, repositories[OURS[server]]) as addresses:
            yield kserve(f"{addresses['HTTP']}/models/{asked.model}/infer", asked.requests, asked.output)
    else:
        with running(bench, PEERS[server], name, graph_of(repositories[FP32], asked.model)) as url:
            yield _target(server, url, asked)


def _target(server: str, url: str, asked: Workload) -> Served:
    match PEERS[server].body:
        case "v2":
            return kserve(url, asked.requests, asked.output)
        case "v1":
            return openai(url, asked.requests)
        case "list":
            return listed(url, asked.requests, asked.output)
        case "plain":
            return plain(url, asked.requests, asked.output)


def _measure(result: Result, target: Served, raw: Raw, run: Run, load: list[int], turn: int) -> None:
    """Raw, then the closed loop, then the open loops; not those whose rate the server did not reach in the closed one."""
    result.raw_per_s.append(raw.per_s(PROBE_S))
    with on(load):
        closed = asyncio.run(closed_loop(target.sender, USERS, run.duration_s))
        result.closed.append(closed)
        for rate, loads in zip(result.rates, result.open, strict=True):
            fits = closed.answered_per_s >= rate
            loads.append(asyncio.run(poisson(target.sender, rate, run.duration_s, seed=turn)) if fits else None)
    said = "; ".join(str(one or "cannot keep up") for one in (closed, *(loads[-1] for loads in result.open)))
    log.print(f"  round {turn + 1}, {result.workload}, {result.server}: {said}")
