"""The ratios that the README's table shows, each from one run on this machine.

No absolute time is kept: both sides of a ratio are measured in turn, many times, and the median of the
pairs is printed with its quartiles. Needs both models built
(`make engine`, `make engine MODEL=minilm`). Writes `build/bench.json`.

Examples:
    python -m tests.bench
    python -m tests.bench --only served --pairs 20
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
from deepseek_client import InferenceClient
from rich import box
from rich.console import Console
from rich.table import Table
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http

from deepseek.spec import DeploymentSpec, InputError, Parser, build_dir, run_command
from export.artifact import Row, batches, choice_path, load_rows, onnx_path, read_manifest
from serving.embedded import EmbeddedServer
from tests.conftest import run_module

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
BUILT = ("recommender", "minilm")  # by `make engine`, before
SIDE_S = 4.0  # of one side of a pair

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
log = Console(stderr=True)


class Bench:
    """Both models, served with and without dynamic batching, and what was measured."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs
        self.results: list[dict[str, Any]] = []
        os.environ["BUILD"] = str(folder / "build")
        self.specs = {name: DeploymentSpec.of_model(name, folder / "models") for name in ("encoder", *BUILT)}
        self.rows = {name: load_rows(build_dir(name) / "evaluation.npz") for name in self.specs}

    def record(self, name: str, ratios: list[float], goal: str = "") -> None:
        """Keeps the median and the quartiles of the pairs."""
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        self.results.append(
            {"name": name, "ratio": middle, "quartiles": [low, high], "pairs": len(ratios), "goal": goal}
        )
        log.print(f"{name}: {middle:.2f} ({low:.2f} to {high:.2f}) {goal}")

    # -- the raw runtime -------------------------------------------------------------------------

    def raw_sessions(self, path: Path, count: int) -> list[onnxruntime.InferenceSession]:
        """`count` sessions that share the cores out."""
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = max(1, len(os.sched_getaffinity(0)) // count)
        options.log_severity_level = 3
        return [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for _ in range(count)]

    def raw_throughput(self, name: str) -> Callable[[], float]:
        """Rows/s of raw ONNX Runtime in the best of its settings: sessions x batch."""
        path = onnx_path(name, "fp32")
        settings = {}
        for count in (1, len(os.sched_getaffinity(0))):
            sessions = self.raw_sessions(path, count)
            for batch in sorted({1, 2, 4, self.specs[name].max_batch}):
                _, inputs = next(batches(self.rows[name], batch))
                settings[count, batch] = _rows_per_s_of(sessions, inputs)
        speeds = {key: statistics.median(measure() for _ in range(3)) for key, measure in settings.items()}
        best = max(speeds, key=lambda key: speeds[key])
        log.print(f"raw {name}: best of {len(speeds)} settings: {best[0]} session(s), batch {best[1]}")
        return settings[best]

    # -- loads -----------------------------------------------------------------------------------

    def perf_analyzer(self, server: EmbeddedServer, name: str, protocol: str, users: int, table: Path) -> list[str]:
        """The command: `users` in a closed loop, requests of one real row each."""
        data = self.folder / f"{name}.json"
        if not data.exists():
            content = [
                {key: {"content": array.ravel().tolist(), "shape": list(array.shape[1:])} for key, array in row.items()}
                for row in self.rows[name][:64]
            ]
            data.write_text(json.dumps({"data": content}))
        url = server.grpc_url if protocol == "grpc" else server.http_url
        # Three windows, whatever their spread: the pairs of a ratio are what tells of noise.
        windows = [
            "--measurement-interval",
            str(int(SIDE_S * 1000)),
            "--stability-percentage",
            "999",
            "--max-trials",
            "3",
        ]
        program = Path(sys.executable).parent.parent / "lib" / PYTHON / "site-packages/perf_analyzer/bin/perf_analyzer"
        command = [program, "-m", name, "-u", url, "-i", protocol, "-b", "1", "--concurrency-range", str(users)]
        return [*map(str, command), *windows, "--input-data", str(data), "-f", str(table)]

    def peer_figures(self, server: EmbeddedServer, name: str, protocol: str, users: int) -> dict[str, float]:
        """Throughput (1/s) and p50 (us) that perf_analyzer reports."""
        table = self.folder / "perf_analyzer.csv"
        subprocess.run(self.perf_analyzer(server, name, protocol, users, table), check=True, capture_output=True)
        with table.open() as file:
            row = next(csv.DictReader(file))
        return {"throughput": float(row["Inferences/Second"]), "p50_us": float(row["p50 latency"])}

    def served_throughput(self, server: EmbeddedServer, name: str, users: int) -> float:
        """Rows/s by Triton's own count, in the midst of a closed loop of perf_analyzer's."""
        load = subprocess.Popen(
            self.perf_analyzer(server, name, "grpc", users, self.folder / "load.csv"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(2)  # until all users are at it
            started, before = time.perf_counter(), self.inferences(server, name)
            time.sleep(SIDE_S)
            done = self.inferences(server, name) - before
            return done / (time.perf_counter() - started)
        finally:
            load.kill()
            load.wait()
            time.sleep(0.5)  # what was in flight

    def inferences(self, server: EmbeddedServer, name: str) -> int:
        """Rows that Triton has inferred."""
        with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{name}/stats") as response:
            return json.load(response)["model_stats"][0]["inference_count"]

    def loadtest(self, server: EmbeddedServer, name: str, protocol: str, *flags: str) -> dict[str, float]:
        """The same of our load test."""
        url = server.grpc_url if protocol == "grpc" else server.http_url
        which = ("--models", str(self.folder / "models"), "--model", name, "--url", url, "--protocol", protocol)
        run = run_module("loadtests.run", *which, "--warmup-s", "2", "--duration-s", "12", "--json", *flags)
        if run.returncode not in (0, 3):
            raise InputError(run.stderr)
        result = json.loads(run.stdout)
        return {"throughput": result["throughput_rps"], "p50_us": result["latency"]["service"]["p50_ms"] * 1000}

    # -- the benchmarks --------------------------------------------------------------------------

    def served(self) -> None:
        """Served throughput over raw ONNX Runtime's best.

        Both sides on the same cores. First the load generator has the last core to itself, so that what
        is missing is the server's; then it shares them all, as in a demo on a small machine.
        """
        every = sorted(os.sched_getaffinity(0))
        apart = (every[:-1] or every, every[-1:])
        self.served_over_raw("encoder", *apart, "load generator on a core of its own", "goal: at least 0.97")
        self.served_over_raw("encoder", every, every, "load generator on the same cores")
        self.served_over_raw("recommender", every, every, "load generator on the same cores")

    def served_over_raw(
        self, name: str, server_cores: list[int], load_cores: list[int], how: str, goal: str = ""
    ) -> None:
        """One row of `served`."""

        def served(server: EmbeddedServer) -> float:
            with _on(load_cores):
                return self.served_throughput(server, name, users=32)

        with _on(server_cores):
            raw = self.raw_throughput(name)
            with self.server(self.repository(name)) as server:
                ratios = []
                for pair in range(self.pairs):
                    sides: list[Callable[[], float]] = [raw, functools.partial(served, server)]
                    first = pair % 2  # who goes first changes from pair to pair
                    values = {first: sides[first](), 1 - first: sides[1 - first]()}
                    ratios.append(values[1] / values[0])
        self.record(f"served over raw ONNX Runtime, {name}, {how}", ratios, goal)

    def int8(self) -> None:
        """int8 over fp32 in raw ONNX Runtime, by batch, with what the metric loses; and the graphs' sizes."""
        for name in ("recommender", "minilm", "encoder"):
            lost = _lost(name, "int8")
            sessions = {
                precision: self.raw_sessions(onnx_path(name, precision), 1)[0] for precision in ("fp32", "int8")
            }
            batch_axis = self.specs[name].axes["batch"]
            for batch in sorted({1, batch_axis.opt, batch_axis.max}):
                _, inputs = max(batches(self.rows[name], batch), key=lambda found: len(found[0]))
                self.record(f"int8 over fp32, {name}, batch {batch}", self.speedups(sessions, inputs), lost)
            sizes = {key: read_manifest(onnx_path(name, key)).size_bytes for key in sessions}
            self.record(f"size of int8 over fp32, {name}", [sizes["int8"] / sizes["fp32"]] * 2)

    def speedups(self, sessions: dict[str, onnxruntime.InferenceSession], inputs: Row) -> list[float]:
        """How many times faster the second session is, in pairs."""
        ratios = []
        for _ in range(4 * self.pairs):
            first, second = (_seconds_of_runs(session, inputs) for session in sessions.values())
            ratios.append(first / second)
        return ratios

    def pruned(self) -> None:
        """The recommender without a quarter of its heads and channels over the whole one, raw fp32."""
        whole = self.raw_sessions(onnx_path("recommender", "fp32"), 1)[0]
        build = str(self.folder / "pruned")
        subprocess.run(["cp", "-r", build_dir("recommender").parent, build], check=True)
        for stage, *flags in (("export.prune", "--ratio", "0.25"), ("export.to_onnx",)):
            with log.status(f"{stage} of the recommender"):
                run = run_module(stage, *flags, BUILD=build, PYTHONWARNINGS="ignore")
            if run.returncode:
                raise InputError(run.stderr)
        report = json.loads((Path(build) / "recommender" / "pruning.json").read_text())
        pruned = self.raw_sessions(Path(build) / "recommender" / "fp32" / "model.onnx", 1)[0]
        _, inputs = next(batches(self.rows["recommender"], self.specs["recommender"].axes["batch"].opt))
        ratios = self.speedups({"whole": whole, "pruned": pruned}, inputs)
        self.record("pruned over unpruned, recommender, batch 16", ratios, f"drop {report['drop']:+.2%}")

    def cached(self) -> None:
        """Time of `make engine` whose artifacts are in the cache over one that makes them."""
        ratios = []
        for pair in range(max(3, self.pairs // 4)):
            seconds = []
            for turn in ("cold", "cached"):
                made = self.folder / f"engine-{pair}-{turn}"
                settings = [f"BUILD={made / 'build'}", f"REPOSITORY={made / 'repository'}"]
                settings += ["MODELS=tests/models", "MODEL=text", f"CACHE={self.folder / f'cache-{pair}'}"]
                command = ["make", "engine", *settings]
                seconds.append(_seconds(functools.partial(subprocess.run, command, check=True, capture_output=True)))
            ratios.append(seconds[1] / seconds[0])
        self.record("cached make engine over a cold one, tests/models/text", ratios)

    def batching(self) -> None:
        """Dynamic batching on over off, 32 requests in flight."""
        for name in ("encoder", "recommender"):
            off = self.folder / f"unbatched-{name}"
            if not off.exists():
                subprocess.run(["cp", "-r", self.repository(name), off], check=True)
                config = off / name / "config.pbtxt"
                config.write_text(_without_block(config.read_text(), "dynamic_batching"))
            ratios = []
            with self.server(self.repository(name)) as on_server, self.server(off) as off_server:
                for _ in range(self.pairs):
                    on = self.served_throughput(on_server, name, users=32)
                    ratios.append(on / self.served_throughput(off_server, name, users=32))
            self.record(f"dynamic batching on over off, {name}", ratios)

    def client(self) -> None:
        """p50 of our client over that of bare tritonclient, one call after the other."""
        row = self.rows["recommender"][0]
        with self.server(self.repository("recommender")) as server:
            for protocol, bare in (("grpc", _bare_grpc(server, row)), ("http", _bare_http(server, row))):
                url = server.grpc_url if protocol == "grpc" else server.http_url
                with InferenceClient(url, protocol) as ours:  # type: ignore[arg-type]
                    ratios = []
                    for _ in range(max(10, self.pairs)):
                        own = _p50(lambda: ours.infer("recommender", row))
                        ratios.append(own / _p50(bare))
                self.record(f"client p50 over bare tritonclient, {protocol}", ratios, "goal: at most 1.1")

    def peer(self) -> None:
        """Our load test beside perf_analyzer: throughput and p50 on the same server under the same load."""
        with self.server(self.repository("encoder")) as server:
            for protocol in ("grpc", "http"):
                ours, theirs = [], []
                for _ in range(max(3, self.pairs // 2)):
                    ours.append(self.loadtest(server, "encoder", protocol, "--users", "4"))
                    theirs.append(self.peer_figures(server, "encoder", protocol, 4))
                for key, title in (("throughput", "throughput"), ("p50_us", "p50")):
                    ratios = [own[key] / other[key] for own, other in zip(ours, theirs, strict=True)]
                    self.record(f"load test over perf_analyzer, {title}, {protocol}", ratios, "goal: 0.9 to 1.1")

    def repository(self, name: str) -> Path:
        """The model repository of one model."""
        return self.folder / f"repository-{name}"

    def server(self, repository: Path) -> EmbeddedServer:
        """A server on free ports."""
        ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        return EmbeddedServer(repository, log_path=self.folder / f"{repository.name}.log", **ports)


@contextlib.contextmanager
def _on(cores: list[int]) -> Iterator[None]:
    """Runs this thread, and what it starts, on some cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _rows_per_s_of(sessions: list[onnxruntime.InferenceSession], inputs: Row) -> Callable[[], float]:
    """Measures sessions that run side by side for a while."""
    size = len(next(iter(inputs.values())))

    def run(session: onnxruntime.InferenceSession) -> float:
        session.run(None, inputs)
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SIDE_S:
            session.run(None, inputs)
            done += size
        return done / elapsed  # to the end of the last batch: SIDE_S would count it whole

    def measure() -> float:
        with ThreadPoolExecutor(len(sessions)) as pool:
            return sum(pool.map(run, sessions))

    return measure


def _lost(name: str, precision: str) -> str:
    """What the task metric loses, as `export.compare` measured it."""
    path = choice_path(name, "onnxruntime")
    if not path.is_file():
        return ""
    choice = json.loads(path.read_text())
    return f"{choice['metric']} {choice['variants'][precision]['drop']:+.2%} lost"


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_of_runs(session: onnxruntime.InferenceSession, inputs: Row) -> float:
    """Of enough runs for a small model to be timed."""
    return _seconds(lambda: [session.run(None, inputs) for _ in range(10)])


def _p50(call: Callable[[], object]) -> float:
    return statistics.median(_seconds(call) for _ in range(200))


def _bare_grpc(server: EmbeddedServer, row: Row) -> Callable[[], object]:
    client = triton_grpc.InferenceServerClient(server.grpc_url)

    def call() -> object:
        tensor = triton_grpc.InferInput("item_ids", row["item_ids"].shape, "INT64")
        tensor.set_data_from_numpy(row["item_ids"])
        result = client.infer("recommender", [tensor])
        return result.as_numpy("items"), result.as_numpy("scores")

    return call


def _bare_http(server: EmbeddedServer, row: Row) -> Callable[[], object]:
    client = triton_http.InferenceServerClient(server.http_url)

    def call() -> object:
        tensor = triton_http.InferInput("item_ids", row["item_ids"].shape, "INT64")
        tensor.set_data_from_numpy(row["item_ids"])
        result = client.infer("recommender", [tensor])
        return result.as_numpy("items"), result.as_numpy("scores")

    return call


def _without_block(text: str, name: str) -> str:
    """A protobuf text without one top-level block."""
    lines, kept, inside = text.splitlines(), [], False
    for line in lines:
        inside = inside or line.startswith(f"{name} {{")
        if not inside:
            kept.append(line)
        if line == "}":
            inside = False
    return "\n".join(kept) + "\n"


def prepare(folder: Path) -> None:
    """Builds the encoder and publishes both models in fp32, each in a repository of its own."""
    for name in BUILT:
        if not choice_path(name, "onnxruntime").is_file():
            raise InputError(
                f"{choice_path(name, 'onnxruntime')}: no such file; the benchmarks need it: make engine MODEL={name}"
            )
    (folder / "models" / "encoder").mkdir(parents=True)
    (folder / "models" / "encoder" / "deploy.toml").write_text(ENCODER_TOML)
    (folder / "models" / "encoder" / "model.py").write_text(ENCODER_MODEL)
    (folder / "build").mkdir()
    for name in BUILT:
        (folder / "models" / name).symlink_to(Path("models", name).resolve())
        subprocess.run(["cp", "-r", build_dir(name), folder / "build"], check=True)
    models = ("--models", str(folder / "models"))
    int8 = ("--precision", "int8", "--high-precision", "fp32")
    steps = [("export.to_onnx", "--model", "encoder"), ("export.quantize", "--model", "encoder", *int8)]
    for name in ("encoder", "recommender"):
        repository = ("--repository", str(folder / f"repository-{name}"))
        steps.append(("export.to_triton", "--model", name, "--precision", "fp32", *repository))
    for stage, *flags in steps:
        with log.status(" ".join((stage, *flags))):
            run = run_module(stage, *flags, *models, BUILD=str(folder / "build"), PYTHONWARNINGS="ignore")
        if run.returncode:
            raise InputError(run.stderr)


def main() -> None:
    """Runs the benchmarks and prints the table."""
    parser = Parser(__doc__, prog="python -m tests.bench")
    names = ("served", "int8", "pruned", "cached", "batching", "client", "peer")
    parser.add_argument("--only", choices=names, action="append", help="only this one (may be repeated)")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of a ratio (default: %(default)s)")
    args = parser.parse_args()
    result_path = build_dir("bench.json")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        bench = Bench(Path(folder), args.pairs)
        for name in args.only or names:
            getattr(bench, name)()
    result_path.write_text(json.dumps(bench.results, indent=2) + "\n")
    table = Table("ratio of", box=box.SIMPLE_HEAD)
    for column in ("median", "quartiles", "pairs", ""):
        table.add_column(column, justify="right" if column else "left")
    for result in bench.results:
        low, high = result["quartiles"]
        table.add_row(
            result["name"], f"{result['ratio']:.2f}", f"{low:.2f} to {high:.2f}", str(result["pairs"]), result["goal"]
        )
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    run_command(main)
