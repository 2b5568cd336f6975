"""The figures of a profile: phases of the requests, operators of the graph, functions of the backend.

Contract: phases have no gaps, so their means add up to the mean request. An operator's time is that of its runs within
the traced requests. A function's CPU time is its share of the samples of a thread, times the CPU time of the thread.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from loadtests.profile.profile_data import PHASES, Call, GraphRun, Recorded

NATIVE = ("threads without Python", "ONNX Runtime's pool, Triton's stub")
MEANINGS = {
    "encode": "client: tensors into a message",
    "to the server": "client sends, network, Triton receives",
    "request decoded": "Triton: HTTP or gRPC to tensors",
    "queue": "waiting for a batch and a free instance",
    "compute input": "tensors handed to the backend",
    "infer": "backend, the graph within it",
    "compute output": "outputs taken from the backend",
    "answer": "outputs to HTTP or gRPC",
    "back to the client": "Triton sends, network, client decodes",
}


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """A part of the mean request."""

    name: str
    mean_ms: float
    largest_ms: float
    share: float
    """Share of the mean request."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """All nodes of one type, over the traced requests."""

    op: str
    calls: float
    """Operator runs in one run of the graph."""
    mean_ms: float
    """All of them together, in one run of the graph."""
    share: float
    """Share of the time in operators."""
    slowest_node: str


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function of the backend, measured by CPU samples."""

    name: str
    place: str
    cpu_ms: float
    """In the function itself, per request."""
    share: float
    """In the function itself, as a share of the backend's CPU time."""
    whole: float
    """With its callees, as a share of the backend's CPU time."""


def phases(recorded: Recorded) -> list[PhaseRow]:
    """The phases that occurred, in the order of a request."""
    found: dict[str, list[float]] = defaultdict(list)
    for call in recorded.traced:
        own: dict[str, float] = defaultdict(float)
        for span in recorded.traces[call.request_id].phases(call):
            own[span.name] += (span.end_ns - span.start_ns) / 1e6
        for name, duration_ms in own.items():
            found[name].append(duration_ms)
    return _rows({name: found[name] for name in PHASES if name in found}, recorded.traced)


def _rows(parts: dict[str, list[float]], calls: Sequence[Call]) -> list[PhaseRow]:
    whole_ms = sum(call.finish_ns - call.encode_ns for call in calls) / 1e6
    return [
        PhaseRow(name=name, mean_ms=sum(each) / len(calls), largest_ms=max(each), share=sum(each) / whole_ms)
        for name, each in parts.items()
    ]


def within_infer(recorded: Recorded) -> list[PhaseRow]:
    """The parts of infer: before the graph (the backend wakes and waits for its turn), the graph, after it."""
    parts: dict[str, list[float]] = defaultdict(list)
    calls = []
    for call in recorded.traced:
        if (run := recorded.run_of(call)) is not None:
            calls.append(call)
            spans = recorded.traces[call.request_id].phases(call)
            infer = next(span for span in spans if span.name == "infer")
            marks = [infer.start_ns, max(infer.start_ns, run.start_ns), min(infer.end_ns, run.end_ns), infer.end_ns]
            for name, (start, end) in zip(
                ("before the graph", "the graph", "after the graph"), pairwise(marks), strict=True
            ):
                parts[name].append((end - start) / 1e6)
    return _rows(parts, calls)


def operators(runs: Iterable[GraphRun]) -> list[Operator]:
    runs = list(runs)
    by_node: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))  # operator -> node -> ms
    for run in runs:
        for span in run.operators:
            by_node[span.args["op"]][span.name].append((span.end_ns - span.start_ns) / 1e6)
    total_ms = {op: sum(map(sum, nodes.values())) for op, nodes in by_node.items()}
    whole_ms = sum(total_ms.values()) or 1.0
    return [
        Operator(
            op=op,
            calls=sum(map(len, nodes.values())) / len(runs),
            mean_ms=total_ms[op] / len(runs),
            share=total_ms[op] / whole_ms,
            slowest_node=max(nodes.items(), key=lambda each: sum(each[1]))[0],
        )
        for op, nodes in sorted(by_node.items(), key=lambda each: -total_ms[each[0]])
    ]


def functions(folder: Path) -> list[Function]:
    """The functions in py-spy's samples of all instances, weighted by CPU time per thread, slowest first."""
    path = folder / "sampled.json"
    if not path.is_file():
        return []
    sampled = json.loads(path.read_text(encoding="utf-8"))
    cpu_s = {int(thread): used for thread, used in sampled["thread_cpu_s"].items()}
    own: dict[tuple[str, str], float] = defaultdict(float)
    whole: dict[tuple[str, str], float] = defaultdict(float)
    for stacks, thread in _sampled_threads(folder):
        used = cpu_s.pop(thread, 0.0) / (sum(stacks.values()) or 1.0)
        for stack, weight in stacks.items():
            own[stack[-1]] += weight * used
            for frame in set(stack):
                whole[frame] += weight * used
    if own and sum(cpu_s.values()) > 0:  # threads without Python
        own[NATIVE] = whole[NATIVE] = sum(cpu_s.values())
    total = sum(own.values())
    requests = max(1, sampled["requests"])
    return [
        Function(
            name=frame[0],
            place=frame[1],
            cpu_ms=own[frame] * 1000 / requests,
            share=own[frame] / total if total else 0.0,
            whole=whole[frame] / total if total else 0.0,
        )
        for frame in sorted(own, key=own.__getitem__, reverse=True)
    ]


def _sampled_threads(folder: Path) -> Iterator[tuple[dict[tuple[tuple[str, str], ...], float], int]]:
    """The weight of each stack (functions, the innermost last) of each thread, and the thread's id."""
    for path in sorted(folder.glob("cpu-*.speedscope.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        frames = [(frame["name"], Path(frame.get("file") or "?").name) for frame in data["shared"]["frames"]]
        for profile in data["profiles"]:
            named = re.match(r"Thread (\d+)", profile["name"])
            stacks: dict[tuple[tuple[str, str], ...], float] = defaultdict(float)
            for stack, weight in zip(profile["samples"], profile["weights"], strict=True):
                if stack:
                    stacks[tuple(frames[index] for index in stack)] += weight
            yield stacks, int(named[1]) if named else 0
