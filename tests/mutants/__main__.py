"""Puts seeded mutants into the core modules, one at a time, and reports which of them the tests catch.

Contract: works in copies of the tree, one per process, never in the checkout. A mutant is caught if a test of its module
fails or exceeds its time limit. Tests marked `alone` or `slow` do not run. Mutants in `tests/mutants/equivalent.toml` do
not count.

With fewer than 30 mutants per module, a module's share means little: then all modules are judged together, and fail only
if chance cannot explain the survivors (exact binomial test, 95 %).

Exit codes: 0 at least 85 % caught in every module, 1 less in one, 2 bad input.

Examples:
    python -m tests.mutants
    python -m tests.mutants --module schedule --count 20 --json build/mutants.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console
from rich.table import Table

from deepseek.spec import InputError
from deepseek.spec.command import exit_code
from tests.mutants.mutations import Mutant, mutants_of, sample

LEAST_CAUGHT = 0.85
LEAST_OF_A_MODULE = 30  # mutants; with fewer, the sample fails only if chance cannot explain its survivors
QUICK_S = 0.1
LEAST_TIMEOUT_S = 60  # and at least four times the tests' time on the unchanged code
OUTCOMES = ("caught", "survived", "equivalent")
LEFT_OUT = (".git", ".venv", "build", "__pycache__", ".*_cache", "*.egg-info")
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
# Core module -> its files, and the test files that guard it.
MODULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "verdict": (
        tuple(
            f"loadtests/slo/{name}.py"
            for name in ("judge", "verdict", "judged_objectives", "generator_health", "slo_demands", "bounds")
        ),
        (
            "tests/test_verdict.py",
            "tests/test_generator_health.py",
            "tests/test_slo_demands.py",
            "tests/test_run.py",
            "tests/test_bounds.py",
        ),
    ),
    "schedule": (("loadtests/results/schedule.py",), ("tests/test_schedule.py",)),
    "retry": (
        tuple(f"client/deepseek_client/{name}.py" for name in ("core", "resilience/retry", "resilience/retry_budget")),
        (
            "tests/test_client.py",
            "tests/test_client_async.py",
            "tests/test_client_gateway.py",
            "tests/test_client_hedging.py",
            "tests/test_client_retry.py",
            "tests/test_client_memory.py",
            "tests/test_client_replicas.py",
            "tests/test_client_statistics.py",
        ),
    ),
    "publishing": (
        (
            "export/stages/publish.py",
            "export/publishing/triton_config.py",
            "deepseek/spec/files/version_files.py",
            "serving/release/versions.py",
        ),
        ("tests/test_publish.py", "tests/test_triton_config.py", "tests/test_versions.py"),
    ),
    "precision selection": (
        (
            "export/stages/select_precision.py",
            "export/precision/precision_choice.py",
            "export/precision/accuracy_budget.py",
        ),
        ("tests/test_select_precision.py", "tests/test_precision_choice.py", "tests/test_accuracy.py"),
    ),
    "build pipeline": (
        ("export/pipeline.py", "export/stage_inputs.py", "export/build.py", "export/cache.py"),
        ("tests/test_pipeline.py", "tests/test_build.py", "tests/test_plan.py", "tests/test_cache.py"),
    ),
}

Row = dict[str, Any]
"""A mutant and its outcome: module, file, line, before, after, outcome, by (which test, or why equivalent), seconds."""


@dataclass(frozen=True)
class Tree:
    """A copy of the checkout, for one process at a time."""

    folder: Path

    @property
    def record(self) -> Path:
        """The file in which `recorder` saved the last run."""
        return Path(f"{self.folder}.json")

    @property
    def log(self) -> Path:
        """The output of pytest."""
        return Path(f"{self.folder}.log")

    def failure(self, tests: Sequence[str], order: Path, timeout_s: float) -> str:
        """The failure: a test, "time-out" or "at start"; "" if all tests pass.

        A slow test must fail twice, since it may depend on timing. If it passes the second time, it is flaky and left
        out.
        """
        seconds = json.loads(order.read_text())["seconds"] if order.exists() else {}
        left_out: list[str] = []
        while True:
            selected = [*tests, *(f"--deselect={test}" for test in left_out)]
            failed = self._run(selected, order, timeout_s)
            if failed in ("", "at start", "time-out") or seconds.get(failed, 1.0) < QUICK_S:
                return failed
            if self._run([failed], order, timeout_s):
                return failed
            left_out.append(failed)

    def _run(self, selected: Sequence[str], order: Path, timeout_s: float) -> str:
        # Shared session fixtures lie beside basetemp, made once by the unchanged code (`of_the_run`).
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "tests.mutants.recorder"]
        command += ["-m", "not alone and not slow", f"--basetemp={self.folder}.tmp", *selected]
        environment = {"PYTHONPATH": f"{self.folder}{os.pathsep}{self.folder / 'client'}"}
        environment |= {"MUTANTS_RECORD": str(self.record), "MUTANTS_ORDER": str(order)}
        environment |= {"PYTEST_XDIST_WORKER": "mutant"}
        self.record.unlink(missing_ok=True)
        with self.log.open("w") as log:
            run = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                if (code := run.wait(timeout_s)) <= 0:
                    return "time-out" if code else ""
                return (self.record.exists() and json.loads(self.record.read_text())["failed"]) or "at start"
            except subprocess.TimeoutExpired:
                return "time-out"
            finally:  # also ends what the tests left running
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
                run.wait()


class Probe:
    """Runs mutants in copies of the tree."""

    def __init__(self, scratch: Path, jobs: int) -> None:
        self._scratch = scratch
        self._trees: SimpleQueue[Tree] = SimpleQueue()
        self._seconds: dict[str, float] = {}
        for number in range(jobs):
            folder = scratch / f"tree-{number}"
            shutil.copytree(".", folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
            self._trees.put(Tree(folder))

    def time_unchanged(self, name: str) -> None:
        """Runs the module's tests on the unchanged code, where they must pass."""
        tree, start_s = self._trees.get(), time.monotonic()
        failed = tree.failure(MODULES[name][1], self._order(name), timeout_s=900)
        self._seconds[name] = time.monotonic() - start_s
        if not failed:
            shutil.copyfile(tree.record, self._order(name))
        log = tree.log.read_text()
        self._trees.put(tree)
        if failed:
            print(log[-4000:], file=sys.stderr)
            raise InputError(f"{name}: {failed} fails without a mutant; fix the test first")
        print(f"{name:<20} {self._seconds[name]:.0f} s without a mutant", file=sys.stderr)

    def judge(self, name: str, mutant: Mutant, why_equivalent: str | None) -> Row:
        """Applies one mutant, runs the tests, reverts it."""
        row: Row = {"module": name, **asdict(mutant)}
        del row["source"]
        if why_equivalent is not None:
            return {**row, "outcome": "equivalent", "by": why_equivalent, "seconds": 0.0}
        tree, start_s = self._trees.get(), time.monotonic()
        place = tree.folder / mutant.file
        original = place.read_text()
        timeout_s = max(LEAST_TIMEOUT_S, 4 * self._seconds[name])
        try:
            _write(place, mutant.source)
            failed = tree.failure(MODULES[name][1], self._order(name), timeout_s)
        finally:
            _write(place, original)
            self._trees.put(tree)
        row |= {"outcome": "caught" if failed else "survived", "by": failed, "seconds": time.monotonic() - start_s}
        print(f"{name:<20} {row['outcome']:<9} {row['seconds']:5.1f} s  {mutant}", file=sys.stderr, flush=True)
        return row

    def _order(self, name: str) -> Path:
        return self._scratch / f"{name}.json"


