"""Traces single requests from the client through Triton to the operators of the graph, and draws the timeline.

An embedded Triton serves the model repository on free ports, twice: first with Triton's tracing and ONNX Runtime's
operator times for the requests, then without either while py-spy samples the busy backend. With --url the command
traces a running server instead, which must have been started with a trace file.

Contract: writes a folder `build/<model>/profiles/<time>/` with `timeline.json` (Chrome trace JSON for Perfetto,
ui.perfetto.dev, or chrome://tracing), `profile.json` (the printed figures) and `cpu-<instance>.speedscope.json` (for
speedscope.app). On a machine with an NVIDIA GPU the second server runs under `nsys profile`, which adds
`nsys.nsys-rep` (never run on a GPU).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepseek.spec import DeploymentSpec, InputError, build_dir
from loadtests.profile import figures
from loadtests.profile.profile_data import Recorded
from loadtests.profile.timeline import timeline
from loadtests.results.run import new_run, publish

MOST_ROWS = 12  # of a printed table


def profile(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Records requests, writes timeline.json and profile.json into the folder, returns the content of profile.json."""
    with tempfile.TemporaryDirectory(dir=folder) as recording:
        notes = _record(args, folder, Path(recording), console)
        recorded = Recorded.load(Path(recording))
    found = {**_figures(args, folder, recorded), "notes": [*notes, *_gaps(args, recorded), *_sampled(folder)]}
    events = timeline(recorded)
    data = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": _about(args)}
    (folder / "timeline.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "profile.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def _record(args: argparse.Namespace, folder: Path, recording: Path, console: Console) -> list[str]:
    """Traces into `recording` and samples the CPU into `folder`; returns notes for the user."""
    console.print(f"tracing {args.requests} request{'s' * (args.requests > 1)} of {args.model} over {args.protocol}")
    flags = ["--requests", str(args.requests), "--users", str(args.users)]
    if args.url:
        flags += ["--url", args.url, *(["--trace-file", args.trace_file] if args.trace_file else [])]
        _run(_recording(args, recording, "trace", flags))
        return ["no CPU samples: a running server is not sampled"] if args.cpu_s else []
    # While they are unloaded, instances write their operator times one after the other.
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
    """The command of the embedded server on free ports; it serves while the command after -- runs."""
    command = [sys.executable, "-m", "cli", "serve", "--repository", str(args.repository)]
    return [*command, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--openai-port", "0"]


def _recording(args: argparse.Namespace, folder: Path, what: str, flags: list[str]) -> list[str]:
    command = [sys.executable, "-m", "cli", "profile-record", "--what", what, "--folder", str(folder)]
    command += ["--model", args.model, "--models", str(args.models), "--protocol", args.protocol, *flags]
    return command + (["--inputs", args.inputs] if args.inputs else [])


def _run(command: list[str]) -> None:
    """Runs a command; if it fails, exits with its status, since it has printed the reason."""
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)


def _figures(args: argparse.Namespace, folder: Path, recorded: Recorded) -> dict[str, Any]:
    traced = recorded.traced
    return {
        **_about(args),
        "requests": len(traced),
        "mean_ms": sum(call.finish_ns - call.encode_ns for call in traced) / 1e6 / len(traced),
        "phases": [asdict(row) for row in figures.phases(recorded)],
        "infer": [asdict(row) for row in figures.within_infer(recorded)],
        "graph_runs": len(recorded.used),
        "operators": [asdict(row) for row in figures.operators(recorded.used)],
        "functions": [asdict(row) for row in figures.functions(folder)],
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


def wrapped_in_nsys(folder: Path) -> tuple[list[str], list[str]]:
    """The `nsys` command that wraps the server on a GPU machine, else an empty one; and notes."""
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    if not listed or "GPU" not in listed.stdout:
        return [], []
    program = shutil.which("nsys")
    if program is None:
        return [], ["this machine has a GPU but no nsys: install Nsight Systems to see the GPU's timeline"]
    command = [program, "profile", "--trace=cuda,nvtx,osrt", "--sample=none", "--trace-fork-before-exec=true"]
    return [*command, "--force-overwrite=true", f"--output={folder / 'nsys'}"], []


def _sampled(folder: Path) -> list[str]:
    """The note on missing CPU samples, if there is one."""
    path = folder / "sampled.json"
    note = json.loads(path.read_text(encoding="utf-8"))["note"] if path.is_file() else ""
    return [note] if note else []


def _print(found: dict[str, Any], folder: Path, console: Console) -> None:
    console.print(f"{found['requests']} requests, {found['mean_ms']:.2f} ms from encoding to the answer, on average")
    phases = Table("phase", "", "mean ms", "largest ms", "share")
    for row in found["phases"]:
        _add_row(phases, row["name"], figures.MEANINGS[row["name"]], row)
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
            shown = (f"{row['cpu_ms']:.3f}", f"{row['share']:.0%}", f"{row['whole']:.0%}")
            table.add_row(row["name"], row["place"], *shown)
        console.print(table)
    largest = max(found["phases"], key=lambda row: row["share"])
    console.print(f"largest: {largest['name']}, {largest['share']:.0%} ({figures.MEANINGS[largest['name']]})")
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
    with new_run(build_dir(args.model) / "profiles") as draft:
        found = profile(args, draft, Console(stderr=True, markup=False))
        (folder,) = publish(draft)
    if args.json:
        print(json.dumps({"folder": str(folder), **found}, indent=2))
    else:
        _print(found, folder, Console(width=max(Console().width, 100), markup=False))
