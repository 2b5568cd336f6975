"""A timeline of profiled requests as Chrome trace JSON, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Contract: one clock, microseconds since the first request was encoded. The client, Triton and each backend process are
processes of the timeline, with named threads. Slices of a thread nest or follow each other, as the format demands;
requests that overlap in Triton get separate lanes. Arrows (flow events) connect each request from the client through
Triton to its run of the graph and back.

Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, "Trace Event Format". Perfetto's reader
(its src/trace_processor/importers/json) adds: times are truncated to whole nanoseconds; a slice that ends a nanosecond
after its parent is dropped; an arrow attaches to the latest slice that began before its point, in file order if times
are equal; a thread is identified by its number alone.

Example:
    events = timeline(Recorded.load(folder))
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
"""

import math
from typing import Any

from loadtests.profile.profile_data import Call, GraphRun, Recorded, Span, Trace

CLIENT, TRITON, BACKENDS = 1, 2, 3  # process numbers of the timeline
FIRST_THREAD = 101  # thread numbers are unique and differ from all process numbers
OUTSIDE = ("encode", "to the server", "back to the client")  # phases that the client's rows show

Event = dict[str, Any]


class _Timeline:
    """Events with times since `zero_ns`."""

    def __init__(self, zero_ns: int) -> None:
        self._zero_ns = zero_ns
        self._drawn: list[Event] = []
        self._arrows: list[Event] = []
        self._threads: dict[tuple[int, str], int] = {}
        self._lanes: list[int] = []  # the time from which each request lane is free
        self._places: dict[int, tuple[int, int]] = {}  # process and thread of each drawn run
        self._backends: dict[int, int] = {}  # process -> its number in the timeline

    @property
    def events(self) -> list[Event]:
        """All events; arrows come last, after the slices to which they attach."""
        return self._drawn + self._arrows

    def process(self, number: int, name: str) -> None:
        """Names a process; processes are shown in the order of their numbers."""
        self._name("process", {"pid": number, "tid": number}, name, number)

    def _name(self, what: str, place: dict[str, int], name: str, order: int) -> None:
        for kind, args in ((f"{what}_name", {"name": name}), (f"{what}_sort_index", {"sort_index": order})):
            self._drawn.append({"ph": "M", "name": kind, **place, "ts": 0, "args": args})

    def thread(self, process: int, name: str) -> int:
        """The number of a process's thread with this name; made if needed."""
        number = self._threads.get((process, name))
        if number is None:
            number = self._threads[process, name] = FIRST_THREAD + len(self._threads)
            self._name("thread", {"pid": process, "tid": number}, name, number)
        return number

    def lane(self, start_ns: int, end_ns: int) -> int:
        """The first lane of Triton's process that is free for a request, as a thread number."""
        index = next((index for index, free_ns in enumerate(self._lanes) if free_ns <= start_ns), len(self._lanes))
        self._lanes[index : index + 1] = [end_ns]
        return self.thread(TRITON, f"request lane {index + 1}")

    def slice(self, process: int, thread: int, span: Span, category: str, within: Span | None = None) -> Span:
        """Draws a slice, clipped to `within`; returns the clipped span."""
        start_ns, end_ns = span.start_ns, span.end_ns
        if within is not None:
            start_ns = min(max(start_ns, within.start_ns), within.end_ns)
            end_ns = min(max(end_ns, start_ns), within.end_ns)
        ends = {"ts": self._us(start_ns), "dur": microseconds(end_ns - start_ns)}
        place = {"pid": process, "tid": thread}
        self._drawn.append({"ph": "X", "name": span.name, "cat": category, **place, **ends, "args": span.args})
        return Span(name=span.name, start_ns=start_ns, end_ns=end_ns)

    def flow(self, number: int, step: str, process: int, thread: int, at_ns: int) -> None:
        """Draws one point of an arrow, attached to the slice there. `step` is s (start), t (step) or f (end)."""
        place = {"pid": process, "tid": thread, "ts": self._us(at_ns)}
        ends = {"bp": "e"} if step == "f" else {}  # the slice around, not the next one
        self._arrows.append({"ph": step, "name": "request", "cat": "request", "id": number, **place, **ends})

    def _us(self, at_ns: int) -> float:
        return microseconds(at_ns - self._zero_ns)

    def graph_run(self, run: GraphRun) -> tuple[int, int]:
        """The process and thread that show a run; drawn once, since a batch is one run of several requests."""
        if id(run) in self._places:
            return self._places[id(run)]
        process = self._backends.get(run.process)
        if process is None:
            process = self._backends[run.process] = BACKENDS + len(self._backends)
            self.process(process, f"backend {run.instance} (process {run.process})")
        thread = self.thread(process, f"ONNX Runtime (thread {run.thread})")
        whole = Span(name="run of the graph", start_ns=run.start_ns, end_ns=run.end_ns)
        self.slice(process, thread, whole, "onnxruntime")
        open_spans = [whole]
        for span in run.inner:  # by their start, the longer first
            while len(open_spans) > 1 and span.start_ns >= open_spans[-1].end_ns:
                open_spans.pop()
            open_spans.append(self.slice(process, thread, span, "onnxruntime", within=open_spans[-1]))
        self._places[id(run)] = process, thread
        return process, thread