def _write(place: Path, source: str) -> None:
    """Writes a module and removes its compiled form: Python compares only the size and the second of a source."""
    place.write_text(source)
    for compiled in place.parent.glob(f"__pycache__/{place.stem}.*"):
        compiled.unlink()


def chosen(name: str, count: int, seed: int) -> list[Mutant]:
    """A sample of the module's mutants."""
    return sample((each for file in MODULES[name][0] for each in mutants_of(Path(file).read_text(), file)), count, seed)


def share_caught(rows: Sequence[Row]) -> float:
    """The share of caught mutants, without the equivalent ones."""
    counted = [row for row in rows if row["outcome"] != "equivalent"]
    return sum(row["outcome"] == "caught" for row in counted) / len(counted) if counted else 1.0


def surely_missed(rows: Sequence[Row]) -> bool:
    """Whether a sample shows, at 95 % confidence, that fewer than LEAST_CAUGHT are caught (exact binomial test)."""
    counted = [row for row in rows if row["outcome"] != "equivalent"]
    total, caught = len(counted), sum(row["outcome"] == "caught" for row in counted)
    chances = (math.comb(total, k) * LEAST_CAUGHT**k * (1 - LEAST_CAUGHT) ** (total - k) for k in range(caught + 1))
    return total > 0 and sum(chances) < 0.05


def show(by_module: dict[str, list[Row]]) -> None:
    """Prints every survivor, and the table."""
    table = Table("module", "mutants", *OUTCOMES, "share caught (higher is better)", f"under {LEAST_CAUGHT:.0%}")
    for name, rows in by_module.items():
        for row in rows:
            if row["outcome"] == "survived":
                print("survived: {file}:{line}: {before}  ->  {after}".format(**row))
        counts = [str(sum(row["outcome"] == outcome for row in rows)) for outcome in OUTCOMES]
        share = share_caught(rows)
        table.add_row(name, str(len(rows)), *counts, f"{share:.0%}", "" if share >= LEAST_CAUGHT else "missed")
    Console(width=max(Console().width, 110), markup=False).print(table)


def main() -> int:
    """Runs the mutants and prints the result; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", action="append", choices=MODULES, help="only this module (default: all)")
    parser.add_argument("--count", type=int, default=50, help="mutants per module (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=17, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel runs (default: one per core)")
    parser.add_argument("--json", metavar="FILE", help="save every mutant with its outcome")
    args = parser.parse_args()
    names = args.module or list(MODULES)
    tasks = [(name, mutant) for name in names for mutant in chosen(name, args.count, args.seed)]
    known = {
        (row["module"], row["line"], row["mutant"]): row["reason"]
        for row in tomllib.loads(EQUIVALENT.read_text())["equivalent"]
    }
    reasons = [known.get((name, mutant.before, mutant.after)) for name, mutant in tasks]
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, ThreadPoolExecutor(args.jobs) as pool:
        probe = Probe(Path(scratch), args.jobs)
        list(pool.map(probe.time_unchanged, names))
        rows = list(pool.map(probe.judge, *zip(*tasks, strict=True), reasons))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    by_module = {name: [row for row in rows if row["module"] == name] for name in names}
    show(by_module)
    if args.count < LEAST_OF_A_MODULE:
        return int(surely_missed(rows))
    return int(any(share_caught(each) < LEAST_CAUGHT for each in by_module.values()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
