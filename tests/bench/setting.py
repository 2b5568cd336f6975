"""Shared parts of the benchmarks: models, raw sessions, servers, loads and results.

A benchmark is a function `name(bench: Bench) -> None` in a module of this package that calls `bench.record` once per
ratio; `tests/bench/__main__.py` lists them. Both sides of a ratio are measured in turn, many times.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
from deepseek_client import InferenceClient
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, TunedBatching, TunedFile, TunedTarget, build_dir
from export.artifact import choice_path, onnx_path
from export.rows import Row, batches, load_rows
from serving.embedded.launcher import EmbeddedServer
from tests.bench.results import Goal, Ratio
from tests.conftest import run_module
from tests.fake_endpoint import FakeEndpoint

ENCODER_TOML = """
name = "encoder"
[inputs.input_ids]
dtype = "int64"
shape = ["batch", 128]
[outputs.embedding]
dtype = "float32"
shape = ["batch", 384]
[axes.batch]
min = 1
opt = 4
max = 4
[precision]
candidates = ["int8"]
max_drop = 0.1
calibration_samples = 64
[batching]
max_queue_size = 512
queue_timeout_ms = 10000
instances = 2
threads = 1
[slo]
p99_ms = 1000
rate_rps = 10
"""
ENCODER_MODEL = """
import numpy as np
import torch
from deepseek import Transformer, TransformerConfig

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Transformer(TransformerConfig(num_layers=6, hidden_size=384, num_attention_heads=12,
            intermediate_size=1536, vocab_size=30522, max_length=128, causal=False))

    def forward(self, input_ids):
        return torch.nn.functional.normalize(self.body(input_ids).mean(1), dim=-1)

def load():
    torch.manual_seed(0)
    return Encoder()

def samples(split):
    random = np.random.default_rng(len(split))
    for _ in range(64):
        yield {"input_ids": random.integers(1, 30522, (1, 128))}