def microseconds(ns: int) -> float:
    """Converts so that multiplying by 1000 and truncating gives `ns` again: plain 0.29 would give 289."""
    found = ns / 1000
    return found if int(found * 1000) == ns else math.nextafter(found, math.inf)


def timeline(recorded: Recorded) -> list[Event]:
    """The events of a recording; requests without a trace show only the client's side."""
    drawn = _Timeline(min((call.encode_ns for call in recorded.calls), default=0))
    drawn.process(CLIENT, "client")
    drawn.process(TRITON, "Triton")
    users = {user: drawn.thread(CLIENT, f"user {user + 1}") for user in sorted({call.user for call in recorded.calls})}
    for number, call in enumerate(recorded.calls, start=1):
        thread = users[call.user]
        _draw_client(drawn, call, thread, number)
        if (trace := recorded.traces.get(call.request_id)) is None:
            continue
        drawn.flow(number, "s", CLIENT, thread, call.send_ns)
        _draw_triton(drawn, call, trace, number)
        if run := recorded.run_of(call):
            drawn.flow(number, "t", *drawn.graph_run(run), run.start_ns)
        last_ns = max(call.send_ns, call.finish_ns - 1)  # inside the slice: the next one may begin at its end
        drawn.flow(number, "f", CLIENT, thread, last_ns)
    return drawn.events


def _draw_client(drawn: _Timeline, call: Call, thread: int, number: int) -> None:
    args = {"request_id": call.request_id}
    for span in (
        Span(name=f"request {number}", start_ns=call.encode_ns, end_ns=call.finish_ns, args=args),
        Span(name="encode", start_ns=call.encode_ns, end_ns=call.send_ns),
        Span(name="send, wait, receive", start_ns=call.send_ns, end_ns=call.finish_ns),
    ):
        drawn.slice(CLIENT, thread, span, "client")


def _draw_triton(drawn: _Timeline, call: Call, trace: Trace, number: int) -> None:
    """Draws a request from its receipt to the sent answer, which may end after the client has it."""
    received = trace.first("RECV_START", "WAITREAD_START") or call.send_ns
    start_ns = max(received, call.send_ns)  # gRPC starts to wait long before the message arrives
    sent = trace.first("SEND_END") or call.finish_ns
    args = {"request_id": call.request_id, "model": trace.model, "version": trace.version}
    whole = Span(name=f"request {number}: {trace.model}", start_ns=start_ns, end_ns=sent, args=args)
    lane = drawn.lane(start_ns, sent)
    drawn.slice(TRITON, lane, whole, "triton")
    phases = [phase for phase in trace.phases(call) if phase.name not in OUTSIDE]
    phases.insert(0, Span(name="receive", start_ns=start_ns, end_ns=phases[0].start_ns if phases else sent))
    if (sending := trace.first("SEND_START")) is not None:
        phases.append(Span(name="send", start_ns=sending, end_ns=sent))
    for phase in phases:
        drawn.slice(TRITON, lane, phase, "triton", within=whole)
    drawn.flow(number, "t", TRITON, lane, start_ns)
