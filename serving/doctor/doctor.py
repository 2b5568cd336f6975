"""The command `doctor`: checks whether the engines of a model repository will run here.

Contract: changes nothing (`serving.doctor.examine`). Every mismatch is one line with one fix. Exit codes: 0 no
mismatch, 1 a mismatch (with --strict also a warning), 2 no repository. --preflight runs before `tritonserver` in a
container: it skips the Docker check and reads only the versions that Triton would load.
"""

import argparse
import json
import sys
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import BATCH
from deepseek.spec.files.read_env_file import gpu_stack_tag
from serving.doctor.engine_checks import ServedEngine
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from serving.doctor.machine_checks import mib


def _print_table(engines: list[ServedEngine], machine: Machine) -> None:
    table = Table("engine", "precision", "target", "batch", "size", "drop", box=box.SIMPLE_HEAD)
    for engine in engines:
        manifest = engine.manifest
        drop = (manifest.accuracy or {}).get("drop")
        table.add_row(
            engine.where,
            manifest.precision,
            manifest.target,
            f"{manifest.axes[BATCH]['min']} to {manifest.axes[BATCH]['max']}",
            mib(manifest.size_bytes),
            "" if drop is None else f"{drop:+.2%}",
        )
    Console(markup=False).print(table)
    gpus = ", ".join(f"{gpu.name} ({gpu.compute_capability}, driver {gpu.driver})" for gpu in machine.gpus)
    in_container = machine.gpus or any(engine.manifest.target != "onnxruntime" for engine in engines)
    triton = f"; Triton {machine.triton_tag}" if in_container else ""  # the embedded one is another release
    print(f"machine   {gpus or 'no GPU'}; {mib(machine.ram_bytes)} RAM{triton}")


def main(options: argparse.Namespace) -> int:
    repository = options.repository
    tag = options.triton_tag or ("" if options.preflight else gpu_stack_tag(options.env_file))
    machine = Machine.detect(triton_tag=tag, in_container=options.preflight)
    engines, findings = examine(repository, machine, model=options.model, kept=not options.preflight)
    failing = ("mismatch", "warning") if options.strict else ("mismatch",)
    holds = not any(finding.level in failing for finding in findings)
    if options.json:
        found = [asdict(finding) for finding in findings]
        served = [
            {"model": each.model, "version": each.version, **each.manifest.model_dump(mode="json", exclude={"model"})}
            for each in engines
        ]
        result = {"holds": holds, "findings": found, "engines": served, "machine": asdict(machine)}
        print(json.dumps(result, indent=2))
        return 0 if holds else 1
    if holds and not options.preflight:
        _print_table(engines, machine)
    for finding in findings:
        print(f"{finding.level:<9} {finding}", file=sys.stderr if options.preflight else sys.stdout)
    return 0 if holds else 1
