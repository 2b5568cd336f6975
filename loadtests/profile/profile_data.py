"""The data of profiled requests: the client's times, Triton's traces, ONNX Runtime's operator times.

Contract: all times are nanoseconds of CLOCK_MONOTONIC, which Python (`time.monotonic_ns`), Triton's traces and every
container of a machine share. ONNX Runtime counts microseconds from a start in CLOCK_REALTIME; they are converted with
the offset of the two clocks at the time of the recording.

Example:
    recorded = Recorded.load(folder)
    recorded.run_of(recorded.traced[0]).operators
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek.spec import InputError, InvalidMeasurement

# The phase that begins at each of Triton's time stamps; it ends at the next stamp or the client's receipt.
BEGINS = {
    "HTTP_RECV_END": "request decoded",
    "GRPC_WAITREAD_END": "request decoded",
    "QUEUE_START": "queue",
    "COMPUTE_START": "compute input",
    "COMPUTE_INPUT_END": "infer",
    "COMPUTE_OUTPUT_START": "compute output",
    "COMPUTE_END": "answer",
    "HTTP_SEND_START": "back to the client",
    "GRPC_SEND_START": "back to the client",
}
CLOCKS_APART_NS = 50_000  # tolerance between ONNX Runtime and Triton: whole microseconds, and one clock comparison
PHASES = ("encode", "to the server", *dict.fromkeys(BEGINS.values()))


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request, with the client's times."""

    request_id: str
    user: int
    encode_ns: int
    send_ns: int
    finish_ns: int


@dataclass(frozen=True, kw_only=True)
class Span:
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A request, with Triton's times."""

    model: str
    version: str
    request_id: str
    stamps: dict[str, int]

    def first(self, *endings: str) -> int | None:
        """The earliest stamp with one of these endings; None if there is none."""
        return min((ns for name, ns in self.stamps.items() if name.endswith(endings)), default=None)

    def phases(self, call: Call) -> list[Span]:
        """The phases in order, without gaps, from the client's encoding to its receipt."""
        begun = sorted((ns, BEGINS[name]) for name, ns in self.stamps.items() if name in BEGINS)
        begun = [(call.encode_ns, "encode"), (call.send_ns, "to the server"), *begun]
        ends = [*(start for start, _ in begun[1:]), call.finish_ns]
        inside = [min(max(ns, call.encode_ns), call.finish_ns) for ns in ends]
        starts = [call.encode_ns, *inside[:-1]]
        return [
            Span(name=name, start_ns=start, end_ns=max(start, end))
            for (_, name), start, end in zip(begun, starts, inside, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class GraphRun:
    instance: str
    process: int
    thread: int
    start_ns: int
    end_ns: int
    inner: tuple[Span, ...]
    """Its parts: ONNX Runtime's executor, and the operators inside it."""

    @property
    def operators(self) -> list[Span]:
        return [span for span in self.inner if "op" in span.args]


def read_traces(trace_file: Path, calls: Iterable[Call]) -> dict[str, Trace]:
    """Request id -> trace, for the given calls only."""
    fragments: dict[int, dict[str, Any]] = {}
    for path in trace_files(trace_file):
        for entry in _json(path):
            found = fragments.setdefault(entry["id"], {"stamps": {}})
            found["stamps"] |= {stamp["name"]: int(stamp["ns"]) for stamp in entry.get("timestamps", ())}
            found |= {key: value for key, value in entry.items() if key not in ("id", "timestamps")}
    asked = {call.request_id for call in calls}
    return {
        found["request_id"]: Trace(
            model=found["model_name"],
            version=str(found["model_version"]),
            request_id=found["request_id"],
            stamps=found["stamps"],
        )
        for found in fragments.values()
        if found.get("request_id") in asked and "parent_id" not in found
    }


def trace_files(trace_file: Path) -> list[Path]:
    """The files that Triton wrote: the trace file itself, or numbered ones if it has a log frequency."""
    numbered = [path for path in trace_file.parent.glob(f"{trace_file.name}.*") if path.suffix[1:].isdigit()]
    return [path for path in [trace_file, *numbered] if path.is_file()]


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8") or "[]")
    except ValueError:  # Triton is still writing it; the caller reads again
        return []


def read_runs(folder: Path, realtime_offset_ns: int) -> list[GraphRun]:
    """The runs of all instances whose backend wrote a profile, by start."""
    runs: list[GraphRun] = []
    for path in sorted(folder.glob("onnxruntime-*.json")):
        named = re.fullmatch(r"onnxruntime-(.+)\.(\d+)\.json", path.name)
        if named is None:
            continue  # its session was never closed
        try:
            events = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path}: ONNX Runtime's profile is truncated; was the server killed? Re-run it") from None
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
    """The span of an ONNX Runtime event; operators also have type, provider and shapes."""
    start = start_ns + int(event["ts"]) * 1000
    given = event.get("args") or {}
    args = {}
    if event.get("cat") == "Node" and "op_name" in given:
        args = {"op": given["op_name"], "provider": given.get("provider", "")}
        args |= {key: given[f"{key}_type_shape"] for key in ("input", "output") if f"{key}_type_shape" in given}
    name = event["name"].removesuffix("_kernel_time")
    return Span(name=name, start_ns=start, end_ns=start + int(event["dur"]) * 1000, args=args)


def run_of(trace: Trace, call: Call, runs: Iterable[GraphRun]) -> GraphRun | None:
    """The run of the graph that includes a request: the longest run within its infer phase.

    Runs that only overlap the phase belong to another instance.
    """
    infer = next((span for span in trace.phases(call) if span.name == "infer"), None)
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
    calls: list[Call]
    """In sending order."""
    traces: dict[str, Trace]
    runs: list[GraphRun] = field(default_factory=list)
    note: str = ""
    """What went wrong; empty if nothing did."""

    @classmethod
    def load(cls, folder: Path) -> "Recorded":
        """Reads a recording and its trace file; InvalidMeasurement if that has no trace of the requests."""
        about = json.loads((folder / "calls.json").read_text(encoding="utf-8"))
        calls = sorted((Call(**call) for call in about["calls"]), key=lambda call: call.send_ns)
        traces = read_traces(Path(about["trace_file"]), calls)
        if not traces:
            raise InvalidMeasurement(
                f"no trace of the requests in {about['trace_file']}*; give its place with --trace-file"
            )
        runs = read_runs(folder, about["realtime_offset_ns"])
        return cls(calls=calls, traces=traces, runs=runs, note=about["note"])

    @property
    def traced(self) -> list[Call]:
        return [call for call in self.calls if call.request_id in self.traces]

    def run_of(self, call: Call) -> GraphRun | None:
        trace = self.traces.get(call.request_id)
        return None if trace is None else run_of(trace, call, self.runs)

    @property
    def used(self) -> list[GraphRun]:
        """The runs that include any of the requests, each once, since a batch is one run of several requests."""
        return list({id(run): run for call in self.traced if (run := self.run_of(call))}.values())
