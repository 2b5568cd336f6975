"""Traces single requests from the client through Triton to the operators of the graph, and draws the timeline.

The model repository is served by an embedded Triton of its own, on free ports, twice: once with Triton's tracing and
ONNX Runtime's operator times for the requests, once without either while py-spy samples the busy backend. With --url a
server that is running is traced instead; it must have been started with a trace file.

Contract: leaves a folder `build/<model>/profiles/<time>/` with `timeline.json` (Chrome trace JSON: open it in Perfetto,
ui.perfetto.dev, which reads it in the browser, or in chrome://tracing), `profile.json` (the printed figures) and
`cpu-<instance>.speedscope.json` (open in speedscope.app). On a machine with an NVIDIA GPU the second server runs under
`nsys profile`, and `nsys.nsys-rep` is there too (written for it, not tried: no GPU was at hand).

Exit codes: 0; 2 wrong input; 3 no request was traced.

Examples:
    python -m loadtests.profile                                 # one request to the recommender, over gRPC
    python -m loadtests.profile --requests 16 --users 8         # eight at once: queue and batches show
    python -m loadtests.profile --protocol http --cpu-s 0 --json
    python -m loadtests.profile --url 127.0.0.1:8001 --trace-file /tmp/trace.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepseek.spec import InputError, InvalidMeasurement, Parser, add_model_arguments, build_dir, run_command
from loadtests.profile import tables
from loadtests.profile.sources import GraphRun, read_calls, read_runs, read_traces, run_of
from loadtests.profile.timeline import timeline

MOST_REQUESTS = 1000
MOST_ROWS = 12  # of a printed table


def profile(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Records into the folder, writes timeline.json and profile.json there, returns the latter."""
    notes: list[str] = []
    console.print(f"tracing {args.requests} requests of {args.model} over {args.protocol}")
    recorded = ["--requests", str(args.requests), "--users", str(args.users)]
    if args.url:
        _record(args, folder, "trace", recorded)
    else:
        _serve(args, folder, "trace", recorded, profiled=True)
        if args.cpu_s > 0:
            console.print(f"sampling the busy backend for {args.cpu_s:g} s")
            notes += _serve(args, folder, "cpu", ["--seconds", f"{args.cpu_s:g}"], nsys=_nsys(folder, notes))
    calls, offset_ns = read_calls(folder)
    trace_file = Path(args.trace_file or json.loads((folder / "traced.json").read_text())["trace_file"])
    traces = read_traces(trace_file, calls)
    if not traces:
        raise InvalidMeasurement(f"no trace of the requests in {trace_file}*; is it this machine's? (--trace-file)")
    if len(traces) < len(calls):
        notes.append(f"Triton traced {len(traces)} of {len(calls)} requests")
    runs = read_runs(folder, offset_ns)
    mine = [run for call in calls for trace in traces.get(call.request_id, ()) if (run := run_of(trace, call, runs))]
    used = list({id(run): run for run in mine}.values())
    if not used:
        notes.append(_without_operators(args))
    found = _figures(args, folder, calls, traces, runs, used)
    notes += [note for note in [_sampled(folder)] if note]
    found["notes"] = notes
    data = {"traceEvents": timeline(calls, traces, runs), "displayTimeUnit": "ms", "otherData": _about(args)}
    (folder / "timeline.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "profile.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def _figures(
    args: argparse.Namespace, folder: Path, calls: Any, traces: Any, runs: Sequence[GraphRun], used: Sequence[GraphRun]
) -> dict[str, Any]:
    traced = [call for call in calls if call.request_id in traces]
    return {
        **_about(args),
        "requests": len(traced),
        "mean_ms": sum(call.finish_ns - call.encode_ns for call in traced) / 1e6 / len(traced),
        "phases": [asdict(row) for row in tables.phases(calls, traces)],
        "infer": [asdict(row) for row in tables.within_infer(calls, traces, runs)],
        "graph_runs": len(used),
        "operators": [asdict(row) for row in tables.operators(used)],
        "functions": [asdict(row) for row in tables.functions(folder)],
    }


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {"model": args.model, "protocol": args.protocol, "url": args.url or "embedded", "users": args.users}


def _without_operators(args: argparse.Namespace) -> str:
    if args.url:
        return "no operator times: the server was not started for them (make profile without URL= does it)"
    return "no operator times: not ONNX Runtime, or published before its backend gave them (make engine publishes anew)"


def _serve(
    args: argparse.Namespace,
    folder: Path,
    what: str,
    flags: list[str],
    *,
    profiled: bool = False,
    nsys: Sequence[str] = (),
) -> list[str]:
    """Has the embedded server serve the repository while it is recorded; ends with the recording's exit status."""
    command = [*nsys, sys.executable, "-m", "serving.embedded", "--repository", args.repository]
    for port in ("http", "grpc", "metrics"):
        command += [f"--{port}-port", "0"]
    command += ["--profile", str(folder)] if profiled else []
    with tempfile.TemporaryFile("w+") as said:
        environment = {**os.environ, "BUILD": os.environ.get("BUILD", "build")}
        done = subprocess.run([*command, "--", *_recording(args, folder, what, flags)], stdout=said, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    report = folder / "nsys.nsys-rep"
    return (
        [f"nsys report: {report.name}; open it in Nsight Systems, or nsys stats {report.name}"]
        if report.is_file()
        else []
    )


def _record(args: argparse.Namespace, folder: Path, what: str, flags: list[str]) -> None:
    done = subprocess.run([*_recording(args, folder, what, flags), "--url", args.url])
    if done.returncode:
        raise SystemExit(done.returncode)


def _recording(args: argparse.Namespace, folder: Path, what: str, flags: list[str]) -> list[str]:
    command = [sys.executable, "-m", "loadtests.profile.record", "--what", what, "--folder", str(folder)]
    command += ["--model", args.model, "--models", args.models, "--protocol", args.protocol, *flags]
    return command + (["--inputs", args.inputs] if args.inputs else [])


def _nsys(folder: Path, notes: list[str]) -> list[str]:
    """The command that the server is wrapped in on a GPU machine; empty on others."""
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    if not listed or "GPU" not in listed.stdout:
        return []
    program = shutil.which("nsys")
    if program is None:
        notes.append("a GPU is here and nsys is not: install Nsight Systems for the GPU's own timeline")
        return []
    command = [program, "profile", "--trace=cuda,nvtx,osrt", "--sample=none", "--trace-fork-before-exec=true"]
    return [*command, "--force-overwrite=true", f"--output={folder / 'nsys'}"]


def _sampled(folder: Path) -> str:
    path = folder / "sampled.json"
    return json.loads(path.read_text(encoding="utf-8"))["note"] if path.is_file() else ""


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
        table = Table("operator", "a run", "ms a run", "share", "slowest node")
        for row in found["operators"][:MOST_ROWS]:
            table.add_row(
                row["op"], f"{row['calls']:g}", f"{row['mean_ms']:.3f}", f"{row['share']:.0%}", row["slowest_node"]
            )
        console.print(table)
    if found["functions"]:
        table = Table("function of the backend", "", "CPU ms a request", "share", "with what it calls")
        for row in found["functions"][:MOST_ROWS]:
            figures = (f"{row['cpu_ms']:.3f}", f"{row['share']:.0%}", f"{row['whole']:.0%}")
            table.add_row(row["name"], row["place"], *figures)
        console.print(table)
    for note in found["notes"]:
        console.print(f"note: {note}")
    console.print(f"timeline: {folder / 'timeline.json'}  (open it in ui.perfetto.dev)", soft_wrap=True)
    for path in sorted(folder.glob("cpu-*.speedscope.json")):
        console.print(f"CPU samples: {path}  (open it in speedscope.app)", soft_wrap=True)


def _add_row(table: Table, name: str, meaning: str, row: dict[str, Any]) -> None:
    table.add_row(name, meaning, f"{row['mean_ms']:.3f}", f"{row['largest_ms']:.3f}", f"{row['share']:.1%}")


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m loadtests.profile")
    add_model_arguments(parser)
    parser.add_argument("--repository", default="model_repository", help="served meanwhile (default: %(default)s)")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1, help="to trace (default: %(default)s)")
    parser.add_argument("--users", type=int, default=1, help="that send them at once (default: %(default)s)")
    parser.add_argument("--cpu-s", type=float, default=2, help="seconds of CPU samples, 0: none (default: %(default)s)")
    parser.add_argument("--inputs", help="file of real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument("--url", help="host:port of a running server to trace instead")
    parser.add_argument("--trace-file", help="where its trace file is seen from here (default: as the server says)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    if not 1 <= args.users <= args.requests <= MOST_REQUESTS:
        raise InputError(
            f"--requests {args.requests} --users {args.users}: 1 to {MOST_REQUESTS} requests, no fewer than users"
        )
    if args.cpu_s < 0:
        raise InputError(f"--cpu-s {args.cpu_s:g}: it must be 0 or more")
    return args


def main() -> int:
    """Records, draws, prints."""
    args = _parse()
    place = build_dir(args.model) / "profiles"
    place.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=place))
    try:
        found = profile(args, draft, Console(stderr=True))
        folder = draft.rename(place / (datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")[:-3] + "Z"))
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if args.json:
        print(json.dumps({"folder": str(folder), **found}, indent=2))
    else:
        _print(found, folder, Console(width=max(Console().width, 100)))
    return 0


if __name__ == "__main__":
    run_command(main)
