"""What the tests share: a real Triton over tiny models, and two models taken through the export stages.

`make test` runs them in two processes (pytest-xdist). A file's tests stay in one process, so that what a file sets up
is set up once; what a session sets up in folders is made by one process for all (`once`). A test marked `alone` measures
this machine: no other runs meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec.folders import alone_in
from serving import launcher
from serving.embedded import EmbeddedServer
from serving.stack import limits, served_models
from tests.failing_servers import MakeRelays, Relay
from tests.gateway import Gateway, skip_without_nginx
from tests.manifests import VARIANTS
from tests.warm import LIBRARIES_OF, run_warm

os.environ["CACHE"] = "off"  # each test builds what it shows; those of the cache have one of their own
launcher.EXIT_TIMEOUT_S = 1  # Triton waits so long for idle connections, and here nothing is in flight then


def is_alone(item: pytest.Item) -> bool:
    """Whether it measures this machine."""
    return item.get_closest_marker("alone") is not None


def pytest_configure() -> None:
    """Ctrl-C reaches the commands that tests start, also where the tests were started in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes none is to be left with a long file at the end, or to wait for what runs alone before it."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        measuring = {item.path for item in items if is_alone(item)}
        items.sort(key=lambda item: (item.path in measuring, -slow[item.path], is_alone(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test that is to run alone waits, before its fixtures, for those of the other processes, and they for it."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    of_the_run = Path(item.config.getoption("basetemp")).parent  # this process has a folder of its own in it
    with (of_the_run / "alone.lock").open("w") as lock:
        with (of_the_run / "turn.lock").open("w") as turn:  # else others might never leave it a moment
            fcntl.flock(turn, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        return (yield)


# Tensors cross by DLPack: see serving/onnxruntime_backend.py.
ADD_ONE = '''
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """y = x + 1, after parameters["delay_s"] seconds a batch."""

    def initialize(self, args):
        import json
        parameters = json.loads(args["model_config"])["parameters"]
        self.delay_s = float(parameters.get("delay_s", {}).get("string_value", 0))

    def execute(self, requests):
        import time
        time.sleep(self.delay_s)
        inputs = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "x")) for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("y", x + 1)]) for x in inputs]
'''
ADD_ONE_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 8
input {{ name: "x" data_type: TYPE_FP32 dims: [2, -1] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [2, -1] }}
instance_group {{ kind: KIND_CPU count: {instances} }}
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {queue} timeout_action: REJECT default_timeout_microseconds: 5000000 allow_timeout_override: true
  }}
}}
parameters {{ key: "delay_s" value {{ string_value: "{delay_s}" }} }}
"""


def write_add_one(
    repository: Path, name: str = "add_one", *, delay_s: float = 0.0, queue: int = 64, instances: int = 2
) -> None:
    """A model y = x + 1 over (batch, 2, any) floats."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(ADD_ONE)
    settings = {"name": name, "delay_s": delay_s, "queue": queue, "instances": instances}
    (repository / name / "config.pbtxt").write_text(ADD_ONE_CONFIG.format(**settings))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A Triton that serves `add_one`, and `slow` (0.2 s a batch, one instance, a queue of 2)."""
    folder = tmp_path_factory.mktemp("server")
    write_add_one(folder / "repository")
    write_add_one(folder / "repository", "slow", delay_s=0.2, queue=2, instances=1)
    with EmbeddedServer(
        folder / "repository", http_port=0, grpc_port=0, metrics_port=0, log_path=folder / "triton.log"
    ) as running:
        yield running


@pytest.fixture
def relays(server: EmbeddedServer) -> Iterator[MakeRelays]:
    """Makes relays to that server: replicas of one service, each of which can be cut, closed or slowed down."""
    made: list[Relay] = []

    def make(protocol: str, count: int) -> list[Relay]:
        port = server.http_port if protocol == "http" else server.grpc_port
        made.extend(Relay((server.address, port)) for _ in range(count))
        return made

    yield make
    for relay in made:
        relay.close()


@pytest.fixture(scope="session")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A Triton with the flags of the stack, whose admin key is `sesame`; `stuck` takes 3 s a batch."""
    skip_without_nginx()
    folder = tmp_path_factory.mktemp("closed")
    write_add_one(folder / "repository")
    write_add_one(folder / "repository", "stuck", delay_s=3)
    ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_ADMIN_KEY", "sesame")
        server = EmbeddedServer(
            folder / "repository", **ports, log_path=folder / "triton.log", behind_gateway=True, exit_timeout_s=1
        )
    with server as running:
        yield running


@pytest.fixture(scope="session")
def gateway(closed: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway before it; an answer may take 1 s."""
    folder = tmp_path_factory.mktemp("gateway")
    models = [replace(model, queue_timeout_ms=500, p99_ms=50) for model in served_models(closed.repository, folder)]
    running = Gateway(folder, limits(models), closed.http_url, closed.grpc_url)
    yield running
    assert running.stop() == 0


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m …` as a user types it; what would load heavy libraries finds them loaded."""
    everything = {**os.environ, **environment}
    if arguments[0].partition(".")[0] in LIBRARIES_OF:
        return run_warm(arguments, everything)
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=everything)


STAGES = (
    ("export.to_onnx",),
    ("export.quantize", "--precision", "fp16"),
    ("export.quantize", "--precision", "int8", "--high-precision", "fp32"),
    ("export.compare",),
    ("export.to_triton",),
)


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(folder: Path, make: Callable[[], None]) -> Path:
    """The folder, filled by whichever process asks for it first; the others wait."""
    made = folder.with_suffix(".made")
    with alone_in(folder):
        if not made.exists():
            make()
            made.touch()
    return folder


def run_stage(model: str, stage: str, *flags: str, build: Path) -> None:
    """A stage of the export, for one of the models of the tests."""
    run = run_module(stage, "--models", "tests/models", "--model", model, *flags, BUILD=str(build))
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="session")
def built(of_the_run: Path) -> Path:
    """A folder with `build/` and `repository/` of the models `image` and `text`; not to be changed."""
    folder = of_the_run / "built"

    def make() -> None:
        for model in ("image", "text"):
            for stage, *flags in STAGES:
                where = ("--repository", str(folder / "repository")) if stage == "export.to_triton" else ()
                run_stage(model, stage, *flags, *where, build=folder / "build")

    return once(folder, make)


@pytest.fixture(scope="session")
def typed(built: Path, of_the_run: Path) -> Path:
    """The same `build/` with int8 graphs as TensorRT takes them; not to be changed."""
    folder = of_the_run / "typed"

    def make() -> None:
        shutil.copytree(built / "build", folder / "build", dirs_exist_ok=True)
        for model in ("image", "text"):
            run_stage(
                model, "export.quantize", "--precision", "int8", "--high-precision", "fp16", build=folder / "build"
            )

    return once(folder, make) / "build"


@pytest.fixture(scope="session")
def generated(of_the_run: Path) -> dict[str, Path]:
    """Overlays over a repository with one model, by what was asked for; not to be changed."""
    folder = of_the_run / "overlays"

    def make() -> None:
        write_add_one(folder / "repository", instances=3)
        places = ("--repository", str(folder / "repository"), "--models", str(folder), "--build", str(folder))
        for name, more in VARIANTS.items():
            run = run_module("serving.kubernetes", *places, "--output", str(folder / name), *more)
            assert run.returncode == 0, run.stderr

    once(folder, make)
    return {name: folder / name for name in VARIANTS}


@pytest.fixture
def build(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared `build/` folder as $BUILD."""
    monkeypatch.setenv("BUILD", str(built / "build"))
    return built / "build"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting for a second thread than it does for them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
