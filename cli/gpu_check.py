"""`deepseek gpu-check`: everything that needs a GPU host, in one command, and a report to attach.

Contract: runs the steps of `cli.gpu_steps` one after another as child processes, each within its time limit. A step
that fails does not end the others; one whose needs are not met is skipped with the reason. `gpu-check.json` and
`gpu-check.html` are written after each step, so a stopped check leaves what it has.

Exit codes: 0 all steps passed, 1 a step failed, 3 none failed, but some were skipped or inconclusive.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

from cli.gpu_steps import STACK_DOWN, STACK_UP, GpuStep, Where, ours, steps
from deepseek.spec import build_dir
from deepseek.spec.command import ExitCode, end_at_sigterm
from deepseek.spec.files.folders import alone_in, write_whole
from deepseek.spec.machine.gpus import why_none
from deepseek.spec.machine.triton_release import TRITON_TAG, check_tag
from deepseek.spec.processes.children import ends_with_us, free_ports
from export.checks.gpu_baselines import without_gpu
from loadtests.report.page import card, document, facts
from serving.doctor.machine import Machine

FP8 = "8.9"  # Ada, the first compute capability with FP8
LAST_LINES = 12
MODELS = ("recommender", "minilm")
SLOWEST_STOP_S = 10
Outcome = Literal["passed", "failed", "inconclusive", "skipped"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    name: str
    outcome: Outcome
    reason: str
    """Why it did not pass."""
    claim: str
    command: str
    seconds: float = 0
    last_lines: tuple[str, ...] = ()
    log: str = ""

    @classmethod
    def of(cls, step: GpuStep, outcome: Outcome, reason: str, **more: Any) -> "StepResult":
        command = shlex.join(step.command)
        return cls(name=step.name, outcome=outcome, reason=reason, claim=step.claim, command=command, **more)


def missing(machine: Machine) -> dict[str, str]:
    """For each fact that steps need: why this machine lacks it, "" if it has it."""
    capability = max((gpu.compute_capability for gpu in machine.gpus), key=_numbers, default="")
    engines = machine.docker or ()
    installed = shutil.which("docker") is not None
    docker = "no Docker engine answers this user: see docker info" if installed else "docker is not installed"
    return {
        "gpu": "" if machine.gpus else f"no GPU: {why_none()}",
        "torch": without_gpu() if machine.gpus else "",
        "fp8": "" if _numbers(capability) >= _numbers(FP8) else f"compute capability {capability or 'none'} has no FP8",
        "docker": "" if engines else docker,
        "runtime": "" if "nvidia" in engines else "Docker has no NVIDIA runtime" if engines else docker,
        "nsys": "" if shutil.which("nsys") else "nsys is not installed",
    }


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def unmet(step: GpuStep, lacks: dict[str, str], before: dict[str, StepResult]) -> str:
    """The first reason to skip the step, or ""."""
    for need in step.needs:
        if lacks.get(need):
            return lacks[need]
        if need not in lacks and before[need].outcome != "passed":
            was = before[need].outcome
            return f"needs {need!r}, which {'failed' if was == 'failed' else f'was {was}'}"
    if step.needs_one_of and all(before[need].outcome != "passed" for need in step.needs_one_of):
        return f"needs {' or '.join(map(repr, step.needs_one_of))}; none passed"
    return ""


def run(step: GpuStep, log: Path, environment: dict[str, str]) -> StepResult:
    """Runs the step until it finishes or reaches its time limit; then ends all processes that it started."""
    began, reason, code = time.monotonic(), "", 0
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command,
                env={**{name: value for name, value in os.environ.items() if not _of_a_stack(name)}, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=ends_with_us(),
            )
        except OSError as error:
            reason = f"{step.command[0]} cannot be started: {error.strerror}"
        else:
            try:
                code = process.wait(step.limit_s)
                reason = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                reason = f"not done within {step.limit_s} s"
            finally:
                _end(process)
    lines = log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
    outcome: Outcome = "failed" if reason else "passed"
    if code == ExitCode.INVALID and step.command[:3] == ours():
        outcome = "inconclusive"
    seconds = round(time.monotonic() - began, 1)
    return StepResult.of(step, outcome, reason, seconds=seconds, last_lines=tuple(lines), log=str(log))


def _of_a_stack(name: str) -> bool:
    """Whether docker compose would prefer this variable of the environment to the check's own settings."""
    return name.startswith("COMPOSE_") or name in ("GATEWAY_PORT", "LOCAL_PORTS", "LOCAL_HTTP_PORT", "LOCAL_GRPC_PORT")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the step's processes: SIGTERM to all first, so that docker can stop the container that it runs."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        ends_at = time.monotonic() + SLOWEST_STOP_S
        while time.monotonic() < ends_at:
            process.poll()  # else the leader stays in the group as a zombie
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(options: argparse.Namespace) -> int:
    check_tag(options.triton_tag or TRITON_TAG)
    end_at_sigterm()
    folder: Path = (options.output or build_dir("gpu-check")).resolve()
    machine, ports = Machine.detect(), free_ports(3)
    where = Where(
        folder=folder,
        models=str(options.models),
        triton_tag=options.triton_tag or TRITON_TAG,
        **dict(zip(("gateway_port", "http_port", "grpc_port"), ports, strict=True)),
    )
    results: dict[str, StepResult] = {}
    lacks, started = missing(machine), datetime.now(UTC).isoformat(timespec="seconds")
    environment = {"DEEPSEEK_BUILD": str(folder / "build"), "DEEPSEEK_CACHE": str(folder / "cache")}
    table, is_up = steps(where, options.model or list(MODELS)), False
    with alone_in(folder):
        (folder / "logs").mkdir(exist_ok=True)
        try:
            for number, step in enumerate(table, 1):
                reason = unmet(step, lacks, results)
                log = folder / "logs" / f"{number:02}.log"
                is_up = is_up or (step.name == STACK_UP and not reason)
                results[step.name] = found = (
                    StepResult.of(step, "skipped", reason) if reason else run(step, log, environment)
                )
                print(line(found), file=sys.stderr, flush=True)
                report: dict[str, Any] = {"started": started, "triton_tag": where.triton_tag}
                report |= {"machine": described(machine), "steps": [asdict(each) for each in results.values()]}
                write_whole(folder / "gpu-check.json", json.dumps(report, indent=2) + "\n")
                write_whole(folder / "gpu-check.html", page(report))
        finally:
            if is_up and STACK_DOWN not in results:  # interrupted: stop what the check started
                (down,) = (step for step in table if step.name == STACK_DOWN)
                run(down, folder / "logs" / "stack-down.log", environment)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(folder / "gpu-check.html", folder / "gpu-check.json", sep="\n")
    outcomes = {each.outcome for each in results.values()}
    if "failed" in outcomes:
        return ExitCode.GATE_FAILED
    return ExitCode.PASS if outcomes == {"passed"} else ExitCode.INVALID


