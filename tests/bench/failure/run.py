"""`deepseek measure-failure`: what is required of the server and the gateway under overload and faults, and what was seen.

Serves the built models (`make engine`, `make engine MODEL=minilm`) from a separate repository, on free ports, and stops
all that it started. On a busy machine, latency limits may not hold. Needs nginx with njs. Writes `build/bench-failure.json`.

Exit codes: 0 all requirements hold; 1 one does not; 2 a model is not built; 3 one could not be measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, build_dir
from export.artifact import choice_path
from tests.bench.claims import Row, conclude
from tests.bench.failure.killed import server_killed, server_restarted
from tests.bench.failure.malformed import malformed_requests
from tests.bench.failure.overload import overload
from tests.bench.failure.setting import Model, Setting
from tests.bench.failure.soak import soak
from tests.conftest import run_module
from tests.gateway import NJS

EXPERIMENTS: dict[str, Callable[[Setting], list[Row]]] = {
    "overload": overload,
    "server-killed": server_killed,
    "server-restarted": server_restarted,
    "malformed": malformed_requests,
    "soak": soak,
}
MODEL, OTHER = "recommender", "minilm"
log = Console(stderr=True)


def published(name: str, repository: Path) -> Model:
    """Publishes a built model. Raises InputError if it is not built."""
    if not choice_path(name, "onnxruntime").is_file():
        raise InputError(f"{choice_path(name, 'onnxruntime')}: no such file; make engine MODEL={name}")
    run = run_module("cli", "publish", "--model", name, "--repository", str(repository))
    if run.returncode:
        raise InputError(run.stderr)
    spec = DeploymentSpec.of_model(name).for_target("onnxruntime")
    return Model(spec=spec, inputs=build_dir(name).absolute() / "evaluation.npz")


def run_all(names: list[str], setting: Setting) -> tuple[list[Row], bool]:
    """Runs experiments; returns their rows, and whether all could be measured."""
    rows, measured = list[Row](), True
    for name in names:
        with log.status(name):
            try:
                found = EXPERIMENTS[name](setting)
            except InvalidMeasurement as error:
                found, measured = [Row(what=name, seen=f"not measured: {error}")], False
        for row in found:
            log.print(f"{row.what}: {row.seen}{' - does not hold' if row.holds is False else ''}", soft_wrap=True)
        rows += found
    return rows, measured


def main(options: argparse.Namespace) -> int:
    if not (shutil.which("nginx") and NJS.is_file()):
        raise InputError(
            "the gateway needs nginx with njs, which is not installed: apt-get install nginx-light libnginx-mod-http-js"
        )
    os.environ["DEEPSEEK_BUILD"] = os.path.abspath(os.environ.get("DEEPSEEK_BUILD", "build"))
    with tempfile.TemporaryDirectory(prefix="failure-") as folder:
        repository = Path(folder) / "repository"
        model, other = (published(name, repository) for name in (MODEL, OTHER))
        setting = Setting(
            folder=Path(folder),
            repository=repository,
            models=Path("models"),
            model=model,
            other=other,
            overload_s=options.overload_s,
            soak_s=options.duration_s,
            requests=options.requests,
        )
        rows, measured = run_all(options.only or list(EXPERIMENTS), setting)
    broken = conclude(rows, "bench-failure", asked="asked", as_json=options.json)
    return broken or (0 if measured else 3)