"""
BUILT = ("recommender", "minilm")  # must be built before, by `make engine`
MODELS = ("encoder", *BUILT)
SIDE_S = 4.0  # duration of one side of a pair

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
log = Console(stderr=True)


class Bench:
    """The models, how to run them raw, served and under load, and the results."""

    def __init__(self, folder: Path, pairs: int, models: Sequence[str]) -> None:
        """`models`: those that `prepare` has put into the folder."""
        self.folder, self.pairs, self.files = folder, pairs, build_dir("bench")
        self.results: list[Ratio] = []
        os.environ["DEEPSEEK_BUILD"] = str(folder / "build")
        self.specs = {name: DeploymentSpec.of_model(name, folder / "models") for name in models}
        self.rows = {name: load_rows(build_dir(name) / "evaluation.npz") for name in self.specs}

    def record(self, name: str, ratios: list[float], goal: Goal | None = None, note: str = "") -> None:
        """Records the median and the quartiles of the pairs."""
        self.results.append(result := Ratio.of(name, ratios, goal, note))
        log.print(f"{name}: {result.ratio:.2f} ({result.quartiles[0]:.2f} to {result.quartiles[1]:.2f}) {result.said}")

    # -- the raw runtime -------------------------------------------------------------------------

    def raw_sessions(self, path: Path, count: int, without: tuple[str, ...] = ()) -> list[onnxruntime.InferenceSession]:
        """`count` sessions that share the cores, `without` some of ONNX Runtime's optimizers."""
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = max(1, len(os.sched_getaffinity(0)) // count)
        options.log_severity_level = 3
        settings: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": list(without)}
        return [onnxruntime.InferenceSession(path, options, **settings) for _ in range(count)]

    def raw_throughput(self, name: str, without: tuple[str, ...] = ()) -> Callable[[], float]:
        """Finds raw ONNX Runtime's best setting, sessions x batch; returns a function that measures its rows/s."""
        path = onnx_path(name, "fp32")
        settings = {}
        for count in (1, len(os.sched_getaffinity(0))):
            sessions = self.raw_sessions(path, count, without)
            for batch in sorted({1, 2, 4, self.specs[name].max_batch}):
                _, inputs = next(batches(self.rows[name], batch))
                settings[count, batch] = _rows_per_s_of(sessions, inputs)
        speeds = {key: statistics.median(measure() for _ in range(3)) for key, measure in settings.items()}
        best = max(speeds, key=lambda key: speeds[key])
        log.print(f"raw {name}: best of {len(speeds)} settings: {best[0]} session(s), batch {best[1]}")
        return settings[best]

    # -- loads -----------------------------------------------------------------------------------

    def perf_analyzer(self, server: EmbeddedServer, name: str, protocol: str, users: int) -> tuple[list[str], Path]:
        """The command, with requests of one real row each, and the path of its table."""
        data = self.folder / f"{name}.json"
        if not data.exists():
            content = [
                {key: {"content": array.ravel().tolist(), "shape": list(array.shape[1:])} for key, array in row.items()}
                for row in self.rows[name][:64]
            ]
            data.write_text(json.dumps({"data": content}))
        table = self.folder / "perf_analyzer.csv"
        flags = ("--measurement-interval", str(int(SIDE_S * 1000)), "--input-data", str(data))
        return perf_analyzer_command(url_of(server, protocol), name, protocol, users, table, *flags), table

    def peer_figures(self, server: EmbeddedServer, name: str, protocol: str, users: int) -> dict[str, float]:
        """Throughput (1/s), p50 and p99 (us) that perf_analyzer reports."""
        row = perf_analyzer_row(*self.perf_analyzer(server, name, protocol, users))
        latency = {f"p{percent}_us": float(row[f"p{percent} latency"]) for percent in (50, 99)}
        return {"throughput": float(row["Inferences/Second"]), **latency}

    def served_throughput(self, server: EmbeddedServer, name: str, users: int) -> float:
        """Rows/s by Triton's own count, during a closed loop of perf_analyzer."""
        command, _ = self.perf_analyzer(server, name, "grpc", users)
        load = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(2)  # until all users send
            started, before = time.perf_counter(), _inferences(server, name)
            time.sleep(SIDE_S)
            done = _inferences(server, name) - before
            return done / (time.perf_counter() - started)
        finally:
            load.kill()
            load.wait()
            time.sleep(0.5)  # for requests in flight

    def loadtest(self, server: EmbeddedServer, name: str, protocol: str, *flags: str) -> dict[str, float]:
        """The same figures from this project's load test."""
        where = ("--url", url_of(server, protocol), "--protocol", protocol, "--warmup-s", "2", "--duration-s", "12")
        result = json.loads(self.run("cli loadtest", name, *where, "--json", *flags, allowed=(0, 3)))
        latency = {f"p{percent}_us": result["latency"]["service"][f"p{percent}_ms"] * 1000 for percent in (50, 99)}
        return {"throughput": result["throughput_rps"], **latency}

    def run(self, command: str, model: str, *flags: str, allowed: tuple[int, ...] = (0,)) -> str:
        """Runs a command of this project on one of the bench's models; returns its output."""
        return run_ours(self.folder, command, model, *flags, allowed=allowed)

    def repository(self, name: str) -> Path:
        """The model repository of one model."""
        return self.folder / f"repository-{name}"

    def publish(self, folder: str, name: str, precision: str, batching: TunedBatching) -> Path:
        """Publishes one model with the given settings; returns its repository."""
        values, repository = self.folder / f"{folder}.toml", self.repository(folder)
        TunedFile(targets={"onnxruntime": TunedTarget(batching=batching)}).write(values)
        flags = ("--precision", precision, "--tuned", str(values), "--repository", str(repository))
        self.run("cli publish", name, *flags)
        return repository

    def server(self, repository: Path) -> EmbeddedServer:
        """A server on free ports."""
        ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        return EmbeddedServer(repository, log_path=self.folder / f"{repository.name}.log", **ports)


def url_of(server: EmbeddedServer | FakeEndpoint, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


def _inferences(server: EmbeddedServer, name: str) -> int:
    """The rows that Triton has inferred, by its own count."""
    with InferenceClient(server.http_url, "http") as client:
        return client.model_statistics(name)["model_stats"][0]["inference_count"]


def perf_analyzer_command(url: str, model: str, protocol: str, users: int, table: Path, *flags: str) -> list[str]:
    """A closed loop of perf_analyzer, over three windows regardless of their spread: the pairs show the noise."""
    program = Path(sys.prefix, "lib", PYTHON, "site-packages/perf_analyzer/bin/perf_analyzer")
    command = [str(program), "-m", model, "-u", url, "-i", protocol, "-b", "1", "--concurrency-range", str(users)]
    return [*command, "--stability-percentage", "99999", "--max-trials", "3", "-f", str(table), *flags]


def perf_analyzer_row(command: list[str], table: Path) -> dict[str, str]:
    """Runs perf_analyzer; returns the row of its table."""
    subprocess.run(command, check=True, capture_output=True)
    with table.open() as file:
        return next(csv.DictReader(file))


def run_ours(folder: Path, command: str, model: str, *flags: str, allowed: tuple[int, ...] = (0,)) -> str:
    """Runs a command of this project on the models and the build of a folder; returns its output."""
    which = ("--model", model, "--models", str(folder / "models"))
    settings = {"DEEPSEEK_BUILD": str(folder / "build"), "PYTHONWARNINGS": "ignore"}
    with log.status(f"{command} of {model}"):
        found = run_module(*command.split(), *which, *flags, **settings)
    if found.returncode not in allowed:
        raise InputError(f"{command} of {model}: {found.stderr}")
    return found.stdout


@contextlib.contextmanager
def on(cores: list[int]) -> Iterator[None]:
    """Restricts this thread, and what it starts, to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _rows_per_s_of(sessions: list[onnxruntime.InferenceSession], inputs: Row) -> Callable[[], float]:
    """A function that measures the rows/s of sessions running in parallel."""
    size = len(next(iter(inputs.values())))

    def run(session: onnxruntime.InferenceSession) -> float:
        session.run(None, inputs)
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SIDE_S:
            session.run(None, inputs)
            done += size
        return done / elapsed  # up to the end of the last batch, which SIDE_S would cut off

    def measure() -> float:
        with ThreadPoolExecutor(len(sessions)) as pool:
            return sum(pool.map(run, sessions))

    return measure


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def prepare(folder: Path, models: Sequence[str]) -> None:
    """Builds the encoder, takes the models that are built, and publishes each in fp32, in its own repository."""
    for name in set(models).intersection(BUILT):
        if not choice_path(name, "onnxruntime").is_file():
            raise InputError(
                f"{choice_path(name, 'onnxruntime')}: no such file; the benchmarks need it: make engine MODEL={name}"
            )
    (folder / "models").mkdir()
    (folder / "build").mkdir()
    for name in models:
        if name in BUILT:
            (folder / "models" / name).symlink_to(Path("models", name).resolve())
            subprocess.run(["cp", "-r", build_dir(name), folder / "build"], check=True)
        else:
            (folder / "models" / name).mkdir()
            (folder / "models" / name / "deploy.toml").write_text(ENCODER_TOML)
            (folder / "models" / name / "model.py").write_text(ENCODER_MODEL)
            run_ours(folder, "cli to-onnx", name)
            run_ours(folder, "cli quantize", name, "--precision", "int8", "--high-precision", "fp32")
        repository = ("--repository", str(folder / f"repository-{name}"))
        run_ours(folder, "cli publish", name, "--precision", "fp32", *repository)
