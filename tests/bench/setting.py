"""Shared parts of the benchmarks: models, raw sessions, servers, loads and results.

A benchmark is a function `name(bench: Bench) -> None` in a module of this package that calls `bench.record` once per
ratio; `tests/bench/run.py` lists them. Both sides of a ratio are measured in turn, many times.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import onnxruntime
from rich.console import Console

from deepseek.onnxruntime_session import SLOW_ON_CPU
from deepseek.spec import DeploymentSpec, InputError, Target, build_dir
from deepseek.spec.files.measured_batches import batches_path
from export.artifact import choice_of, choice_path, onnx_path
from export.rows import Row, batches, load_rows, save_rows
from export.stages.measure_batches import measured_batches
from serving.embedded.launcher import EmbeddedServer
from tests.bench.peers.load import Load
from tests.bench.results import Ratio
from tests.conftest import run_module
from tests.failing_servers import url_of

MODELS = ("recommender", "minilm")  # built before, by `make engine`
TARGET: Target = "onnxruntime"
TOKENS = 64  # of a row of MiniLM
SIDE_S = 3.0  # of one side of a pair
SEARCH_S = 0.5  # of one setting in the search for the fastest raw session
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
log = Console(stderr=True)
Found = TypeVar("Found")
Side = Callable[[int], Found]
"""Measures one side of a ratio, given the number of the round."""


class Bench:
    """The models, how to run them raw, served and under load, and the results."""

    def __init__(self, folder: Path, pairs: int | None) -> None:
        """Copies what `make engine` has built into `folder`, where all other files go too. `pairs`: instead of the defaults."""
        self.folder, self.files, self.results = folder, build_dir("bench").absolute(), list[Ratio]()
        self.shortened = False
        """Whether `pairs` is less than a default."""
        self._pairs = pairs
        for name in MODELS:
            if not choice_path(name, TARGET).is_file():
                file = choice_path(name, TARGET)
                raise InputError(f"{file}: no such file; the benchmarks need it: make engine MODEL={name}")
            shutil.copytree(build_dir(name), folder / "build" / name, ignore=shutil.ignore_patterns("loadtests"))
            shutil.copytree(Path("models", name), folder / "models" / name)
        os.environ["DEEPSEEK_BUILD"] = str(folder / "build")
        self.rows = {name: load_rows(build_dir(name) / "evaluation.npz") for name in MODELS}
        self.rows["minilm"] = rows_of_one_length(self.rows["minilm"])

    @property
    def specs(self) -> dict[str, DeploymentSpec]:
        """The models' specs by name; read each time, since they cannot be handed to another process."""
        return {name: DeploymentSpec.of_model(name, self.folder / "models") for name in MODELS}

    def pairs(self, default: int) -> int:
        """How many pairs a ratio has."""
        self.shortened |= self._pairs is not None and self._pairs < default
        return default if self._pairs is None else self._pairs

    def rounds(self, sides: Mapping[str, Side[Found]], default: int) -> dict[str, list[Found]]:
        """The result of each side in each round; every second round runs in reverse."""
        found: dict[str, list[Found]] = {name: [] for name in sides}
        count = self.pairs(default)
        for turn in range(count):
            for name in [*sides][:: -1 if turn % 2 else 1]:
                found[name].append(one := sides[name](turn))
                log.print(f"  round {turn + 1} of {count}, {name}: {one}")
        return found

    def record(self, key: str, ratios: Sequence[float], note: str = "") -> None:
        """Records the median and the quartiles of the pairs under a key of `tests.bench.tables`."""
        self.results.append(result := Ratio.of(key, ratios, note))
        log.print(f"{key}: {result.ratio:.2f} ({result.quartiles[0]:.2f} to {result.quartiles[1]:.2f}) {result.said}")

    def record_loads(
        self,
        key: str,
        mine: Sequence[Load],
        others: Sequence[Load],
        field: Literal["answered_per_s", "p99_ms"] = "answered_per_s",
    ) -> None:
        """Records the ratios of the rounds, and the share that each side refused."""
        ratios = [getattr(one, field) / getattr(other, field) for one, other in zip(mine, others, strict=True)]
        shares = (
            (whose, statistics.mean(load.failed for load in loads))
            for whose, loads in (("", mine), (" by the other", others))
        )
        self.record(key, ratios, "; ".join(f"{share:.1%} refused{whose}" for whose, share in shares if share))

    # -- the raw runtime -------------------------------------------------------------------------

    def raw_sessions(self, path: Path, count: int, without: tuple[str, ...] = ()) -> list[onnxruntime.InferenceSession]:
        """`count` sessions that share the cores, `without` some of ONNX Runtime's optimizers."""
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = max(1, len(os.sched_getaffinity(0)) // count)
        options.log_severity_level = 3
        settings: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": list(without)}
        return [onnxruntime.InferenceSession(path, options, **settings) for _ in range(count)]

    def raw(self, name: str, *, without: Sequence[tuple[str, ...]] = ((), SLOW_ON_CPU)) -> Side[Load]:
        """Finds raw ONNX Runtime's fastest setting in fp32 on this thread's cores; returns a side that measures its rows/s.

        The settings are sessions x batch x optimizers to disable.
        """
        cores = len(os.sched_getaffinity(0))
        settings = {}
        for left_out, count in itertools.product(without, sorted({1, cores})):
            sessions = self.raw_sessions(onnx_path(name, "fp32"), count, left_out)
            for batch in sorted({1, 2, 4, self.specs[name].max_batch}):
                _, inputs = next(batches(self.rows[name], batch))
                settings[left_out, count, batch] = _rows_per_s_of(sessions, inputs)
        speeds = {key: max(measure(SEARCH_S) for _ in range(2)) for key, measure in settings.items()}
        best = max(speeds, key=lambda key: speeds[key])
        fusions = f", without {' and '.join(best[0])}" if best[0] else ""
        log.print(f"raw {name}: best of {len(speeds)} settings: {best[1]} session(s), batch {best[2]}{fusions}")
        measure = settings[best]
        return lambda turn: Load(answered_per_s=measure(SIDE_S), failed=0, p99_ms=0)

    # -- loads -----------------------------------------------------------------------------------

    def peer_figures(self, server: EmbeddedServer, name: str, protocol: str, users: int) -> dict[str, float]:
        """Throughput (1/s), p50 and p99 (us) that perf_analyzer reports for requests of one real row each."""
        data = self.folder / f"{name}.json"
        if not data.exists():
            content = [
                {key: {"content": array.ravel().tolist(), "shape": list(array.shape[1:])} for key, array in row.items()}
                for row in self.rows[name][:64]
            ]
            data.write_text(json.dumps({"data": content}))
        table = self.folder / "perf_analyzer.csv"
        flags = ("--measurement-interval", str(int(SIDE_S * 1000)), "--input-data", str(data))
        row = perf_analyzer(url_of(server, protocol), name, protocol, users, table, *flags)
        latency = {f"p{percent}_us": float(row[f"p{percent} latency"]) for percent in (50, 99)}
        return {"throughput": float(row["Inferences/Second"]), **latency}

    def loadtest(self, server: EmbeddedServer, name: str, protocol: str, *flags: str) -> dict[str, float]:
        """The same figures from this project's load test."""
        where = ("--url", url_of(server, protocol), "--protocol", protocol, "--warmup-s", "2", "--duration-s", "12")
        inputs = self.folder / f"{name}.npz"
        save_rows(inputs, self.rows[name][:64])
        flags = (*flags, "--inputs", str(inputs), "--json")
        result = json.loads(self.run("cli loadtest", name, *where, *flags, allowed=(0, 3)))
        latency_ms = result["latency"]["service"]
        if latency_ms["p99_ms"] is None:
            raise InputError(f"{name}: {result['answered']} answers in 12 s are too few for a p99; use a quiet machine")
        latency = {f"p{percent}_us": latency_ms[f"p{percent}_ms"] * 1000 for percent in (50, 99)}
        return {"throughput": result["throughput_rps"], **latency}

    def run(self, command: str, model: str, *flags: str, allowed: tuple[int, ...] = (0,)) -> str:
        """Runs a command of this project on one of the bench's models; returns its output."""
        which = () if "--models" in flags else ("--models", str(self.folder / "models"))
        with log.status(f"{command} of {model}"):
            found = run_module(*command.split(), "--model", model, *which, *flags, PYTHONWARNINGS="ignore")
        if found.returncode not in allowed:
            raise InputError(f"{command} of {model}: {found.stderr}")
        return found.stdout

    def repository(self, name: str, precision: str = "fp32", change: tuple[str, str] = ("", "")) -> Path:
        """What `make engine` publishes in a precision (or "auto") on this thread's cores, with the batches measured there.

        `change`: a text of deploy.toml, and what it becomes.
        """
        cores = len(os.sched_getaffinity(0))
        folder = self.folder / f"{name}-{precision}-{cores}-{zlib.crc32(repr(change).encode()):x}"
        if not folder.exists():
            models = self.folder / f"{folder.name}-models"
            shutil.copytree(self.folder / "models" / name, models / name)
            settings = models / name / "deploy.toml"
            before = settings.read_text()
            assert change[0] in before, change
            settings.write_text(before.replace(*change, 1))
            chosen = choice_of(name, TARGET)[0] if precision == "auto" else precision
            spec = DeploymentSpec.of_model(name, models).for_target(TARGET)
            measured = measured_batches(spec, chosen, "cpu", TARGET)  # type: ignore[arg-type]
            batches_path(name, TARGET).write_text(measured.model_dump_json())
            flags = ("--models", str(models), "--precision", chosen, "--repository", str(folder))
            self.run("cli publish", name, *flags)
        return folder

    def server(self, repository: Path) -> EmbeddedServer:
        """A server on free ports."""
        ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        return EmbeddedServer(repository, log_path=self.folder / f"{repository.name}.log", **ports)


def chosen(flag: str, names: str | None, allowed: Iterable[str]) -> list[str]:
    """The names in a list with commas; `server` also selects all that begin with `server-`. None: all."""
    if names is None:
        return list(allowed)
    found = {name: [each for each in allowed if f"{each}-".startswith(f"{name}-")] for name in names.split(",")}
    if wrong := [name for name, each in found.items() if not each]:
        raise InputError(f"{flag} {','.join(wrong)}: unknown; allowed: {', '.join(allowed)}")
    return list(dict.fromkeys(itertools.chain(*found.values())))


def perf_analyzer(url: str, model: str, protocol: str, users: int, table: Path, *flags: str) -> dict[str, str]:
    """The row that perf_analyzer writes to `table`: a closed loop over three windows, however far they spread.

    The pairs show the noise.
    """
    program = Path(sys.prefix, "lib", PYTHON, "site-packages/perf_analyzer/bin/perf_analyzer")
    command = [str(program), "-m", model, "-u", url, "-i", protocol, "-b", "1", "--concurrency-range", str(users)]
    command += ["--stability-percentage", "99999", "--max-trials", "3", "-f", str(table), *flags]
    subprocess.run(command, check=True, capture_output=True)
    with table.open() as file:
        return next(csv.DictReader(file))


@contextlib.contextmanager
def on(cores: list[int]) -> Iterator[None]:
    """Restricts this thread, and what it starts, to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def begun_on(cores: list[int], benchmark: Callable[..., None], bench: Bench, *arguments: object) -> None:
    """Runs `benchmark(bench, *arguments)` in a process that begins on these cores, as a server does; keeps its results.

    ONNX Runtime chooses its kernels when it is imported. On a single core it leaves out those for AMX.
    """
    with on(cores), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        bench.results, bench.shortened = pool.submit(_results_of, benchmark, bench, arguments).result()


def _results_of(benchmark: Callable[..., None], bench: Bench, arguments: tuple) -> tuple[list[Ratio], bool]:
    benchmark(bench, *arguments)
    return bench.results, bench.shortened


def _rows_per_s_of(sessions: list[onnxruntime.InferenceSession], inputs: Row) -> Callable[[float], float]:
    """A function that measures for some seconds the rows/s of sessions running in parallel."""
    size = len(next(iter(inputs.values())))

    def run(session: onnxruntime.InferenceSession, lasts_s: float) -> float:
        session.run(None, inputs)
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < lasts_s:
            session.run(None, inputs)
            done += size
        return done / elapsed  # up to the end of the last batch, which the limit would cut off

    def measure(lasts_s: float) -> float:
        with ThreadPoolExecutor(len(sessions)) as pool:
            return sum(pool.map(run, sessions, itertools.repeat(lasts_s)))

    return measure


def rows_of_one_length(rows: Sequence[Row]) -> list[Row]:
    """MiniLM's rows cut into rows of TOKENS tokens without padding: (1, TOKENS) each."""
    ids = np.concatenate([row["input_ids"][row["attention_mask"] > 0] for row in rows])
    mask = np.ones((1, TOKENS), np.int64)
    return [{"input_ids": part[None], "attention_mask": mask} for part in ids[: 64 * TOKENS].reshape(-1, TOKENS)]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
