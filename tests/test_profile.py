"""Profiles: one clock for client, Triton and operators, and a timeline that the trace-event format allows."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient, ServerBusy

from cli.main import main as command_line
from cli.main import values_of
from deepseek.spec import InputError
from loadtests.profile.figures import functions, operators, phases
from loadtests.profile.profile import _server, wrapped_in_nsys
from loadtests.profile.profile_data import (
    CLOCKS_APART_NS,
    Call,
    GraphRun,
    Recorded,
    Span,
    Trace,
    read_runs,
    run_of,
)
from loadtests.profile.record import _send, trace
from loadtests.profile.timeline import microseconds, timeline
from serving.embedded.launcher import EmbeddedServer
from tests.add_one import write_add_one
from tests.conftest import FREE, run_module
from tests.fake_endpoint import FakeEndpoint

ROWS = [{"x": np.ones((1, 2, 3), np.float32)}]
STAMPS = {
    "HTTP_RECV_START": 1100, "HTTP_RECV_END": 1200, "REQUEST_START": 1250, "QUEUE_START": 1300, "COMPUTE_START": 1500,
    "COMPUTE_INPUT_END": 1600, "COMPUTE_OUTPUT_START": 1900, "COMPUTE_END": 1950, "REQUEST_END": 1960,
    "HTTP_SEND_START": 2000, "HTTP_SEND_END": 2150,
}  # fmt: skip


def call(**changes: Any) -> Call:
    fixed: dict[str, Any] = {"request_id": "a", "user": 0, "encode_ns": 1000, "send_ns": 1050, "finish_ns": 2100}
    return Call(**fixed | changes)


def traced(**changes: Any) -> Trace:
    fixed: dict[str, Any] = {"model": "m", "version": "1", "request_id": "a"}
    return Trace(**{**fixed, "stamps": STAMPS, **changes})


def graph_run(start_ns: int, end_ns: int, instance: str = "m_0_0") -> GraphRun:
    inner = (
        Span(name="execute", start_ns=start_ns, end_ns=end_ns + 1),  # rounded beyond its parent
        Span(name="matmul_1", start_ns=start_ns + 10, end_ns=start_ns + 60, args={"op": "MatMul"}),
        Span(name="add_1", start_ns=start_ns + 60, end_ns=start_ns + 80, args={"op": "Add"}),
    )
    return GraphRun(instance=instance, process=70, thread=71, start_ns=start_ns, end_ns=end_ns, inner=inner)


Slice = tuple[str, int, int]  # name, start and end in nanoseconds


def check_trace_events(events: list[dict[str, Any]]) -> None:
    """Checks the rules of the Trace Event Format, and those of Perfetto for a complete display."""
    assert {event["ph"] for event in events} <= set("XMstf")
    assert min(event["ts"] for event in events) >= 0
    threads = [e["tid"] for e in events if e["name"] == "thread_name"]
    assert len(set(threads)) == len(threads)  # Perfetto names a thread by its number, in any process
    for steps in as_perfetto_reads(events).values():
        assert re.fullmatch("st*f?", "".join(step for step, _ in steps))


def as_perfetto_reads(events: list[dict[str, Any]]) -> dict[int, list[tuple[str, str]]]:
    """Each arrow's steps with the slices to which they attach; checks that nothing is dropped.

    Follows Perfetto's trace processor: truncated nanoseconds, ordered by time and then by place in the file, one stack
    of slices per thread. A slice that ends after its parent is dropped, and so is an arrow's step without a slice.
    """
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    stacks: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    arrows: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for event in sorted((e for e in events if e["ph"] != "M"), key=lambda e: int(e["ts"] * 1000)):
        start = int(event["ts"] * 1000)
        stack = stacks[event["pid"], event["tid"]]
        if event["ph"] == "X":
            assert (event["pid"], event["tid"]) in named
            end = start + int(event["dur"] * 1000)
            while stack and stack[-1][2] <= start:
                stack.pop()
            assert not stack or end <= stack[-1][2], f"{event['name']} is dropped: it reaches beyond {stack[-1][0]}"
            stack.append((event["name"], start, end))
        else:
            assert stack, f"{event['ph']} of {event['id']} holds on to nothing"
            assert stack[-1][1] <= start <= stack[-1][2]
            arrows[event["id"]].append((event["ph"], stack[-1][0]))
    return arrows


def test_all_ports_of_its_server_are_free_ones() -> None:
    """Another server may have the usual ports, the OpenAI routes' included."""
    command = _server(Namespace(repository=Path("somewhere")))
    options = vars(values_of("serve", *command[command.index("serve") + 1 :]))
    assert {name: value for name, value in options.items() if name.endswith("_port") and value != 0} == {}


