"""Sends the requests of a profile to a server and leaves what was seen; `loadtests.profile` runs it beside the server.

Contract: `trace` turns Triton's tracing on for some requests and puts it back as it was; the server must have a trace
file (`--trace-config triton,file=...`), which cannot be set while it runs. `sample` has py-spy look at the model's
backend processes while they are busy, one file an instance for speedscope.app; where it may not, it says why. The CPU
times of the threads are taken beside it: py-spy also sees threads that only wait for their turn.

Examples:
    python -m loadtests.profile.record --what trace --folder /tmp/profile --url 127.0.0.1:8001 --requests 3
    python -m loadtests.profile.record --what cpu --folder /tmp/profile --url 127.0.0.1:8001 --seconds 2
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import tritonclient.grpc
import tritonclient.http
from deepseek_client import InferenceClient, InferenceError, ServerBusy
from tritonclient.utils import InferenceServerException

from deepseek.spec import BATCH, DeploymentSpec, InputError, Parser, add_model_arguments, build_dir, run_command
from loadtests.inputs import read_inputs
from loadtests.profile.sources import Call, read_traces, write_calls

Protocol = Literal["grpc", "http"]
WARM_UP = 20  # requests, so that neither connections nor the graph are new
TRACE_WAIT_S = 10
SAMPLES_PER_S = 200
MOST_INSTANCES = 4  # that are looked at


def trace(
    folder: Path,
    url: str,
    protocol: Protocol,
    model: str,
    rows: list[dict[str, np.ndarray]],
    requests: int,
    users: int,
    trace_file: Path | None = None,
) -> None:
    """Sends so many requests, of so many users at once, and waits until Triton has written their traces.

    What was not answered has none, but a note. `trace_file` where Triton's lies elsewhere, seen from here, than it says
    itself.
    """
    with InferenceClient(url, protocol, retries=0) as client:
        for index in range(max(WARM_UP, users)):
            with suppress(ServerBusy):
                client.infer(model, rows[index % len(rows)])
        with _tracing(url, protocol) as said:
            seen = trace_file or said
            calls, note = _send(client, model, rows, requests, users)
            # As long as Triton writes: a trace is complete when it has sent the answer.
            deadline = time.monotonic() + TRACE_WAIT_S
            while len(read_traces(seen, calls)) < len(calls) and time.monotonic() < deadline:
                time.sleep(0.05)
    write_calls(folder, calls, time.time_ns() - time.monotonic_ns())
    (folder / "traced.json").write_text(json.dumps({"trace_file": str(seen), "note": note}), encoding="utf-8")


def _send(
    client: InferenceClient, model: str, rows: list[dict[str, np.ndarray]], requests: int, users: int
) -> tuple[list[Call], str]:
    """Each user sends its share, one request after the other; all users start together.

    Gives what was answered, and a note on what was not. Raises InferenceError where nothing was.
    """
    mark = secrets.token_hex(4)  # tells ours from other clients', and from an earlier profile's
    calls: list[Call] = []
    errors: list[InferenceError] = []
    together = threading.Barrier(users)

    def be_user(user: int) -> None:
        together.wait()
        for index in range(user, requests, users):
            request_id = f"profile-{mark}-{index}"
            encode_ns = time.monotonic_ns()
            try:
                prepared = client.prepare(model, rows[index % len(rows)], request_id=request_id)
                send_ns = time.monotonic_ns()
                client.send(prepared)
            except InferenceError as error:
                errors.append(error)
                continue
            times = {"encode_ns": encode_ns, "send_ns": send_ns, "finish_ns": time.monotonic_ns()}
            calls.append(Call(request_id=request_id, user=user, **times))

    threads = [threading.Thread(target=be_user, args=(user,)) for user in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not calls:
        raise errors[0]
    return calls, f"{len(errors)} of {requests} requests were not answered: {errors[0]}" if errors else ""


@contextmanager
def _tracing(url: str, protocol: Protocol) -> Iterator[Path]:
    """Every request is traced inside; gives the file that the traces go to."""
    kind: Any = tritonclient.grpc if protocol == "grpc" else tritonclient.http
    client = kind.InferenceServerClient(url)
    as_json = {"as_json": True} if protocol == "grpc" else {}
    try:
        before = _plain(client.get_trace_settings(**as_json))
        if not any(before.get("trace_file", [])):
            raise InputError(
                f"the server at {url} has no trace file; start it with python -m serving.embedded --profile FOLDER "
                "(NVIDIA's: --trace-config mode=triton --trace-config triton,file=/tmp/trace.json), or leave --url out"
            )
        # A log frequency of 1: written at once, not when the server ends.
        wanted = {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "-1", "log_frequency": "1"}
        client.update_trace_settings(settings=wanted)
        try:
            yield Path(before["trace_file"][0])
        finally:
            rest = {name: before[name][0] for name in ("trace_rate", "trace_count", "log_frequency")}
            client.update_trace_settings(settings={"trace_level": before["trace_level"], **rest})
    except InferenceServerException as error:
        raise InputError(f"{url}: the server does not let itself be traced: {error.message()}") from None
    finally:
        client.close()


def _plain(settings: dict[str, Any]) -> dict[str, list[str]]:
    """Trace settings as name -> values, whichever protocol they came by."""
    values = (
        {name: each.get("value", []) for name, each in settings["settings"].items()}
        if "settings" in settings
        else settings
    )
    return {name: each if isinstance(each, list) else [each] for name, each in values.items()}


def sample(
    folder: Path,
    url: str,
    protocol: Protocol,
    model: str,
    rows: list[dict[str, np.ndarray]],
    seconds: float,
    server: int,
) -> None:
    """Keeps the model's backend processes busy and samples their stacks meanwhile."""
    backends = backend_processes(server, model)
    program = _py_spy()
    note = "" if program else "py-spy is not installed; pip install py-spy"
    if not backends:
        note = f"no CPU samples: {model} has no Python backend process below process {server}"
    before = _thread_cpu_s(backends.values())
    with _busy(url, protocol, model, rows, users=max(1, len(backends))) as answered:
        until = time.monotonic() + seconds
        samplers = [_sampler(program, folder, name, each, seconds) for name, each in backends.items() if program]
        for sampler in samplers:
            _, said = sampler.communicate(timeout=seconds + 60)
            if sampler.returncode:
                note = f"py-spy could not look at the backend: {_last_line(said)} (it needs root or CAP_SYS_PTRACE)"
        time.sleep(max(0.0, until - time.monotonic()))
    used = {thread: cpu_s - before.get(thread, 0.0) for thread, cpu_s in _thread_cpu_s(backends.values()).items()}
    found = {"note": note, "requests": sum(answered), "thread_cpu_s": used}
    (folder / "sampled.json").write_text(json.dumps(found), encoding="utf-8")


