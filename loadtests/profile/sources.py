"""What is known of profiled requests: the client's own times, Triton's traces, ONNX Runtime's operator times.

Contract: all times are nanoseconds of CLOCK_MONOTONIC, which Python (`time.monotonic_ns`), Triton's traces and every
container of a machine share. ONNX Runtime counts microseconds from a start that it gives in CLOCK_REALTIME; the
distance of the two clocks, taken while recording, brings it over.

Example:
    recorded = Recorded.load(folder)
    recorded.runs_of(recorded.traced[0])[0].operators
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepseek.spec import InputError, InvalidMeasurement

# The phase that begins at each of Triton's time stamps; the next stamp, or the client's receipt, ends it.
BEGINS = {
    "HTTP_RECV_END": "request decoded",
    "GRPC_WAITREAD_END": "request decoded",
    "QUEUE_START": "queue",
    "CACHE_HIT_LOOKUP_START": "cache look-up",
    "COMPUTE_START": "compute input",
    "COMPUTE_INPUT_END": "infer",
    "COMPUTE_OUTPUT_START": "compute output",
    "COMPUTE_END": "answer",
    "CACHE_HIT_LOOKUP_END": "answer",
    "HTTP_SEND_START": "back to the client",
    "GRPC_SEND_START": "back to the client",
}
CLOCKS_APART_NS = 50_000  # of ONNX Runtime's and Triton's: whole microseconds, and two clocks that were compared once
PHASES = ("encode", "to the server", *dict.fromkeys(BEGINS.values()))


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request as its sender saw it."""

    request_id: str
    user: int
    encode_ns: int
    send_ns: int
    finish_ns: int


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time with a name."""

    name: str
    start_ns: int
    end_ns: int
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A request as Triton saw it."""

    id: int
    parent_id: int | None
    """Of the ensemble's request that this one is a step of."""
    model: str
    version: str
    request_id: str
    stamps: dict[str, int]

    def first(self, *endings: str) -> int | None:
        """The earliest stamp whose name ends so."""
        return min((ns for name, ns in self.stamps.items() if name.endswith(endings)), default=None)

    def phases(self, call: Call) -> list[Span]:
        """One after the other, without a gap, from the client's encoding to its receipt."""
        begun = sorted((ns, BEGINS[name]) for name, ns in self.stamps.items() if name in BEGINS)
        begun = [(call.encode_ns, "encode"), (call.send_ns, "to the server"), *begun]
        ends = [*(start for start, _ in begun[1:]), call.finish_ns]
        inside = [min(max(ns, call.encode_ns), call.finish_ns) for ns in ends]
        starts = [call.encode_ns, *inside[:-1]]
        return [
            Span(name=name, start_ns=start, end_ns=max(start, end))
            for (_, name), start, end in zip(begun, starts, inside, strict=True)
        ]

    def phase(self, name: str, call: Call) -> Span | None:
        """One of them."""
        return next((span for span in self.phases(call) if span.name == name), None)


@dataclass(frozen=True, kw_only=True)
class GraphRun:
    """One run of the graph in ONNX Runtime."""

    instance: str
    process: int
    thread: int
    start_ns: int
    end_ns: int
    inner: tuple[Span, ...]
    """What it consists of: ONNX Runtime's executor, and below it the operators."""

    @property
    def operators(self) -> list[Span]:
        """Those spans that are nodes of the graph."""
        return [span for span in self.inner if "op" in span.args]


def write_calls(folder: Path, calls: Iterable[Call], realtime_offset_ns: int) -> None:
    """Leaves what the client saw for `read_calls`."""
    data = {"realtime_offset_ns": realtime_offset_ns, "calls": [asdict(call) for call in calls]}
    (folder / "calls.json").write_text(json.dumps(data), encoding="utf-8")


def read_calls(folder: Path) -> tuple[list[Call], int]:
    """The requests in the order of their sending, and how far CLOCK_REALTIME is ahead."""
    data = json.loads((folder / "calls.json").read_text(encoding="utf-8"))
    calls = sorted((Call(**call) for call in data["calls"]), key=lambda call: call.send_ns)
    return calls, data["realtime_offset_ns"]


def read_traces(trace_file: Path, calls: Iterable[Call]) -> dict[str, list[Trace]]:
    """Request id -> its trace, then those of its steps where it is an ensemble's. Other clients' are left out."""
    fragments: dict[int, dict[str, Any]] = {}
    for path in trace_files(trace_file):
        for entry in _json(path):
            found = fragments.setdefault(entry["id"], {"stamps": {}})
            found["stamps"] |= {stamp["name"]: int(stamp["ns"]) for stamp in entry.get("timestamps", ())}
            found |= {key: value for key, value in entry.items() if key not in ("id", "timestamps")}
    traces = [_trace(number, found) for number, found in fragments.items()]
    by_request = {trace.request_id: [trace] for trace in traces if trace.parent_id is None}
    asked = {call.request_id: by_request.get(call.request_id, []) for call in calls}
    for own in asked.values():
        for trace in own:  # grows as it is read: steps of steps
            own += [step for step in traces if step.parent_id == trace.id]
    return {request_id: own for request_id, own in asked.items() if own}