@pytest.mark.parametrize("ns", [0, 1, 289, 290, 1001, 123_457, 4_035_003, 86_400_000_000_001])
def test_whole_nanoseconds_survive_a_reader_that_truncates(ns: int) -> None:
    assert int(microseconds(ns) * 1000) == ns
    assert int(json.loads(json.dumps(microseconds(ns))) * 1000) == ns


def test_phases_have_no_gaps_and_add_up_to_the_request() -> None:
    spans = traced().phases(call())
    assert [span.name for span in spans] == [
        "encode", "to the server", "request decoded", "queue", "compute input", "infer", "compute output", "answer",
        "back to the client",
    ]  # fmt: skip
    assert all(left.end_ns == right.start_ns for left, right in itertools.pairwise(spans))
    assert (spans[0].start_ns, spans[-1].end_ns) == (1000, 2100)
    assert {span.name: span.end_ns - span.start_ns for span in spans}["infer"] == 300


def test_a_request_belongs_to_the_run_within_its_infer_phase() -> None:
    apart = 100 * CLOCKS_APART_NS
    trace = traced(stamps={name: ns * apart for name, ns in STAMPS.items()})
    sent = call(encode_ns=1000 * apart, send_ns=1050 * apart, finish_ns=2100 * apart)
    mine, other = graph_run(1660 * apart, 1890 * apart), graph_run(1660 * apart, 1890 * apart, "m_b_0_0")
    before, reaches_in = graph_run(1400 * apart, 1650 * apart), graph_run(1500 * apart, 1880 * apart, "m_0_1")
    assert run_of(trace, sent, [before, reaches_in, mine, other]) is mine
    assert run_of(trace, sent, [before, reaches_in, other]) is None


def test_requests_that_overlap_and_rounded_operators_still_nest() -> None:
    calls = [call(), call(request_id="b", user=1, encode_ns=1010)]
    traces = {"a": traced(), "b": traced(request_id="b")}
    events = timeline(Recorded(calls=calls, traces=traces, runs=[graph_run(1660, 1890)]))
    check_trace_events(events)
    lanes = {e["tid"] for e in events if e["ph"] == "X" and e["name"].endswith(": m")}
    assert len(lanes) == 2
    runs = [e for e in events if e["name"] == "run of the graph"]
    assert len(runs) == 1  # one batch for both: drawn once, with two arrows
    assert as_perfetto_reads(events)[2] == [
        ("s", "send, wait, receive"), ("t", "receive"), ("t", "execute"), ("f", "send, wait, receive"),
    ]  # fmt: skip
    assert any(e["args"].get("name") == "backend m_0_0 (process 70)" for e in events if e["ph"] == "M")
    alone = timeline(Recorded(calls=[call()], traces={}))  # without a trace: only the client's side
    check_trace_events(alone)
    assert [e["name"] for e in alone if e["ph"] == "X"] == ["request 1", "encode", "send, wait, receive"]


def test_operators_are_summed_by_type_in_one_run_of_the_graph() -> None:
    first, second = operators([graph_run(1000, 1100), graph_run(2000, 2100)])
    assert (first.op, first.calls, first.slowest_node) == ("MatMul", 1, "matmul_1")
    assert first.mean_ms == pytest.approx(50e-6)
    assert first.share + second.share == pytest.approx(1)


