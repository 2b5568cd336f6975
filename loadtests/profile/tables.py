"""The figures of a profile: phases of the requests, operators of the graph, functions of the backend.

Contract: phases follow one another without a gap, so that their means add up to the mean request. An operator's time
is that of its runs within the traced requests; a function's is CPU time: of a thread's, its share of the samples.

Example:
    phases(calls, traces)[0]    # Row(name="encode", mean_ms=0.05, largest_ms=0.06, share=0.02)
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.profile.sources import PHASES, Call, GraphRun, Trace, run_of

NATIVE = ("threads without Python", "ONNX Runtime's pool, Triton's stub")
MEANINGS = {
    "encode": "client: tensors into a message",
    "to the server": "client sends, network, Triton receives",
    "request decoded": "Triton: HTTP or gRPC to tensors",
    "queue": "waiting for a batch and a free instance",
    "cache look-up": "in Triton's response cache",
    "compute input": "tensors handed to the backend",
    "infer": "backend, the graph within it",
    "compute output": "outputs taken from the backend",
    "answer": "outputs to HTTP or gRPC",
    "back to the client": "Triton sends, network, client decodes",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A part of the mean request."""

    name: str
    mean_ms: float
    largest_ms: float
    share: float
    """Of the mean request."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """All nodes of one type, over the traced requests."""

    op: str
    calls: float
    """Runs in one run of the graph."""
    mean_ms: float
    """All of them together, in one run of the graph."""
    share: float
    """Of the time in operators."""
    slowest_node: str


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function of the backend by CPU samples."""

    name: str
    place: str
    cpu_ms: float
    """In the function itself, a request."""
    share: float
    """The same, of the backend's CPU time."""
    whole: float
    """With what it called."""


def phases(calls: Sequence[Call], traces: dict[str, list[Trace]]) -> list[Row]:
    """In the order in which a request goes through them; those that no request had are left out."""
    found: dict[str, list[float]] = defaultdict(list)
    traced = [call for call in calls if call.request_id in traces]
    for call in traced:
        own: dict[str, float] = defaultdict(float)
        for span in traces[call.request_id][0].phases(call):
            own[span.name] += (span.end_ns - span.start_ns) / 1e6
        for name, duration_ms in own.items():
            found[name].append(duration_ms)
    whole_ms = sum(call.finish_ns - call.encode_ns for call in traced) / 1e6
    return [
        Row(
            name=name,
            mean_ms=sum(found[name]) / len(traced),
            largest_ms=max(found[name]),
            share=sum(found[name]) / whole_ms if whole_ms else 0.0,
        )
        for name in PHASES
        if name in found
    ]


def within_infer(calls: Sequence[Call], traces: dict[str, list[Trace]], runs: Sequence[GraphRun]) -> list[Row]:
    """What infer consists of: before the graph runs (the backend is woken, takes its turn), the graph, after it."""
    parts: dict[str, list[float]] = defaultdict(list)
    whole_ms = 0.0
    for call in calls:
        for trace in traces.get(call.request_id, ())[:1]:
            infer, run = trace.phase("infer", call), run_of(trace, call, runs)
            if infer is not None and run is not None:
                whole_ms += (call.finish_ns - call.encode_ns) / 1e6
                marks = [infer.start_ns, max(infer.start_ns, run.start_ns), min(infer.end_ns, run.end_ns), infer.end_ns]
                for name, start, end in zip(
                    ("before the graph", "the graph", "after it"), marks, marks[1:], strict=False
                ):
                    parts[name].append((end - start) / 1e6)
    return [
        Row(name=name, mean_ms=sum(each) / len(each), largest_ms=max(each), share=sum(each) / whole_ms)
        for name, each in parts.items()
    ]


def operators(runs: Iterable[GraphRun]) -> list[Operator]:
    """By the time that they take, the most first."""
    total_ms: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    by_node: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    number = 0
    for run in runs:
        number += 1
        for span in run.operators:
            duration_ms = (span.end_ns - span.start_ns) / 1e6
            total_ms[span.args["op"]] += duration_ms
            count[span.args["op"]] += 1
            by_node[span.args["op"]][span.name] += duration_ms
    whole_ms = sum(total_ms.values()) or 1.0
    return [
        Operator(
            op=op,
            calls=count[op] / number,
            mean_ms=total_ms[op] / number,
            share=total_ms[op] / whole_ms,
            slowest_node=max(by_node[op], key=by_node[op].__getitem__),
        )
        for op in sorted(total_ms, key=total_ms.__getitem__, reverse=True)
    ]


def functions(folder: Path) -> list[Function]:
    """Of py-spy's samples of every instance, each thread weighed by its CPU time; the most first."""
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
    if own and sum(cpu_s.values()) > 0:  # threads that Python does not know
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
    """Of each thread the weight of each stack (functions, the innermost last), and its id."""
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