def _trace(number: int, found: dict[str, Any]) -> Trace:
    return Trace(
        id=number,
        parent_id=found.get("parent_id"),
        model=found.get("model_name", ""),
        version=str(found.get("model_version", "")),
        request_id=found.get("request_id", ""),
        stamps=found["stamps"],
    )


def trace_files(trace_file: Path) -> list[Path]:
    """Triton writes the file itself, or with a log frequency numbered ones."""
    numbered = [path for path in trace_file.parent.glob(f"{trace_file.name}.*") if path.suffix[1:].isdigit()]
    return [path for path in [trace_file, *numbered] if path.is_file()]


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8") or "[]")
    except ValueError:  # one that Triton is still writing; asked again it is whole
        return []


def read_runs(folder: Path, realtime_offset_ns: int) -> list[GraphRun]:
    """Every run of every instance whose backend wrote a profile."""
    runs: list[GraphRun] = []
    for path in sorted(folder.glob("onnxruntime-*.json")):
        named = re.fullmatch(r"onnxruntime-(.+)\.(\d+)\.json", path.name)
        if named is None:
            continue  # one whose session was never closed
        try:
            events = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path}: ONNX Runtime's profile was cut off; the server was killed?") from None
        runs += _runs(named[1], events, int(named[2]) - realtime_offset_ns)
    return sorted(runs, key=lambda run: run.start_ns)


def _runs(instance: str, events: list[dict[str, Any]], start_ns: int) -> Iterable[GraphRun]:
    timed = [event for event in events if event.get("ph") == "X"]
    spans = [(_span(event, start_ns), event) for event in timed if not event["name"].endswith(("_before", "_after"))]
    spans.sort(key=lambda pair: (pair[0].start_ns, -pair[0].end_ns))
    starts = [span.start_ns for span, _ in spans]
    for index, (run, event) in enumerate(spans):
        if event["name"] == "model_run":
            inner = [span for span, _ in spans[index + 1 : bisect_left(starts, run.end_ns)]]
            ids = {"instance": instance, "process": event["pid"], "thread": event["tid"]}
            yield GraphRun(start_ns=run.start_ns, end_ns=run.end_ns, inner=tuple(inner), **ids)


def _span(event: dict[str, Any], start_ns: int) -> Span:
    """An event of ONNX Runtime's; an operator has its type, provider and shapes with it."""
    start = start_ns + int(event["ts"]) * 1000
    given = event.get("args") or {}
    args = {}
    if event.get("cat") == "Node" and "op_name" in given:
        args = {"op": given["op_name"], "provider": given.get("provider", "")}
        args |= {key: given[f"{key}_type_shape"] for key in ("input", "output") if f"{key}_type_shape" in given}
    name = event["name"].removesuffix("_kernel_time")
    return Span(name=name, start_ns=start, end_ns=start + int(event["dur"]) * 1000, args=args)


def run_of(trace: Trace, call: Call, runs: Iterable[GraphRun]) -> GraphRun | None:
    """The run of the graph that a request was in: the longest that lies within its infer phase.

    One that only reaches into it is another instance's, which runs at the same time.
    """
    infer = trace.phase("infer", call)
    if infer is None:
        return None
    instance = re.compile(rf"{re.escape(trace.model)}_\d+_\d+")  # group and number
    first_ns, last_ns = infer.start_ns - CLOCKS_APART_NS, infer.end_ns + CLOCKS_APART_NS
    mine = [
        run for run in runs if first_ns <= run.start_ns and run.end_ns <= last_ns and instance.fullmatch(run.instance)
    ]
    return max(mine, key=lambda run: run.end_ns - run.start_ns, default=None)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """All that is known of the requests of one profile."""

    calls: list[Call]
    traces: dict[str, list[Trace]]
    runs: list[GraphRun]
    note: str
    """What of it went wrong; empty where nothing did."""

    @classmethod
    def load(cls, folder: Path) -> Recorded:
        """Reads what a recording left, and the traces in the file that it names."""
        calls, offset_ns = read_calls(folder)
        about = json.loads((folder / "traced.json").read_text(encoding="utf-8"))
        trace_file = about["trace_file"]
        traces = read_traces(Path(trace_file), calls)
        if not traces:
            raise InvalidMeasurement(f"no trace of the requests in {trace_file}*; --trace-file says where it is")
        return cls(calls=calls, traces=traces, runs=read_runs(folder, offset_ns), note=about["note"])

    @property
    def traced(self) -> list[Call]:
        """The requests that Triton traced."""
        return [call for call in self.calls if call.request_id in self.traces]

    def runs_of(self, call: Call) -> list[GraphRun]:
        """Those that a request was in: one for each model that it went through."""
        found = (run_of(trace, call, self.runs) for trace in self.traces.get(call.request_id, ()))
        return [run for run in found if run is not None]

    @property
    def used(self) -> list[GraphRun]:
        """The runs that any of the requests was in, each once: a batch is one run of several requests."""
        return list({id(run): run for call in self.traced for run in self.runs_of(call)}.values())