def test_a_functions_cpu_time_is_its_share_of_its_threads(tmp_path: Path) -> None:
    frames = [{"name": "execute", "file": "/a/model.py"}, {"name": "run", "file": "/b/ort.py"}, {"name": "wait"}]
    threads = [('Thread 7 "main"', [[0, 1], [0, 1], [0]]), ('Thread 8 "sender"', [[2], [2], [2]])]
    profiles = [{"name": name, "samples": stacks, "weights": [1] * len(stacks)} for name, stacks in threads]
    data = {"shared": {"frames": frames}, "profiles": profiles}
    (tmp_path / "cpu-m_0_0.speedscope.json").write_text(json.dumps(data))
    sampled = {"note": "", "requests": 10, "thread_cpu_s": {"7": 0.9, "8": 0.0, "9": 0.1}}
    (tmp_path / "sampled.json").write_text(json.dumps(sampled))
    found = {function.name: function for function in functions(tmp_path)}
    assert found["run"].cpu_ms == pytest.approx(60)
    assert (found["execute"].share, found["execute"].whole) == (pytest.approx(0.3), pytest.approx(0.9))
    assert found["wait"].cpu_ms == 0  # in every sample, but only waiting
    assert found["threads without Python"].cpu_ms == pytest.approx(10)


def test_a_truncated_profile_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime-m_0_0.123.json").write_text('[{"cat":')
    with pytest.raises(InputError, match="truncated"):
        read_runs(tmp_path, 0)


@pytest.fixture(scope="module")
def tracing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """y = x + 1 on a server with a trace file."""
    folder = tmp_path_factory.mktemp("tracing")
    write_add_one(folder / "repository")
    log = folder / "triton.log"
    with EmbeddedServer(folder / "repository", **FREE, log_path=log, profile=folder / "profile") as running:
        yield running


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_running_server_is_traced_and_its_settings_are_restored(
    tracing: EmbeddedServer, tmp_path: Path, protocol: Any
) -> None:
    url = tracing.grpc_url if protocol == "grpc" else tracing.http_url
    trace(tmp_path, url, protocol, "add_one", ROWS, requests=3, users=1)
    recorded = Recorded.load(tmp_path)
    assert len(recorded.traced) == 3
    for each in recorded.calls:  # one clock: Triton's stamps are between the client's
        stamps = recorded.traces[each.request_id].stamps
        assert each.send_ns <= stamps["QUEUE_START"] <= stamps["COMPUTE_START"] <= each.finish_ns
    assert sum(row.share for row in phases(recorded)) == pytest.approx(1)
    written = tracing.repository.parent / "profile"
    before = len(list(written.iterdir()))
    with InferenceClient(url, protocol) as client:
        client.infer("add_one", ROWS[0])
    assert len(list(written.iterdir())) == before  # no other request is traced
    (tmp_path / "mounted").symlink_to(written)
    reported = json.loads((tmp_path / "calls.json").read_text())["trace_file"]
    elsewhere = tmp_path / "mounted" / Path(reported).name  # where this machine sees the server's file
    trace(tmp_path, url, protocol, "add_one", ROWS, requests=2, users=1, trace_file=elsewhere)
    assert json.loads((tmp_path / "calls.json").read_text())["trace_file"] == str(elsewhere)
    assert len(Recorded.load(tmp_path).traced) == 2


def test_refused_requests_do_not_lose_the_profile() -> None:
    rows = [{"x": np.ones((1, 3), np.float32)}]

    def sent(refuse_every: int) -> tuple[list[Call], str]:
        with (
            FakeEndpoint(refuse_every=refuse_every) as endpoint,
            InferenceClient(endpoint.grpc_url, retries=0) as client,
        ):
            return _send(client, "m", rows, requests=6, users=2)

    calls, note = sent(refuse_every=3)
    assert len(calls) == 4
    assert note.startswith("2 of 6 requests were not answered: ")
    with pytest.raises(ServerBusy):
        sent(refuse_every=1)


def inputs(folder: Path) -> Path:
    np.savez(folder / "inputs.npz", **{"00000/x": ROWS[0]["x"]})  # type: ignore[arg-type]
    return folder / "inputs.npz"


