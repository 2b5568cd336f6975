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
import math
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepseek.spec import DeploymentSpec, InputError, Parser, add_model_arguments, build_dir, run_command
from loadtests.profile import tables
from loadtests.profile.sources import Recorded
from loadtests.profile.timeline import timeline
from loadtests.results import new_run, publish

MOST_REQUESTS = 1000
MOST_ROWS = 12  # of a printed table


def profile(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Records, writes timeline.json and profile.json into the folder, returns the latter."""
    with tempfile.TemporaryDirectory(dir=folder) as recording:
        notes = _record(args, folder, Path(recording), console)
        recorded = Recorded.load(Path(recording))
    found = {**_figures(args, folder, recorded), "notes": [*notes, *_gaps(args, recorded), *_sampled(folder)]}
    events = timeline(recorded.calls, recorded.traces, recorded.runs)
    data = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": _about(args)}
    (folder / "timeline.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "profile.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def _record(args: argparse.Namespace, folder: Path, recording: Path, console: Console) -> list[str]:
    """Traces into `recording`, samples the CPU into `folder`; returns what the user is to know."""
    console.print(f"tracing {args.requests} request{'s' * (args.requests > 1)} of {args.model} over {args.protocol}")
    flags = ["--requests", str(args.requests), "--users", str(args.users)]
    if args.url:
        flags += ["--url", args.url, *(["--trace-file", args.trace_file] if args.trace_file else [])]
        _run(_recording(args, recording, "trace", flags))
        return ["no CPU samples: a running server's processes are left alone"] if args.cpu_s else []
    # Instances write their operator times one after the other while they are unloaded.
    server = [*_server(args), "--profile", str(recording), "--exit-timeout-s", "60"]
    _run([*server, "--", *_recording(args, recording, "trace", flags)])
    if not args.cpu_s:
        return []
    console.print(f"sampling the busy backend for {args.cpu_s:g} s")
    nsys, notes = wrapped_in_nsys(folder)
    _run([*nsys, *_server(args), "--", *_recording(args, folder, "cpu", ["--seconds", f"{args.cpu_s:g}"])])
    if (report := folder / "nsys.nsys-rep").is_file():
        notes.append(f"the GPU's timeline is {report.name}; open it in Nsight Systems, or: nsys stats {report.name}")
    return notes


def _server(args: argparse.Namespace) -> list[str]:
    """The embedded server, on free ports; it serves while what follows -- runs, and ends with its exit status."""
    command = [sys.executable, "-m", "serving.embedded", "--repository", args.repository]
    return [*command, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


def _recording(args: argparse.Namespace, folder: Path, what: str, flags: list[str]) -> list[str]:
    command = [sys.executable, "-m", "loadtests.profile.record", "--what", what, "--folder", str(folder)]
    command += ["--model", args.model, "--models", args.models, "--protocol", args.protocol, *flags]
    return command + (["--inputs", args.inputs] if args.inputs else [])


def _run(command: list[str]) -> None:
    """To its end; where it fails it has said why, and its exit status is ours."""
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)


def _figures(args: argparse.Namespace, folder: Path, recorded: Recorded) -> dict[str, Any]:
    calls, traces, traced = recorded.calls, recorded.traces, recorded.traced
    return {
        **_about(args),
        "requests": len(traced),
        "mean_ms": sum(call.finish_ns - call.encode_ns for call in traced) / 1e6 / len(traced),
        "phases": [asdict(row) for row in tables.phases(calls, traces)],
        "infer": [asdict(row) for row in tables.within_infer(calls, traces, recorded.runs)],
        "graph_runs": len(recorded.used),
        "operators": [asdict(row) for row in tables.operators(recorded.used)],
        "functions": [asdict(row) for row in tables.functions(folder)],
    }


def _gaps(args: argparse.Namespace, recorded: Recorded) -> list[str]:
    """What could not be seen, and why."""
    notes = [recorded.note] if recorded.note else []
    if missing := len(recorded.calls) - len(recorded.traced):
        notes.append(f"Triton did not trace {missing} of {len(recorded.calls)} requests")
    without = [call for call in recorded.traced if not recorded.runs_of(call)]
    if not without:
        return notes
    why = "the backend is not ONNX Runtime's, or older than this command (make engine publishes it anew)"
    if args.url:
        why = "the server was not started for them (make profile without URL= does it)"
    elif len(without) < len(recorded.traced):
        why = "an instance was stopped before it had written them"
    return [*notes, f"no operator times of {len(without)} of {len(recorded.traced)} requests: {why}"]


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {"model": args.model, "protocol": args.protocol, "url": args.url or "embedded", "users": args.users}


def wrapped_in_nsys(folder: Path) -> tuple[list[str], list[str]]:
    """On a GPU machine the command that the server is wrapped in, else nothing; and notes."""
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    if not listed or "GPU" not in listed.stdout:
        return [], []
    program = shutil.which("nsys")
    if program is None:
        return [], ["a GPU is here and nsys is not: install Nsight Systems for the GPU's own timeline"]
    command = [program, "profile", "--trace=cuda,nvtx,osrt", "--sample=none", "--trace-fork-before-exec=true"]
    return [*command, "--force-overwrite=true", f"--output={folder / 'nsys'}"], []


def _sampled(folder: Path) -> list[str]:
    """Why there are no CPU samples, where there are none."""
    path = folder / "sampled.json"
    note = json.loads(path.read_text(encoding="utf-8"))["note"] if path.is_file() else ""
    return [note] if note else []


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
    largest = max(found["phases"], key=lambda row: row["share"])
    console.print(f"largest: {largest['name']}, {largest['share']:.0%} ({tables.MEANINGS[largest['name']]})")
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
    parser.add_argument("--trace-file", help="where the trace file of --url is seen from here (default: as it says)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    if not 1 <= args.users <= args.requests <= MOST_REQUESTS:
        raise InputError(
            f"--requests {args.requests} --users {args.users}: 1 to {MOST_REQUESTS} requests, no fewer than users"
        )
    if not 0 <= args.cpu_s < math.inf:
        raise InputError(f"--cpu-s {args.cpu_s:g}: seconds are needed, 0 or more")
    if args.trace_file and not args.url:
        raise InputError("--trace-file: it goes with --url; the server that is started here has its own")
    return args


def main() -> int:
    """Records, draws, prints."""
    args = _parse()
    DeploymentSpec.of_model(args.model, args.models)  # InputError where there is no such model
    place = build_dir(args.model) / "profiles"
    try:
        with new_run(place) as draft:
            found = profile(args, draft, Console(stderr=True, markup=False))
            folder = publish(draft)
    finally:
        with suppress(OSError):  # of a model that is not there nothing is left; what holds something stays
            place.rmdir()
            place.parent.rmdir()
    if args.json:
        print(json.dumps({"folder": str(folder), **found}, indent=2))
    else:
        _print(found, folder, Console(width=max(Console().width, 100), markup=False))
    return 0


if __name__ == "__main__":
    run_command(main)
