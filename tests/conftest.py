"""Shared fixtures: a real Triton with tiny models, and two models taken through the export stages.

`make test` runs the tests in three processes (pytest-xdist). A file's tests stay in one process, so its fixtures are set
up once. One process makes the folders of session fixtures for all (`once`). A test marked `alone` measures this
machine: no other test runs at the same time.
"""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from deepseek_client import InferenceClient

from cli.commands import BY_NAME
from cli.develop import FAST
from cli.main import main as command_line
from cli.main import values_of
from deepseek.spec.files.folders import alone_in
from serving.embedded import launcher
from serving.embedded.launcher import EmbeddedServer
from serving.kubernetes import overlay
from serving.repository.served_models import served_models
from serving.stack.gateway_limits import limits
from tests.add_one import write_add_one, write_for_gpu
from tests.failing_servers import MakeRelays, Relay, url_of
from tests.gateway import Gateway, skip_without_nginx
from tests.manifests import VARIANTS
from tests.warm import LIBRARIES_OF, run_warm

os.environ["DEEPSEEK_CACHE"] = "off"  # each test builds what it needs; tests of the cache use their own
# Tests are for a machine without a GPU, and bring stand-ins where they need one. So they do not see this machine's.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if shutil.which("nvidia-smi"):
    os.environ["PATH"] = f"{Path(__file__).parent / 'no_gpu'}{os.pathsep}{os.environ['PATH']}"
launcher.EXIT_TIMEOUT_S = 1  # how long Triton waits for idle connections; in tests nothing is in flight by then

FREE: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}  # ports of an EmbeddedServer

# A test that takes one of these fixtures, or whose file has one of these names, starts a server or builds a model.
# Other files say so with the mark `server`.
STARTING_FIXTURES = {"server", "relays", "closed", "gateway", "built", "typed", "generated", "pruned"}
STARTING_FIXTURES |= {"built_sentence", "built_shop", "built_reranker"}
STARTING_NAMES = {"EmbeddedServer", "FakeEndpoint", "Gateway", "Serving", "answering", "run_module", "train_model"}
# A line of a file whose tests all do, so that `make check` need not import it: the libraries of all files take seconds.
STARTING_LINE = re.compile(
    rf"(?m)^(from \S+ import .*\b({'|'.join(sorted(STARTING_NAMES))})\b(?! as)|pytestmark = .*\bmark\.(server|slow)\b)"
)


def is_alone(item: pytest.Item) -> bool:
    """Whether the test measures this machine."""
    return item.get_closest_marker("alone") is not None


def pytest_configure() -> None:
    """Lets Ctrl-C reach the commands that tests start, even if the tests run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether no test of the file can be selected; None lets pytest decide."""
    if config.option.markexpr != FAST or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return None
    return (collection_path.suffix == ".py" and bool(STARTING_LINE.search(collection_path.read_text()))) or None


def starts_something(item: pytest.Item) -> bool:
    """Whether `make check` leaves the test out."""
    names = vars(getattr(item, "module", item))
    fixtures = set(getattr(item, "fixturenames", ()))
    return bool(STARTING_FIXTURES & fixtures or STARTING_NAMES & names.keys())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks tests as `server`; sorts long files first and tests that run alone last."""
    for item in items:
        if starts_something(item):
            item.add_marker("server")
    if hasattr(config, "workerinput"):
        minutes = Counter[Path]()  # about as long as the slow tests of a file take
        for item in items:
            if marker := item.get_closest_marker("slow"):
                minutes[item.path] += marker.kwargs.get("minutes", 0.2)
        measuring = {item.path for item in items if is_alone(item)}
        items.sort(key=lambda item: (item.path in measuring, -minutes[item.path], is_alone(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Keeps tests of the other processes from running while a test marked `alone` runs, fixtures included."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    of_the_run = Path(item.config.getoption("basetemp")).parent  # the parent of this process's own folder
    with (of_the_run / "alone.lock").open("w") as lock:
        with (of_the_run / "turn.lock").open("w") as turn:  # otherwise shared holders might never let it in
            fcntl.flock(turn, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is a coroutine function in a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


# Tensors are passed by DLPack, for the reason in serving/backend/onnxruntime_backend.py.
@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A Triton that serves `add_one`, and `slow` (0.2 s per batch, one instance, a queue of 2)."""
    folder = tmp_path_factory.mktemp("server")
    write_add_one(folder / "repository")
    write_add_one(folder / "repository", "slow", delay_s=0.2, queue=2, instances=1)
    with EmbeddedServer(folder / "repository", **FREE, log_path=folder / "triton.log") as running:
        yield running