def test_the_error_for_a_server_without_a_trace_file_says_how_to_start_one(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--trace-config triton,file="):
        trace(tmp_path, server.grpc_url, "grpc", "add_one", ROWS, requests=1, users=1)


@pytest.fixture(scope="module")
def profiled(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command's output for eight requests of four users to a real ONNX graph."""
    build = tmp_path_factory.mktemp("build")
    (build / "image").mkdir()
    shutil.copy(built / "build" / "image" / "evaluation.npz", build / "image")
    flags = ["--model", "image", "--models", "tests/models", "--repository", str(built / "repository")]
    flags += ["--requests", "8", "--users", "4", "--cpu-s", "1", "--json"]
    run = run_module("cli", "profile", *flags, DEEPSEEK_BUILD=str(build))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_profile_and_its_timeline_reach_from_the_client_to_the_operators(profiled: dict[str, Any]) -> None:
    names = [row["name"] for row in profiled["phases"]]
    assert {"encode", "to the server", "queue", "infer", "back to the client"} <= set(names)
    assert sum(row["share"] for row in profiled["phases"]) == pytest.approx(1)
    assert any("Conv" in row["op"] for row in profiled["operators"])
    infer = {row["name"]: row for row in profiled["infer"]}
    assert 0 < infer["the graph"]["mean_ms"] <= next(r["mean_ms"] for r in profiled["phases"] if r["name"] == "infer")
    data = json.loads((Path(profiled["folder"]) / "timeline.json").read_text())
    check_trace_events(data["traceEvents"])
    processes = {e["args"]["name"] for e in data["traceEvents"] if e["name"] == "process_name"}
    assert {"client", "Triton"} < processes
    assert any(name.startswith("backend image_0_") for name in processes)
    assert [e["ph"] for e in data["traceEvents"]].count("f") == 8


def test_the_backends_cpu_is_sampled_or_the_reason_is_noted(profiled: dict[str, Any]) -> None:
    if profiled["functions"]:
        assert sum(row["share"] for row in profiled["functions"]) == pytest.approx(1)
        assert list(Path(profiled["folder"]).glob("cpu-image_0_*.speedscope.json"))
    else:
        assert any("py-spy" in note for note in profiled["notes"])


@pytest.mark.parametrize(
    ("gpus", "has_nsys", "starts", "note"),
    [
        ("GPU 0: H100", True, "profile --trace=cuda,nvtx,osrt", ""),
        ("GPU 0: H100", False, "", "but no nsys"),
        ("", True, "", ""),
    ],
)
def test_nsys_wraps_the_server_on_a_gpu_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, has_nsys: bool, starts: str, note: str
) -> None:
    for name in ("nvidia-smi", *(["nsys"] if has_nsys else [])):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{gpus}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if has_nsys else f"{tmp_path}")
    command, notes = wrapped_in_nsys(tmp_path / "out")
    assert " ".join(command[1:]).startswith(starts)
    assert bool(command) == bool(starts)
    assert note in " ".join(notes)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--requests", "0"], "1 to 1000, is needed"),
        (["--users", "3"], "at least as many requests as users are needed"),
        (["--cpu-s", "-1"], "--cpu-s: seen '-1'"),
        (["--trace-file", "/tmp/trace.json"], "--trace-file needs --url"),
        (["--repository", "/nowhere"], "/nowhere"),
        (["--model", "nosuch"], "nosuch"),
        (["--url", "127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_wrong_input_gives_a_one_line_error_and_leaves_no_folder(
    tmp_path: Path, flags: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    (tmp_path / "recommender").mkdir()
    inputs(tmp_path / "recommender").rename(tmp_path / "recommender" / "evaluation.npz")
    write_add_one(tmp_path / "repository")
    with pytest.raises(SystemExit) as ended:
        sys.exit(command_line(["profile", "--repository", str(tmp_path / "repository"), *flags]))
    assert ended.value.code == 2
    assert reason in capfd.readouterr().err
    assert not list(tmp_path.glob("*/profiles/*"))
