"""A timeline of profiled requests as Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Contract: one clock, microseconds since the first request was encoded. The client, Triton and each backend process are
processes of the timeline; their threads have names. Slices of a thread nest or follow one another, as the format asks:
requests that overlap in Triton lie in lanes of their own. Arrows (flow events) lead each request from the client
through Triton to its run of the graph and back.

Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, "Trace Event Format".

Example:
    events = timeline(calls, traces, runs)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loadtests.profile.sources import Call, GraphRun, Span, Trace, run_of

CLIENT, TRITON = 1, 2  # process numbers of the timeline; backend processes keep their own, which are larger
OUTSIDE = ("encode", "to the server", "back to the client")  # phases that are the client's to show

Event = dict[str, Any]


class _Timeline:
    """Events with times since `zero_ns`."""

    def __init__(self, zero_ns: int) -> None:
        self._zero_ns = zero_ns
        self.events: list[Event] = []

    def name(self, process: int, name: str, order: int) -> None:
        for kind, args in (("process_name", {"name": name}), ("process_sort_index", {"sort_index": order})):
            self.events.append({"ph": "M", "name": kind, "pid": process, "tid": 0, "ts": 0, "args": args})

    def name_thread(self, process: int, thread: int, name: str) -> None:
        args = {"name": name}
        self.events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "ts": 0, "args": args})

    def slice(self, process: int, thread: int, span: Span, category: str, within: Span | None = None) -> Span:
        """A slice, cut to the one that it lies in."""
        start_ns, end_ns = span.start_ns, span.end_ns
        if within is not None:
            start_ns = min(max(start_ns, within.start_ns), within.end_ns)
            end_ns = min(max(end_ns, start_ns), within.end_ns)
        ends = {"ts": self._us(start_ns), "dur": (end_ns - start_ns) / 1000}
        place = {"pid": process, "tid": thread}
        self.events.append({"ph": "X", "name": span.name, "cat": category, **place, **ends, "args": span.args})
        return Span(name=span.name, start_ns=start_ns, end_ns=end_ns)

    def flow(self, number: int, step: str, process: int, thread: int, at_ns: int) -> None:
        """One point of an arrow; it holds on to the slice there. `step` is s, t or f: starts, goes on, ends."""
        place = {"pid": process, "tid": thread, "ts": self._us(at_ns)}
        ends = {"bp": "e"} if step == "f" else {}  # the slice around, not the next one
        self.events.append({"ph": step, "name": "request", "cat": "request", "id": number, **place, **ends})

    def _us(self, at_ns: int) -> float:
        return (at_ns - self._zero_ns) / 1000


def timeline(calls: Sequence[Call], traces: dict[str, list[Trace]], runs: Sequence[GraphRun]) -> list[Event]:
    """The events; requests without a trace show their client's side alone."""
    drawn = _Timeline(min((call.encode_ns for call in calls), default=0))
    drawn.name(CLIENT, "client", 0)
    drawn.name(TRITON, "Triton", 1)
    for user in sorted({call.user for call in calls}):
        drawn.name_thread(CLIENT, user + 1, f"user {user + 1}")
    lanes = _Lanes()
    used: list[GraphRun] = []
    for number, call in enumerate(calls, start=1):
        own = traces.get(call.request_id, [])
        _draw_client(drawn, call, number)
        if not own:
            continue
        _draw_triton(drawn, lanes, call, own[0], number)
        for each in own:
            if each is not own[0]:
                _draw_step(drawn, lanes, each)
            if run := run_of(each, call, runs):
                drawn.flow(number, "t", run.process, run.thread, run.start_ns)
                used.append(run)
        drawn.flow(number, "f", CLIENT, call.user + 1, call.finish_ns)
    _draw_backends(drawn, list({id(run): run for run in used}.values()))
    for lane, name in lanes.names.items():
        drawn.name_thread(TRITON, lane, name)
    return drawn.events


