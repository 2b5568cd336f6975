"""Runs overload and failure experiments on the real server and gateway: requirement and result of each, on this machine.

Serves the built models (`make engine`, `make engine MODEL=minilm`) from a separate repository, on free ports, and stops
all that it started. On a busy machine, latency limits may not hold. Needs nginx with njs. Writes `build/bench-failure.json`.

Exit codes: 0 all requirements hold; 1 one does not; 2 a model is not built; 3 one could not be measured.

Examples:
    python -m tests.bench.failure                                    # all: 40 minutes, 30 of them for the soak
    python -m tests.bench.failure --only overload --only malformed
    python -m tests.bench.failure --only soak --soak-s 600 --json
    python -m tests.bench.failure --only malformed --requests 100000
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, Parser, build_dir, run_command
from deepseek.spec.files.folders import write_whole
from export.artifact import choice_path
from tests.bench.failure.killed import server_killed, server_restarted
from tests.bench.failure.malformed import malformed_requests
from tests.bench.failure.overload import overload
from tests.bench.failure.setting import Model, Row, Setting
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


def shown(rows: list[Row]) -> Table:
    table = Table("", "asked", "seen", "holds", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(row.what, row.asked, row.seen, {None: "", True: "yes", False: "NO"}[row.holds])
    return table


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


def main() -> int:
    parser = Parser(__doc__, prog="python -m tests.bench.failure")
    parser.add_argument("--only", choices=EXPERIMENTS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--overload-s", type=int, default=60, help="seconds of overload (default: %(default)s)")
    parser.add_argument("--soak-s", type=int, default=1800, help="seconds of the soak (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=10_000, help="malformed requests (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    if not (shutil.which("nginx") and NJS.is_file()):
        raise InputError(
            "the gateway needs nginx with njs, which is not installed: apt-get install nginx-light libnginx-mod-http-js"
        )
    sizes = {name: getattr(args, name) for name in ("overload_s", "soak_s", "requests")}
    for name, least in zip(sizes, (5, 60, 4), strict=True):
        if sizes[name] < least:
            raise InputError(f"--{name.replace('_', '-')} {sizes[name]}: it must be {least} or more")
    os.environ["DEEPSEEK_BUILD"] = os.path.abspath(os.environ.get("DEEPSEEK_BUILD", "build"))
    with tempfile.TemporaryDirectory(prefix="failure-") as folder:
        repository = Path(folder) / "repository"
        model, other = (published(name, repository) for name in (MODEL, OTHER))
        setting = Setting(
            folder=Path(folder), repository=repository, models=Path("models"), model=model, other=other, **sizes
        )
        rows, measured = run_all(args.only or list(EXPERIMENTS), setting)
    text = json.dumps([asdict(row) for row in rows], indent=2)
    write_whole(build_dir("bench-failure.json"), text + "\n")
    if args.json:
        print(text)
    else:
        Console(width=max(Console().width, 150)).print(shown(rows))
    return 1 if any(row.holds is False for row in rows) else 0 if measured else 3


if __name__ == "__main__":
    run_command(main)