def line(result: StepResult) -> str:
    why = f": {result.reason}" if result.reason else ""
    return f"{result.outcome:12} {result.seconds:6.0f} s  {result.name}{why}"


def described(machine: Machine) -> dict[str, Any]:
    """The facts of the machine that the report shows."""
    names = [f"{gpu.name}, driver {gpu.driver}, compute capability {gpu.compute_capability}" for gpu in machine.gpus]
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "GPUs": "; ".join(names) or "none",
        "Docker's runtimes": ", ".join(machine.docker or ()) or "none",
    }


def page(report: dict[str, Any]) -> str:
    """The HTML file: a line for each step, beside the guide's claim."""
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("step", "outcome", "seconds", "the guide says"))
    rows = "".join(_row(step) for step in report["steps"])
    body = (
        f"<h1>GPU check</h1>{card('Machine', facts(report['machine'].items()))}"
        f"{card('Steps', f'<table class=numbers><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>')}"
    )
    return document("GPU check", body, f"{report['started']}, Triton {report['triton_tag']}")


def _row(step: dict[str, Any]) -> str:
    text = "\n".join(step["last_lines"])
    output = f"<details><summary>last lines</summary><pre>{escape(text)}</pre></details>" if text else ""
    why = f": {step['reason']}" if step["reason"] else ""
    cells = (escape(step["outcome"] + why) + output, f"{step['seconds']:.0f}", escape(step["claim"]))
    return f"<tr><th scope='row'>{escape(step['name'])}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
