"""A timeline of profiled requests as Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Contract: one clock, microseconds since the first request was encoded. The client, Triton and each backend process are
processes of the timeline; their threads have names. Slices of a thread nest or follow one another, as the format asks:
requests that overlap in Triton lie in lanes of their own. Arrows (flow events) lead each request from the client
through Triton to its run of the graph and back.

Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, "Trace Event Format"; and as Perfetto
reads it (its src/trace_processor/importers/json): whole nanoseconds, cut off rather than rounded; a slice that reaches
a nanosecond beyond the one it lies in is dropped; a point of an arrow holds on to the slice that began last before it,
in the order of the file where times are the same; a thread is named by its number alone.

Example:
    events = timeline(calls, traces, runs)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loadtests.profile.sources import Call, GraphRun, Span, Trace, run_of

CLIENT, TRITON, BACKENDS = 1, 2, 3  # process numbers of the timeline
FIRST_THREAD = 101  # numbers of threads are those of no process, and no two are the same
OUTSIDE = ("encode", "to the server", "back to the client")  # phases that are the client's to show

Event = dict[str, Any]


class _Timeline:
    """Events with times since `zero_ns`."""

    def __init__(self, zero_ns: int) -> None:
        self._zero_ns = zero_ns
        self._drawn: list[Event] = []
        self._arrows: list[Event] = []
        self._threads: dict[tuple[int, str], int] = {}

    @property
    def events(self) -> list[Event]:
        """All of them; arrows come last, so that what they hold on to is there."""
        return self._drawn + self._arrows

    def process(self, number: int, name: str) -> None:
        """Names a process; they stand in the order of their numbers."""
        for kind, args in (("process_name", {"name": name}), ("process_sort_index", {"sort_index": number})):
            self._drawn.append({"ph": "M", "name": kind, "pid": number, "tid": number, "ts": 0, "args": args})

    def thread(self, process: int, name: str) -> int:
        """The number of the process's thread of this name."""
        number = self._threads.get((process, name))
        if number is None:
            number = self._threads[process, name] = FIRST_THREAD + len(self._threads)
            place = {"pid": process, "tid": number, "ts": 0}
            self._drawn.append({"ph": "M", "name": "thread_name", **place, "args": {"name": name}})
            self._drawn.append({"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": number}})
        return number

    def slice(self, process: int, thread: int, span: Span, category: str, within: Span | None = None) -> Span:
        """A slice, cut to the one that it lies in."""
        start_ns, end_ns = span.start_ns, span.end_ns
        if within is not None:
            start_ns = min(max(start_ns, within.start_ns), within.end_ns)
            end_ns = min(max(end_ns, start_ns), within.end_ns)
        ends = {"ts": self._us(start_ns), "dur": microseconds(end_ns - start_ns)}
        place = {"pid": process, "tid": thread}
        self._drawn.append({"ph": "X", "name": span.name, "cat": category, **place, **ends, "args": span.args})
        return Span(name=span.name, start_ns=start_ns, end_ns=end_ns)

    def flow(self, number: int, step: str, process: int, thread: int, at_ns: int) -> None:
        """One point of an arrow; it holds on to the slice there. `step` is s, t or f: starts, goes on, ends."""
        place = {"pid": process, "tid": thread, "ts": self._us(at_ns)}
        ends = {"bp": "e"} if step == "f" else {}  # the slice around, not the next one
        self._arrows.append({"ph": step, "name": "request", "cat": "request", "id": number, **place, **ends})

    def _us(self, at_ns: int) -> float:
        return microseconds(at_ns - self._zero_ns)


def microseconds(ns: int) -> float:
    """So that a reader who multiplies by a thousand and cuts off has the nanoseconds again: 0.29 would give 289."""
    found = ns / 1000
    return found if int(found * 1000) == ns else math.nextafter(found, math.inf)


def timeline(calls: Sequence[Call], traces: dict[str, list[Trace]], runs: Sequence[GraphRun]) -> list[Event]:
    """The events; requests without a trace show their client's side alone."""
    drawn = _Timeline(min((call.encode_ns for call in calls), default=0))
    drawn.process(CLIENT, "client")
    drawn.process(TRITON, "Triton")
    for user in sorted({call.user for call in calls}):
        drawn.thread(CLIENT, _user(user))
    lanes = _Lanes(drawn)
    backends = _Backends(drawn)
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
                drawn.flow(number, "t", *backends.place(run), run.start_ns)
        last_ns = max(call.send_ns, call.finish_ns - 1)  # within the slice: at its end the next may begin
        drawn.flow(number, "f", CLIENT, drawn.thread(CLIENT, _user(call.user)), last_ns)
    return drawn.events


def _user(number: int) -> str:
    return f"user {number + 1}"


class _Lanes:
    """Threads of Triton's process: a request takes the first that is free."""

    def __init__(self, drawn: _Timeline) -> None:
        self._drawn = drawn
        self._free_ns: dict[str, list[int]] = {}

    def take(self, kind: str, start_ns: int, end_ns: int) -> int:
        lanes = self._free_ns.setdefault(kind, [])
        index = next((index for index, free_ns in enumerate(lanes) if free_ns <= start_ns), len(lanes))
        lanes[index : index + 1] = [end_ns]
        return self._drawn.thread(TRITON, f"{kind} {index + 1}")


def _draw_client(drawn: _Timeline, call: Call, number: int) -> None:
    thread = drawn.thread(CLIENT, _user(call.user))
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


class _Backends:
    """Backend processes, each run of the graph drawn once: a batch is one run of several requests."""

    def __init__(self, drawn: _Timeline) -> None:
        self._drawn = drawn
        self._processes: dict[int, int] = {}
        self._seen: set[int] = set()

    def place(self, run: GraphRun) -> tuple[int, int]:
        """Process and thread of the timeline that show a run, which is drawn if it was not."""
        process = self._processes.get(run.process)
        if process is None:
            process = self._processes[run.process] = BACKENDS + len(self._processes)
            self._drawn.process(process, f"backend {run.instance} (process {run.process})")
        thread = self._drawn.thread(process, f"ONNX Runtime (thread {run.thread})")
        if id(run) not in self._seen:
            self._seen.add(id(run))
            self._draw(run, process, thread)
        return process, thread

    def _draw(self, run: GraphRun, process: int, thread: int) -> None:
        whole = Span(name="run of the graph", start_ns=run.start_ns, end_ns=run.end_ns)
        self._drawn.slice(process, thread, whole, "onnxruntime")
        open_spans = [whole]
        for span in run.inner:  # by their start, the longer first
            while len(open_spans) > 1 and span.start_ns >= open_spans[-1].end_ns:
                open_spans.pop()
            open_spans.append(self._drawn.slice(process, thread, span, "onnxruntime", within=open_spans[-1]))