@contextmanager
def _busy(
    url: str, protocol: Protocol, model: str, rows: list[dict[str, np.ndarray]], users: int
) -> Iterator[list[int]]:
    """So many users back to back inside; gives how many requests each had answered, once it has ended."""
    stop = threading.Event()
    answered: list[int] = []

    def be_busy() -> None:
        with InferenceClient(url, protocol, retries=0) as client:
            requests = [client.prepare(model, row) for row in rows]
            count = 0
            for request in itertools.cycle(requests):
                if stop.is_set():
                    break
                with suppress(InferenceError):  # a refusal or a time-out: the next one
                    client.send(request)
                    count += 1
            answered.append(count)

    threads = [threading.Thread(target=be_busy) for _ in range(users)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def backend_processes(server: int, model: str) -> dict[str, psutil.Process]:
    """Instance -> the stub that runs it, of a Python model, below the process that started Triton."""
    instance = re.compile(rf"{re.escape(model)}_\d+_\d+")  # group and number
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(server).children(recursive=True):
        if process.name().startswith("triton_python"):
            found |= {part: process for part in process.cmdline() if instance.fullmatch(part)}
    return dict(sorted(found.items())[:MOST_INSTANCES])


def _thread_cpu_s(processes: Iterable[psutil.Process]) -> dict[int, float]:
    """Thread id -> CPU seconds since it began."""
    return {each.id: each.user_time + each.system_time for process in processes for each in process.threads()}


def _py_spy() -> str | None:
    return shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def _sampler(
    program: str, folder: Path, instance: str, process: psutil.Process, seconds: float
) -> subprocess.Popen[str]:
    output = folder / f"cpu-{instance}.speedscope.json"
    command = [program, "record", "--pid", str(process.pid), "--format", "speedscope", "--output", str(output)]
    command += ["--duration", f"{max(1, round(seconds))}", "--rate", str(SAMPLES_PER_S)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else "no reason given"


def main() -> None:
    """One recording, into the folder."""
    parser = Parser(__doc__, prog="python -m loadtests.profile.record")
    add_model_arguments(parser)
    parser.add_argument("--what", choices=("trace", "cpu"), default="trace", help="(default: %(default)s)")
    parser.add_argument("--folder", required=True, type=Path, help="where to leave what was seen")
    parser.add_argument("--url", help="host:port (default: 127.0.0.1 and $GRPC_PORT or $HTTP_PORT)")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    parser.add_argument("--inputs", type=Path, help="real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument("--trace-file", type=Path, help="where it is seen from here (default: as the server says)")
    parser.add_argument("--requests", type=int, default=1, help="to trace (default: %(default)s)")
    parser.add_argument("--users", type=int, default=1, help="that send them at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2, help="of CPU samples (default: %(default)s)")
    parser.add_argument(
        "--server", type=int, default=os.getppid(), help="process that started Triton (default: parent)"
    )
    args = parser.parse_args()
    port = os.environ.get("GRPC_PORT", "8001") if args.protocol == "grpc" else os.environ.get("HTTP_PORT", "8000")
    url = args.url or f"127.0.0.1:{port}"
    spec = DeploymentSpec.of_model(args.model, args.models)
    rows = read_inputs(args.inputs or build_dir(args.model) / "evaluation.npz", spec.axes[BATCH].min)
    try:
        if args.what == "trace":
            trace(args.folder, url, args.protocol, args.model, rows, args.requests, args.users, args.trace_file)
        else:
            sample(args.folder, url, args.protocol, args.model, rows, args.seconds, args.server)
    except InferenceError as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    run_command(main)
