"""Traces single requests from the client through Triton to the operators of the graph, and draws the timeline.

An embedded Triton serves the model repository on free ports, twice: first with Triton's tracing and ONNX Runtime's
operator times for the requests, then without either while py-spy samples the busy backend. With --url the command
traces a running server instead, which must have been started with a trace file.

Contract: writes a folder `build/<model>/profiles/<time>/` with `timeline.json` (Chrome trace JSON for Perfetto,
ui.perfetto.dev, or chrome://tracing), `profile.json` (the printed figures) and `cpu-<instance>.speedscope.json` (for
speedscope.app).
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deepseek_client import InferenceError
from rich.console import Console
from rich.table import Table

from deepseek.spec import BATCH, DeploymentSpec, InputError, build_dir
from deepseek.spec.files.repository import versions_of
from loadtests.load.endpoint import inputs_of
from loadtests.load.inputs import read_inputs
from loadtests.profile import tables
from loadtests.profile.record import sample, trace
from loadtests.profile.recording import Recorded, read_runs
from loadtests.profile.timeline import timeline
from loadtests.results.run import new_run, publish
from loadtests.results.settings import LoadSettings
from loadtests.search.local_server import EMBEDDED, LocalServer, local_server

LONGEST_S = 3600.0  # of the load while the backend is sampled, which ends earlier
MOST_ROWS = 12  # of a printed table


def profile(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Records requests, writes timeline.json and profile.json into the folder, returns the content of profile.json."""
    inputs = args.inputs or inputs_of(args.model)
    rows = read_inputs(Path(inputs), DeploymentSpec.of_model(args.model, args.models).axes[BATCH].min)
    console.print(f"tracing {args.requests} request{'s' * (args.requests > 1)} of {args.model} over {args.protocol}")
    sent = (args.protocol, args.model, rows, args.requests, args.users)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        if args.url:
            recorded = trace(args.url, *sent, trace_file=args.trace_file)
        else:
            # While they are unloaded, instances write their operator times one after the other.
            with _server(args, Path(place), f"--profile {shlex.quote(place)} --exit-timeout-s 60") as server:
                recorded = trace(server.url, *sent)
            recorded = replace(recorded, runs=read_runs(Path(place), time.time_ns() - time.monotonic_ns()))
        samples = None if args.url or not args.cpu_s else _sampled(args, inputs, folder, Path(place), console)
    found = _figures(args, recorded, samples) | {"notes": [*_gaps(args, recorded), *_without_samples(args, samples)]}
    data = {"traceEvents": timeline(recorded), "displayTimeUnit": "ms", "otherData": _about(args)}
    (folder / "timeline.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "profile.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def _server(args: argparse.Namespace, folder: Path, flags: str = "") -> AbstractContextManager[LocalServer]:
    command = f"{EMBEDDED} {flags}"
    return local_server(command, args.repository, folder, protocol=args.protocol, model=args.model)


def _sampled(args: argparse.Namespace, inputs: str, folder: Path, scratch: Path, console: Console) -> tables.CpuSamples:
    """Samples the CPU of the busy backend into `folder`."""
    console.print(f"sampling the busy backend for {args.cpu_s:g} s")
    with _server(args, scratch) as server:
        settings = LoadSettings(
            model=args.model, models=str(args.models), target="onnxruntime", protocol=args.protocol, url=server.url,
            inputs=inputs, warmup_s=0.0, duration_s=LONGEST_S,
        )  # fmt: skip
        return sample(folder, settings, args.cpu_s, server.process.pid)


def _figures(args: argparse.Namespace, recorded: Recorded, samples: tables.CpuSamples | None) -> dict[str, Any]:
    traced = recorded.traced
    return {
        **_about(args),
        "requests": len(traced),
        "mean_ms": sum(call.finish_ns - call.encode_ns for call in traced) / 1e6 / len(traced),
        "phases": [asdict(row) for row in tables.phases(recorded)],
        "infer": [asdict(row) for row in tables.within_infer(recorded)],
        "graph_runs": len(recorded.used),
        "operators": [asdict(row) for row in tables.operators(recorded.used)],
        "functions": [asdict(row) for row in tables.functions(samples)] if samples else [],
    }


def _gaps(args: argparse.Namespace, recorded: Recorded) -> list[str]:
    """Notes on missing traces and operator times, with the reason."""
    notes = [recorded.note] if recorded.note else []
    if missing := len(recorded.calls) - len(recorded.traced):
        notes.append(f"Triton did not trace {missing} of {len(recorded.calls)} requests")
    without = [call for call in recorded.traced if recorded.run_of(call) is None]
    if not without:
        return notes
    why = "the backend is not ONNX Runtime's, or older than this command (make engine publishes it again)"
    if args.url:
        why = "the server was not started with operator times (make profile without URL= does that)"
    elif len(without) < len(recorded.traced):
        why = "an instance was stopped before it had written them"
    return [*notes, f"no operator times of {len(without)} of {len(recorded.traced)} requests: {why}"]


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {"model": args.model, "protocol": args.protocol, "url": args.url or "embedded", "users": args.users}


def _without_samples(args: argparse.Namespace, samples: tables.CpuSamples | None) -> list[str]:
    """The note on missing CPU samples, if there is one."""
    if args.url and args.cpu_s:
        return ["no CPU samples: a running server is not sampled"]
    return [samples.note] if samples and samples.note else []


def _print(found: dict[str, Any], folder: Path, console: Console) -> None:
    console.print(f"{found['requests']} requests, {found['mean_ms']:.2f} ms from encoding to the answer, on average")
    phases = Table("phase", "", "mean ms", "largest ms", "share")
    for row in found["phases"]:
        _add_row(phases, row["name"], tables.MEANINGS[row["name"]], row)
        if row["name"] == "infer":
            for part in found["infer"]:
                _add_row(phases, f"  {part['name']}", "", part)
    console.print(phases)
    if found["operators"]:
        table = Table("operator", "per run", "ms per run", "share", "slowest node")
        for row in found["operators"][:MOST_ROWS]:
            table.add_row(
                row["op"], f"{row['calls']:g}", f"{row['mean_ms']:.3f}", f"{row['share']:.0%}", row["slowest_node"]
            )
        console.print(table)
    if found["functions"]:
        table = Table("function of the backend", "", "CPU ms per request", "share", "with callees")
        for row in found["functions"][:MOST_ROWS]:
            figures = (f"{row['cpu_ms']:.3f}", f"{row['share']:.0%}", f"{row['whole']:.0%}")
            table.add_row(row["name"], row["place"], *figures)
        console.print(table)
    largest = max(found["phases"], key=lambda row: row["share"])
    console.print(f"largest: {largest['name']}, {largest['share']:.0%} ({tables.MEANINGS[largest['name']]})")
    for note in found["notes"]:
        console.print(f"note: {note}")
    console.print(f"timeline: {folder / 'timeline.json'}  (open it in ui.perfetto.dev)", soft_wrap=True)
    for path in sorted(folder.glob("cpu-*.speedscope.json")):
        console.print(f"CPU samples: {path}  (open it in speedscope.app)", soft_wrap=True)


def _add_row(table: Table, name: str, meaning: str, row: dict[str, Any]) -> None:
    table.add_row(name, meaning, f"{row['mean_ms']:.3f}", f"{row['largest_ms']:.3f}", f"{row['share']:.1%}")


def _check(args: argparse.Namespace) -> None:
    if args.users > args.requests:
        raise InputError(
            f"--requests {args.requests} --users {args.users}: at least as many requests as users are needed"
        )
    if args.trace_file and not args.url:
        raise InputError("--trace-file needs --url; the server that is started here has its own trace file")


def main(args: argparse.Namespace) -> None:
    _check(args)
    DeploymentSpec.of_model(args.model, args.models)  # InputError if there is no such model
    if not args.url and not versions_of(args.repository / args.model):
        raise InputError(f"{args.repository}: no version of {args.model} to serve; make engine publishes one")
    with new_run(build_dir(args.model) / "profiles") as draft:
        try:
            found = profile(args, draft, Console(stderr=True, markup=False))
        except InferenceError as error:
            raise InputError(str(error)) from None
        folder = publish(draft)
    if args.json:
        print(json.dumps({"folder": str(folder), **found}, indent=2))
    else:
        _print(found, folder, Console(width=max(Console().width, 100), markup=False))