class _Lanes:
    """Threads of Triton's process: a request takes the first that is free."""

    def __init__(self) -> None:
        self._free_ns: dict[str, list[tuple[int, int]]] = {}
        self.names: dict[int, str] = {}

    def take(self, kind: str, start_ns: int, end_ns: int) -> int:
        lanes = self._free_ns.setdefault(kind, [])
        for index, (free_ns, lane) in enumerate(lanes):
            if free_ns <= start_ns:
                lanes[index] = (end_ns, lane)
                return lane
        lane = len(self.names) + 1
        lanes.append((end_ns, lane))
        self.names[lane] = f"{kind} {len(lanes)}"
        return lane


def _draw_client(drawn: _Timeline, call: Call, number: int) -> None:
    thread = call.user + 1
    args = {"request_id": call.request_id}
    whole = Span(name=f"request {number}", start_ns=call.encode_ns, end_ns=call.finish_ns, args=args)
    drawn.slice(CLIENT, thread, whole, "client")
    drawn.slice(CLIENT, thread, Span(name="encode", start_ns=call.encode_ns, end_ns=call.send_ns), "client")
    wait = Span(name="send, wait, receive", start_ns=call.send_ns, end_ns=call.finish_ns)
    drawn.slice(CLIENT, thread, wait, "client")
    drawn.flow(number, "s", CLIENT, thread, call.send_ns)


def _draw_triton(drawn: _Timeline, lanes: _Lanes, call: Call, trace: Trace, number: int) -> None:
    """From receiving the request to having sent the answer, which may be after the client has it."""
    received = trace.first("RECV_START", "WAITREAD_START") or call.send_ns
    start_ns = max(received, call.send_ns)  # gRPC waits for a message long before it comes
    sent = trace.first("SEND_END") or call.finish_ns
    args = {"request_id": call.request_id, "model": trace.model, "version": trace.version}
    whole = Span(name=f"request {number}: {trace.model}", start_ns=start_ns, end_ns=sent, args=args)
    lane = lanes.take("request lane", start_ns, sent)
    drawn.slice(TRITON, lane, whole, "triton")
    phases = [phase for phase in trace.phases(call) if phase.name not in OUTSIDE]
    first_ns = phases[0].start_ns if phases else sent
    phases.insert(0, Span(name="receive", start_ns=start_ns, end_ns=first_ns))
    if (sending := trace.first("SEND_START")) is not None:
        phases.append(Span(name="send", start_ns=sending, end_ns=sent))
    for phase in phases:
        drawn.slice(TRITON, lane, phase, "triton", within=whole)
    drawn.flow(number, "t", TRITON, lane, start_ns)


def _draw_step(drawn: _Timeline, lanes: _Lanes, trace: Trace) -> None:
    """A step of an ensemble, in a lane of its model."""
    start_ns, end_ns = trace.first("REQUEST_START"), trace.first("REQUEST_END")
    if start_ns is None or end_ns is None:
        return
    whole = Span(name=trace.model, start_ns=start_ns, end_ns=end_ns, args={"version": trace.version})
    lane = lanes.take(f"{trace.model}, lane", start_ns, end_ns)
    drawn.slice(TRITON, lane, whole, "triton")
    call = Call(request_id="", user=0, encode_ns=start_ns, send_ns=start_ns, finish_ns=end_ns)
    for phase in trace.phases(call):
        if phase.name not in OUTSIDE:
            drawn.slice(TRITON, lane, phase, "triton", within=whole)


def _draw_backends(drawn: _Timeline, runs: Iterable[GraphRun]) -> None:
    named: set[int] = set()
    for run in runs:
        if run.process not in named:
            named.add(run.process)
            drawn.name(run.process, f"backend {run.instance}", 1 + len(named))
            drawn.name_thread(run.process, run.thread, "ONNX Runtime")
        whole = Span(name="run of the graph", start_ns=run.start_ns, end_ns=run.end_ns)
        drawn.slice(run.process, run.thread, whole, "onnxruntime")
        open_spans = [whole]
        for span in run.inner:  # by their start, the longer first
            while len(open_spans) > 1 and span.start_ns >= open_spans[-1].end_ns:
                open_spans.pop()
            open_spans.append(drawn.slice(run.process, run.thread, span, "onnxruntime", within=open_spans[-1]))
