"""The results of `make bench-peers`: their file, their table, their charts and the goals about peers.

`python -m tests.bench.peers.report build/bench/peers.json` prints the Markdown table of docs/benchmarks.md.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench.chart import Bar, bar_chart
from tests.bench.peers.load import Load
from tests.bench.peers.table import IDS, OURS, PEERS, RECOMMENDER, TEXT, TRITON
from tests.bench.served import USERS
from tests.bench.tables import Goal

TITLES = {name: f"this project, {precision}" for name, precision in OURS.items()}
TITLES |= {name: peer.title for name, peer in PEERS.items()}
WORKLOAD_TITLES = {RECOMMENDER: "the recommender", IDS: "MiniLM by ids, 64 tokens", TEXT: "MiniLM by text"}
FP32, AUTO = OURS


@dataclass(kw_only=True)
class Result:
    """The measurements of one server on one workload, a value for each round."""

    workload: str
    server: str
    rates: list[float]
    """Requests per second of the open loops."""
    why: str = ""
    """Why it was not measured."""
    raw_per_s: list[float] = field(default_factory=list)
    closed: list[Load] = field(default_factory=list)
    open: list[list[Load | None]] = field(default_factory=lambda: [[], []])
    """For each rate; None if the server does not reach it in the closed loop."""

    @property
    def failed(self) -> float:
        """The largest share of requests refused or failed in one of its loads."""
        loads = [*self.closed, *(load for loads in self.open for load in loads if load)]
        return max(load.failed for load in loads)

    def p99s(self, place: int) -> list[float] | None:
        """p99 in ms at one of the rates; None if the server cannot keep up."""
        found = [load.p99_ms for load in self.open[place] if load]
        return found if len(found) == len(self.open[place]) else None


@dataclass(kw_only=True)
class Run:
    """One run on one machine."""

    apart: bool
    """The load generator had a core of its own."""
    rounds: int
    duration_s: float
    results: list[Result]
    where: str
    """Date, CPU, cores and commit."""
    limits_ms: dict[str, float] = field(default_factory=dict)
    """The SLO's p99 by workload."""

    def over_raw(self, result: Result) -> list[float]:
        """Answered requests per second of the closed loop over raw: the median of all probes, since single ones vary."""
        probes = [raw for one in self.results if one.workload == result.workload for raw in one.raw_per_s]
        return [load.answered_per_s / statistics.median(probes) for load in result.closed]

    def can_answer_in_time(self, result: Result) -> bool:
        """Whether a server of this throughput answers the closed loop inside the SLO."""
        answered_per_s = max(load.answered_per_s for load in result.closed)
        return answered_per_s * self.limits_ms.get(result.workload, math.inf) >= 1000 * USERS

    def of(self, workload: str) -> dict[str, Result]:
        """Measured servers of a workload."""
        return {one.server: one for one in self.results if one.workload == workload and not one.why}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def of_json(cls, text: str) -> Run:
        found = json.loads(text)
        for result in found["results"]:
            result["closed"] = [Load(*load) for load in result["closed"]]
            result["open"] = [[load and Load(*load) for load in loads] for loads in result["open"]]
        return cls(**{**found, "results": [Result(**result) for result in found["results"]]})


def table(run: Run) -> str:
    """A Markdown table for each workload: medians of the rounds, and their range."""
    parts = []
    for name in dict.fromkeys(result.workload for result in run.results):
        rows = [result for result in run.results if result.workload == name]
        head = f"{WORKLOAD_TITLES[name][0].upper()}{WORKLOAD_TITLES[name][1:]}"
        rates = " and ".join(f"{rate:.0f}" for rate in rows[0].rates)
        where = "load generator on a core of its own" if run.apart else "load generator on the servers' cores"
        parts.append(f"{head}; {where}; {run.where}; 50 % and 70 % of raw are {rates} requests/s.\n")
        parts.append(
            "| server | requests/s over raw | p99 of those answered, 32 in flight (ms) | p99 at 50 % (ms) | p99 at 70 % (ms) | refused or failed |"
        )
        parts.append("|---|---|---|---|---|---|")
        parts += [_row(run, result) for result in rows]
        parts.append("")
    return "\n".join(parts)


def _row(run: Run, result: Result) -> str:
    title = TITLES[result.server]
    if result.why:
        return f"| {title} | not measured: {result.why} | | | | |"
    cells = [_range(run.over_raw(result), ".2f"), _range([load.answered_p99_ms for load in result.closed], ".0f")]
    for place in range(len(result.rates)):
        found = result.p99s(place)
        cells.append("cannot keep up" if found is None else _range(found, ".0f"))
    return f"| {title} | {' | '.join(cells)} | {result.failed:.1%} |"


