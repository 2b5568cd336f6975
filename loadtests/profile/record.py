"""Sends the requests of a profile to a server and records them; `loadtests.profile` runs it beside the server.

Contract: `trace` turns Triton's tracing on for its requests and then restores the settings; the server must have a
trace file (`--trace-config triton,file=...`), which cannot be set while it runs. `sample` lets py-spy sample the
model's busy backend processes, one file per instance for speedscope.app; without permission it notes the reason. It
also records the CPU times of the threads, since py-spy also samples threads that only wait.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import tritonclient.grpc
import tritonclient.http
from deepseek_client import InferenceClient, InferenceError, ServerBusy
from tritonclient.utils import InferenceServerException

from deepseek.spec import DeploymentSpec, InputError
from loadtests.load.background_load import BackgroundLoad, Stream
from loadtests.load.inputs import rows_of
from loadtests.load.settings_from_options import inputs_of
from loadtests.profile.profile_data import Call, read_traces
from loadtests.results.settings import LoadSettings

Protocol = Literal["grpc", "http"]
WARM_UP = 20  # requests, for the connections and the graph
TRACE_WAIT_S = 10
SAMPLES_PER_S = 200
LONGEST_S = 3600.0  # of a load that is stopped earlier
MOST_INSTANCES = 4  # sampled


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
    """Sends `requests` requests from `users` concurrent users and waits until Triton has written their traces.

    Unanswered requests give a note instead. `trace_file` replaces the path that Triton reports, for a server with
    another view of the file system.
    """
    with InferenceClient(url, protocol, retries=0, max_response_bytes=None) as client:
        for index in range(max(WARM_UP, users)):
            with suppress(ServerBusy):
                client.infer(model, rows[index % len(rows)])
        with _tracing(url, protocol) as said:
            seen = trace_file or said
            calls, note = _send(client, model, rows, requests, users)
            # Triton completes a trace after it has sent the answer.
            deadline = time.monotonic() + TRACE_WAIT_S
            while len(read_traces(seen, calls)) < len(calls) and time.monotonic() < deadline:
                time.sleep(0.05)
    found = {"trace_file": str(seen), "note": note, "realtime_offset_ns": time.time_ns() - time.monotonic_ns()}
    data = {**found, "calls": [asdict(call) for call in calls]}
    (folder / "calls.json").write_text(json.dumps(data), encoding="utf-8")


def _send(
    client: InferenceClient, model: str, rows: list[dict[str, np.ndarray]], requests: int, users: int
) -> tuple[list[Call], str]:
    """Each user sends its share, one request after the other; all users start together.

    Returns the answered requests, and a note on the others. Raises InferenceError if none was answered.
    """
    mark = secrets.token_hex(4)  # distinguishes these requests from those of other clients and earlier profiles
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
    """Traces every request inside the block; gives the file of the traces."""
    kind: Any = tritonclient.grpc if protocol == "grpc" else tritonclient.http
    client = kind.InferenceServerClient(url)
    as_json = {"as_json": True} if protocol == "grpc" else {}
    try:
        before = _plain(client.get_trace_settings(**as_json))
        if not any(before.get("trace_file", [])):
            raise InputError(
                f"the server at {url} has no trace file; start it with deepseek serve --profile FOLDER "
                "(NVIDIA's: --trace-config mode=triton --trace-config triton,file=/tmp/trace.json), or leave --url out"
            )
        # A log frequency of 1: Triton writes at once, not when it ends.
        wanted = {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "-1", "log_frequency": "1"}
        client.update_trace_settings(settings=wanted)
        try:
            yield Path(before["trace_file"][0])
        finally:
            rest = {name: before[name][0] for name in ("trace_rate", "trace_count", "log_frequency")}
            client.update_trace_settings(settings={"trace_level": before["trace_level"], **rest})
    except InferenceServerException as error:
        raise InputError(f"{url}: the server refuses tracing: {error.message()}") from None
    finally:
        client.close()


def _plain(settings: dict[str, Any]) -> dict[str, list[str]]:
    """Trace settings as name -> values, from either protocol."""
    values = (
        {name: each.get("value", []) for name, each in settings["settings"].items()}
        if "settings" in settings
        else settings
    )
    return {name: each if isinstance(each, list) else [each] for name, each in values.items()}


def sample(folder: Path, settings: LoadSettings, seconds: float, server: int) -> None:
    """Keeps the model's backend processes busy, with one user each, and samples their stacks."""
    backends, note = backend_processes(server, settings.model), ""
    if not backends:
        note = f"no CPU samples: {settings.model} has no Python backend process below process {server}"
    users = Stream(name=settings.model, settings=replace(settings, users=max(1, len(backends))))
    with BackgroundLoad([users]) as load:
        before, until_s = _thread_cpu_s(backends.values()), load.now_s + seconds
        for sampler in [_sampler(folder, name, each, seconds) for name, each in backends.items()]:
            _, said = sampler.communicate(timeout=seconds + 60)
            if sampler.returncode:
                reason = (said.strip().splitlines() or ["no reason given"])[-1].removeprefix("Error: ")
                note = f"py-spy could not look at the backend: {reason} (it needs root or CAP_SYS_PTRACE)"
        time.sleep(max(0.0, until_s - load.now_s))
        answered = len(load.stop()[settings.model].answered)
    used = {thread: cpu_s - before.get(thread, 0.0) for thread, cpu_s in _thread_cpu_s(backends.values()).items()}
    found = {"note": note, "requests": answered, "thread_cpu_s": used}
    (folder / "sampled.json").write_text(json.dumps(found), encoding="utf-8")


def backend_processes(server: int, model: str) -> dict[str, psutil.Process]:
    """Instance of a Python model -> its stub process, below the process `server` that started Triton."""
    instance = re.compile(rf"{re.escape(model)}_\d+_\d+")  # group and number
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(server).children(recursive=True):
        if process.name().startswith("triton_python"):
            found |= {part: process for part in process.cmdline() if instance.fullmatch(part)}
    return dict(sorted(found.items())[:MOST_INSTANCES])


def _thread_cpu_s(processes: Iterable[psutil.Process]) -> dict[int, float]:
    """Thread id -> CPU seconds since the thread began."""
    return {each.id: each.user_time + each.system_time for process in processes for each in process.threads()}


def _sampler(folder: Path, instance: str, process: psutil.Process, seconds: float) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(process.pid)]
    command += ["--format", "speedscope", "--output", str(folder / f"cpu-{instance}.speedscope.json")]
    command += ["--duration", f"{max(1, round(seconds))}", "--rate", str(SAMPLES_PER_S)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def main(args: argparse.Namespace) -> None:
    spec = DeploymentSpec.of_model(args.model, args.models)
    inputs = args.inputs or inputs_of(args.model)
    try:
        if args.what == "trace":
            rows = list(rows_of(Path(inputs), spec).values())
            trace(args.folder, args.url, args.protocol, args.model, rows, args.requests, args.users, args.trace_file)
        else:
            settings = LoadSettings(
                model=args.model, models=str(args.models), target="onnxruntime", protocol=args.protocol, url=args.url,
                inputs=inputs, warmup_s=0.0, duration_s=LONGEST_S,
            )  # fmt: skip
            sample(args.folder, settings, args.seconds, args.server or os.getppid())
    except InferenceError as error:
        raise InputError(str(error)) from None