@pytest.fixture
def relays(server: EmbeddedServer) -> Iterator[MakeRelays]:
    """Makes relays to that server: replicas of one service that can be cut, closed or slowed down."""
    made: list[Relay] = []

    def make(protocol: str, count: int) -> list[Relay]:
        made.extend(Relay.to(server, protocol) for _ in range(count))
        return made

    yield make
    for relay in made:
        relay.close()


@pytest.fixture
def relay(relays: MakeRelays, protocol: str) -> Relay:
    """One of them, for the test's `protocol`."""
    return relays(protocol, 1)[0]


@pytest.fixture(scope="session")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A Triton with the flags of the stack and the admin key `sesame`; its model `stuck` takes 3 s per batch."""
    skip_without_nginx()
    folder = tmp_path_factory.mktemp("closed")
    write_add_one(folder / "repository")
    write_add_one(folder / "repository", "stuck", delay_s=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_ADMIN_KEY", "sesame")
        server = EmbeddedServer(
            folder / "repository", **FREE, log_path=folder / "triton.log", behind_gateway=True, exit_timeout_s=1
        )
    with server as running:
        yield running


@pytest.fixture(scope="session")
def gateway(closed: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway in front of `closed`, with a time-out of 1 s."""
    folder = tmp_path_factory.mktemp("gateway")
    models = [replace(model, queue_timeout_ms=500, p99_ms=50) for model in served_models(closed.repository, folder)]
    running = Gateway(folder, limits(models), closed.http_url, closed.grpc_url)
    yield running
    assert running.stop() == 0


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ...` as a user does; commands with heavy imports start from a warm process."""
    everything = {**os.environ, **environment}
    command = BY_NAME.get(arguments[1]) if arguments[0] == "cli" else None
    if (command.module if command else arguments[0]).partition(".")[0] in LIBRARIES_OF:
        return run_warm(arguments, everything)
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=everything)


RunHere = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_here(capfd: pytest.CaptureFixture[str]) -> RunHere:
    """Runs a command of `deepseek` in this process, without the seconds of imports that `run_module` costs."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        with patch.dict(os.environ, environment):
            code = command_line(words)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


Refused = Callable[..., str]


@pytest.fixture
def refused(run_here: RunHere) -> Refused:
    """Runs a command of `deepseek` that must end with exit code 2 and one line on stderr; returns that line."""

    def run(*words: str, **environment: str) -> str:
        done = run_here(*words, **environment)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return str(done.stderr)

    return run


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets stages run in this process what they run in a child process, where a crash would end only the child."""
    for user in ("export.runtimes.isolation", "export.stages.select_precision"):
        monkeypatch.setattr(f"{user}.in_child", lambda what, function: function())


STAGES = (
    ("to-onnx",),
    ("quantize", "--precision", "fp16"),
    ("quantize", "--precision", "int8"),
    ("select-precision",),
    ("publish",),
)


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of the test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(folder: Path, make: Callable[[], None]) -> Path:
    """The folder, filled by the process that asks first; the others wait."""
    made = folder.with_suffix(".made")
    with alone_in(folder):
        if not made.exists():
            make()
            made.touch()
    return folder


def run_stage(model: str, stage: str, *flags: str, build: Path) -> None:
    """Runs an export stage for one of the test models."""
    run = run_module("cli", stage, "--models", "tests/models", "--model", model, *flags, DEEPSEEK_BUILD=str(build))
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="session")
def built(of_the_run: Path) -> Path:
    """A folder with `build/` and `repository/` of the models `image` and `text`; read-only."""
    folder = of_the_run / "built"

    def build(model: str) -> None:
        for stage, *flags in STAGES:
            where = ("--repository", str(folder / "repository")) if stage == "publish" else ()
            run_stage(model, stage, *flags, *where, build=folder / "build")

    return once(folder, lambda: at_once(build, "image", "text"))


def at_once(make: Callable[[str], None], *models: str) -> None:
    """Makes something of each model at the same time: the other processes of the test run wait for it."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(make, models))


@pytest.fixture(scope="session")
def typed(built: Path, of_the_run: Path) -> Path:
    """The same `build/` with int8 graphs for TensorRT; read-only."""
    folder = of_the_run / "typed"

    def make() -> None:
        shutil.copytree(built / "build", folder / "build", dirs_exist_ok=True)
        at_once(
            lambda model: run_stage(model, *STAGES[2], "--target", "tensorrt", build=folder / "build"), "image", "text"
        )

    return once(folder, make) / "build"


def built_alone(of_the_run: Path, model: str) -> Path:
    """The folder of one more test model in fp32."""
    folder = of_the_run / model

    def make() -> None:
        run_stage(model, "to-onnx", build=folder / "build")
        flags = ("--precision", "fp32", "--repository", str(folder / "repository"))
        run_stage(model, "publish", *flags, build=folder / "build")

    return once(folder, make)


@pytest.fixture(scope="session")
def built_sentence(of_the_run: Path) -> Path:
    """A folder with `build/` and `repository/` of the model `sentence`, which takes texts; read-only."""
    return built_alone(of_the_run, "sentence")


@pytest.fixture(scope="session")
def built_shop(of_the_run: Path) -> Path:
    """The same of the model `shop`, which takes names of items."""
    return built_alone(of_the_run, "shop")


@pytest.fixture(scope="session")
def built_reranker(of_the_run: Path) -> Path:
    """The same of `reranker`, a tiny cross-encoder that takes pairs; also the checkpoint and `models/`."""
    from tests.tiny_checkpoints import write_checkpoint

    folder = of_the_run / "pairs"

    def make() -> None:
        write_checkpoint(folder / "reranker", "bert", "cross-encoder")
        which = ("--model", "reranker", "--models", str(folder / "models"))
        publish = ("publish", *which, "--precision", "fp32", "--repository", str(folder / "repository"))
        for command in (("import", str(folder / "reranker"), *which[2:]), ("to-onnx", *which), publish):
            run = run_module("cli", *command, DEEPSEEK_BUILD=str(folder / "build"))
            assert run.returncode == 0, run.stderr

    return once(folder, make)


def serves(built: str) -> Any:
    """The fixture `server` of a file: a Triton that serves the repository of the fixture `built`."""

    @pytest.fixture(scope="module")
    def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
        log = tmp_path_factory.mktemp("log") / "triton.log"
        with EmbeddedServer(request.getfixturevalue(built) / "repository", **FREE, log_path=log) as running:
            yield running

    return server


@pytest.fixture(params=["http", "grpc"])
def client(server: EmbeddedServer, request: pytest.FixtureRequest) -> Iterator[InferenceClient]:
    """A client of the module's server over each protocol."""
    with InferenceClient(url_of(server, request.param), request.param, timeout_s=60) as made:
        yield made


@pytest.fixture(scope="session")
def generated(of_the_run: Path) -> dict[str, Path]:
    """Kubernetes overlays for a repository with one model, by the options given; read-only."""
    folder = of_the_run / "overlays"

    def make() -> None:
        write_add_one(folder / "repository", instances=3)
        write_for_gpu(folder / "gpu-repository")
        for name, more in VARIANTS.items():
            repository = folder / ("gpu-repository" if name == "gpu" else "repository")
            places = ("--repository", str(repository), "--models", str(folder), "--build", str(folder))
            overlay.main(values_of("kubernetes", *places, "--output", str(folder / name), *more))

    once(folder, make)
    return {name: folder / name for name in VARIANTS}


@pytest.fixture
def build(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared `build/` folder as $DEEPSEEK_BUILD."""
    monkeypatch.setenv("DEEPSEEK_BUILD", str(built / "build"))
    return built / "build"


@pytest.fixture
def own_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `build/` folder of the test's own, which need not exist yet, as $DEEPSEEK_BUILD."""
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "build"))
    return tmp_path / "build"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Uses one thread: tiny models lose more time waiting for a second thread than it saves."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