def _range(values: Sequence[float], form: str) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}}" if len(values) == 1 else f"{middle:{form}} ({low:{form}} to {high:{form}})"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A goal about peers, and what a run says about it."""

    name: str
    values: Sequence[float]
    """One for each round; their median is judged."""
    goal: Goal
    peer: str = ""
    """The peer that the server was compared with."""

    def __str__(self) -> str:
        verdict = "met" if self.goal.met(statistics.median(self.values)) else "missed"
        over = f" (the best peer is {TITLES[self.peer]})" if self.peer not in ("", TRITON) else ""
        form = ".2%" if self.goal.most == 0 else ".2f"
        return f"{self.name}: {_range(self.values, form)}; goal: {self.goal}, {verdict}{over}"


def goals(run: Run) -> list[Judged]:
    """The goals about peers that this run can judge.

    A refused request counts with the timeout in an open loop's p99, and is left out of a closed loop's.
    """
    return [goal for name in WORKLOAD_TITLES for goal in _goals(run, name)]


def _goals(run: Run, name: str) -> Iterator[Judged]:
    title, servers = WORKLOAD_TITLES[name], run.of(name)
    peers = {peer: result for peer, result in servers.items() if peer not in OURS}
    mine = {server: servers[server] for server in OURS if server in servers}
    for server, result in mine.items():
        if not run.can_answer_in_time(result):
            continue
        label = f"{title}: share refused or failed, 32 in flight, {TITLES[server]}"
        yield Judged(name=label, values=[load.failed for load in result.closed], goal=Goal(most=0))
    for server, result in mine.items():
        yield from _throughput_goals(run, name, result, peers)
        if triton := peers.get(TRITON):
            ours, theirs = ([load.answered_p99_ms for load in one.closed] for one in (result, triton))
            label = f"{title}: p99 of those answered, 32 in flight, over stock Triton's, {OURS[server]}"
            yield Judged(name=label, values=_over(ours, theirs), goal=Goal(most=0.8), peer=TRITON)
    for place, share, limits in ((1, "70 %", (0.6, 0.4)), (0, "50 %", (0.8, 0.6))):
        keeping_up = {peer: p99s for peer, result in peers.items() if (p99s := result.p99s(place))}
        if best := min(keeping_up, key=lambda peer: statistics.median(keeping_up[peer]), default=None):
            for server, most in zip(OURS, limits, strict=True):
                if server in mine and (p99s := mine[server].p99s(place)):
                    label = f"{title}: p99 at {share} of raw over the best peer's, {TITLES[server]}"
                    yield Judged(name=label, values=_over(p99s, keeping_up[best]), goal=Goal(most=most), peer=best)


def _throughput_goals(run: Run, name: str, ours: Result, peers: Mapping[str, Result]) -> Iterator[Judged]:
    title, precision, is_small = WORKLOAD_TITLES[name], OURS[ours.server], name == RECOMMENDER
    if ours.server == FP32 and (run.apart or not is_small):  # raw is fp32
        goal = Goal(least=0.6 if is_small else 0.95 if run.apart else 0.92)
        yield Judged(name=f"{title}: requests/s over raw, {precision}", values=run.over_raw(ours), goal=goal)
    if best := max(peers, key=lambda peer: statistics.median(run.over_raw(peers[peer])), default=None):
        ratios, which = _over(run.over_raw(ours), run.over_raw(peers[best])), ""
        if not is_small:  # a peer is ahead beyond the noise if it is ahead in every round
            ratios, which = [max(ratios)], ", best round"
        label = f"{title}: requests/s over the best peer's, {precision}{which}"
        yield Judged(name=label, values=ratios, goal=Goal(least=1.5 if is_small else 1), peer=best)


def _over(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one / max(other, 1e-9) for one, other in zip(ours, theirs, strict=True)]


def throughput_chart(run: Run, workload: str) -> str:
    """Requests per second over raw, the best server first."""
    bars = [_bar(TITLES[server], run.over_raw(result), ".2f") for server, result in run.of(workload).items()]
    bars.sort(key=lambda bar: -bar.values[1] if bar.values else 0)
    return bar_chart(f"Requests/s over raw, 32 in flight, {WORKLOAD_TITLES[workload]} (higher is better)", bars)


def p99_chart(run: Run, workload: str) -> str:
    """p99 at 70 % of raw and then at 50 %, the best server first."""
    bars = []
    for place, share in ((1, "70 %"), (0, "50 %")):
        found = [
            _bar(f"{TITLES[server]}, at {share}", result.p99s(place), ".0f")
            for server, result in run.of(workload).items()
        ]
        bars += sorted(found, key=lambda bar: bar.values[1] if bar.values else math.inf)
    title = f"p99 in ms at 50 % and 70 % of raw, {WORKLOAD_TITLES[workload]} (lower is better; logarithmic)"
    return bar_chart(title, bars, log=True)


def _bar(name: str, values: Sequence[float] | None, form: str) -> Bar:
    """A bar for the median of the rounds, with a whisker from the lowest to the highest. None: it cannot keep up."""
    if values is None:
        return Bar(name=name, values=None, text="cannot keep up")
    return Bar(name=name, values=(min(values), statistics.median(values), max(values)), text=_range(values, form))


if __name__ == "__main__":
    print(table(Run.of_json(Path(sys.argv[1]).read_text())))
