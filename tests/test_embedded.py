"""The embedded Triton: it starts in seconds, fails in one line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from tritonclient import grpc as triton

from deepseek.spec import DeploymentSpec, FileDigest, GateFailed, InputError
from deepseek.spec.files import version_files
from deepseek.spec.files.repository import versions_of
from export.stages.publish import publish_version
from serving.embedded import verified_repository
from serving.embedded.launcher import EmbeddedServer
from serving.embedded.model_control import is_ready
from serving.embedded.ports import ReservedPorts
from serving.embedded.serve import _started
from tests.add_one import replace_in, write_add_one
from tests.conftest import FREE, Refused
from tests.gateway import free_port
from tests.waiting import wait_for


def start(repository: Path, *command: str) -> subprocess.Popen[str]:
    """Starts the launcher in its own process, as a user does."""
    fixed = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--exit-timeout-s", "1"]
    arguments = [sys.executable, "-m", "cli", "serve", "--repository", str(repository), *fixed, *command]
    environment = {**os.environ, "DEEPSEEK_BUILD": str(repository.parent / "build")}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@dataclass
class Serving:
    """A running `deepseek serve`, and the places that it printed."""

    process: subprocess.Popen[str]
    places: dict[str, str]

    @classmethod
    def of(cls, process: subprocess.Popen[str]) -> Serving:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        places: dict[str, str] = {}
        for line in lines:
            if line.startswith("Ctrl-C"):
                return cls(process, places)
            name, _, rest = line.strip().partition(" ")
            places[name] = rest.strip()
        raise AssertionError(process.stderr.read() if process.stderr else "")

    @property
    def routes(self) -> psutil.Process:
        """The process of the OpenAI routes."""
        below = psutil.Process(self.process.pid).children()
        return next(each for each in below if "serving.openai" in each.cmdline())


# A process that only SIGKILL ends, as a stub that waits forever for a message from a dead server.
STUBBORN = """import subprocess
subprocess.Popen(["sh", "-c", "trap '' HUP INT TERM; sleep 3600; sleep 3600"])
"""


@pytest.mark.parametrize(
    ("how", "times", "statuses"),
    [
        (signal.SIGINT, 2, {0, 130}),  # 0: it had stopped before the second came
        (signal.SIGTERM, 2, {0}),
        (signal.SIGKILL, 1, {-signal.SIGKILL}),
    ],
    ids=["SIGINT twice", "SIGTERM twice", "SIGKILL"],
)
def test_nothing_is_left_however_it_ends(tmp_path: Path, how: signal.Signals, times: int, statuses: set[int]) -> None:
    write_add_one(tmp_path / "repository")
    code = tmp_path / "repository" / "add_one" / "1" / "model.py"
    code.write_text(f"{STUBBORN}{code.read_text()}")
    process = start(tmp_path / "repository")
    Serving.of(process)
    below = psutil.Process(process.pid).children(recursive=True)
    assert {"tritonserver", "sleep"} <= {each.name() for each in below}
    stub = next(each for each in below if "stub" in " ".join(each.cmdline()))
    scratch = Path(stub.exe()).parents[2]
    assert list(Path("/dev/shm").glob(f"{scratch.name}*"))
    for _ in range(times):
        process.send_signal(how)
        time.sleep(0.2)
    _, errors = process.communicate()
    assert "Traceback" not in errors
    assert process.returncode in statuses
    _, alive = psutil.wait_procs(below, timeout=60)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    assert not scratch.exists()
    assert not list(Path("/dev/shm").glob(f"{scratch.name}*"))


def test_a_command_runs_while_it_serves_and_its_status_is_passed_on(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    (tmp_path / "repository" / "lost+found").mkdir()
    process = start(tmp_path / "repository", "--", "sh", "-c", "echo inside; exit 7")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (7, "")
    assert "inside" in output
    assert "warning   add_one: not checked: it has no manifest.json" in output
    assert "warning   lost+found: ignored: it has no config.pbtxt" in output


def test_a_command_that_cannot_be_run_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo no first line that names a shell\n")
    script.chmod(0o755)
    with pytest.raises(InputError, match=f"^{script}: cannot be run while serving: Exec format error$"):
        _started([str(script)], {})


def test_a_reserved_port_is_not_given_out_until_it_is_released() -> None:
    ports = ReservedPorts("127.0.0.1", {"HTTP": 0, "gRPC": 0})
    assert len(set(ports.numbers.values())) == 2
    for port in ports.numbers.values():
        with socket.socket() as another, pytest.raises(OSError, match="in use"):
            another.bind(("127.0.0.1", port))
    with pytest.raises(InputError, match=rf"HTTP port localhost:{ports.numbers['gRPC']} cannot be used"):
        ReservedPorts("localhost", {"HTTP": ports.numbers["gRPC"]})  # another start, while neither listens
    ports.release()
    with socket.socket() as another:
        another.bind(("127.0.0.1", ports.numbers["HTTP"]))
    named = ReservedPorts("localhost", {"HTTP": 0})
    named.release()
    assert named.address == "127.0.0.1"  # Triton takes no names


def test_a_port_or_address_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            InputError,
            match=rf"HTTP port 127.0.0.1:{port} cannot be used .* --http-port {port + 1000 if port < 60000 else 9000} \(HTTP_PORT=\)",
        ):
            EmbeddedServer(tmp_path / "repository", http_port=port, grpc_port=0, metrics_port=0)
    port = free_port()
    with pytest.raises(
        InputError, match=rf"^gRPC port 127.0.0.1:{port} cannot be used .*given twice.* --grpc-port .*GRPC_PORT="
    ):
        EmbeddedServer(tmp_path / "repository", http_port=port, grpc_port=port, metrics_port=0)
    for address in ("192.0.2.1", "::1"):  # RFC 5737, and IPv6
        with pytest.raises(InputError, match=rf"^--address {address}: this machine has no such IPv4 address"):
            EmbeddedServer(tmp_path / "repository", address=address, **FREE)


@pytest.mark.parametrize(
    ("name", "flag", "says"),
    [
        ("my tmp", 0, "my tmp has characters that a shell splits or replaces, but Triton starts programs there"),
        ("été", os.ST_NOEXEC, "été is mounted noexec, but Triton starts programs there; set TMPDIR= to another folder"),
    ],
)
def test_a_tmpdir_that_starts_no_program_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, flag: int, says: str
) -> None:
    write_add_one(tmp_path / "repository")
    (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_flag=flag))
    with pytest.raises(InputError, match=says), EmbeddedServer(tmp_path / "repository", **FREE):
        pass
    assert list((tmp_path / name).iterdir()) == []


def test_a_path_without_bash_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_add_one(tmp_path / "repository")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"^PATH: seen '/nowhere'"), EmbeddedServer(tmp_path / "repository", **FREE):
        pass


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--poll-s", "0"), "--poll-s: seen '0'; a whole number, 1 or more, is needed"),
        (("--", "nosuchcommand", "x"), "nosuchcommand: no such command to run while serving"),
    ],
)
def test_a_wrong_flag_is_one_line_before_anything_starts(flags: tuple[str, ...], says: str, refused: Refused) -> None:
    assert refused("serve", *flags).startswith(f"error: {says}")


@pytest.mark.parametrize(
    ("file", "content", "timeout_s", "reason"),
    [
        ("config.pbtxt", 'name: "add_one" nosuchfield: 3 backend: "python"', 60, "nosuchfield"),
        ("config.pbtxt", 'backend: "tensorrt"\n', 60, "has no tensorrt backend: .* docker compose up serves it"),
        ("config.pbtxt", None, 60, "no model in it .* make engine"),
        ("1/model.py", "raise RuntimeError('weights are missing')", 60, "'add_one'.* weights are missing"),
        ("1/model.py", "import time\ntime.sleep(60)", 2, "not ready within 2 s"),
        ("1/model.py", "import os\nos.kill(os.getpid(), 9)", 60, "'add_one'.*not healthy; its process crashed or was"),
    ],
    ids=["unparsable", "another backend", "no model", "does not load", "never ready", "killed"],
)
def test_a_repository_that_cannot_be_served_is_one_line(
    tmp_path: Path, file: str, content: str | None, timeout_s: float, reason: str
) -> None:
    write_add_one(tmp_path / "repository")
    path = tmp_path / "repository" / "add_one" / file
    path.write_text(content) if content else path.unlink()
    with (
        pytest.raises(GateFailed if "crashed" in reason else InputError, match=reason),
        EmbeddedServer(tmp_path / "repository", timeout_s=timeout_s, log_path=tmp_path / "log", **FREE),
    ):
        pass


class Said:
    """What the server wrote to standard error since the test began."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._text = capsys, ""

    def __call__(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(capsys)


TEXT = DeploymentSpec.load("tests/models/text")


def damage(path: Path) -> None:
    """Flips one bit in the middle, in a new file, since the old one may be in use."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def served(running: EmbeddedServer) -> str:
    """The version that answers a request."""
    inputs = [triton.InferInput(name, [1, 5], "INT64") for name in TEXT.inputs]
    for tensor in inputs:
        tensor.set_data_from_numpy(np.ones((1, 5), np.int64))
    with triton.InferenceServerClient(running.grpc_url) as client:
        return client.infer("text", inputs).get_response().model_version


def test_if_the_newest_version_is_damaged_the_older_one_is_served_under_its_own_configuration(
    build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "repository"
    for precision in ("fp32", "fp16"):
        publish_version(TEXT, precision, "onnxruntime", repository)
    damage(repository / "text" / "2" / "model.onnx")
    config = repository / "text" / "config.pbtxt"
    replace_in(config, "max_batch_size: 8", "max_batch_size: 64")  # as of a wider profile
    with EmbeddedServer(repository, log_path=tmp_path / "log", **FREE) as running:
        assert served(running) == "1"
        config = json.load(urllib.request.urlopen(f"http://{running.http_url}/v2/models/text/config"))
    batching = config["dynamic_batching"]
    assert (config["max_batch_size"], int(batching["max_queue_delay_microseconds"])) == (8, 0)
    assert int(batching["default_queue_policy"]["default_timeout_microseconds"]) == 1_000_000
    assert re.match(
        r"warning   text: max_queue_delay_us = 1000 is served as 0: with a delay, Triton before 26.08 .*\nrefused   text/2: model.onnx is damaged: .*; publish it again: .*\n +text: version 1 is served\n$",
        capsys.readouterr().err,
    )


def test_if_no_version_is_intact_the_server_does_not_start(build: Path, tmp_path: Path) -> None:
    publish_version(TEXT, "fp32", "onnxruntime", tmp_path / "repository")
    damage(tmp_path / "repository" / "text" / "1" / "model.onnx")
    with (
        pytest.raises(GateFailed, match=r"^text/1: model.onnx is damaged"),
        EmbeddedServer(tmp_path / "repository", log_path=tmp_path / "log", **FREE),
    ):
        pass


def break_model(graph: Path) -> None:
    """Lets the Python model of a version fail when Triton loads it; all digests are right."""
    model, manifest, config = (graph.with_name(name) for name in ("model.py", "manifest.json", "config.pbtxt"))
    model.write_text("raise RuntimeError('weights are missing')\n")
    content = json.loads(manifest.read_text())
    content["files"]["model.py"] = FileDigest.of(model).model_dump()
    manifest.write_text(json.dumps(content))
    config.write_text(config.read_text().replace("versions: 1", "versions: 5"))


@pytest.fixture(scope="module")
def polling(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server of the models `text` and `add_one` that follows its repository; its log was there before."""
    folder = tmp_path_factory.mktemp("polling")
    (folder / "log").touch(0o644)
    write_add_one(folder / "repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(built / "build"))
        publish_version(TEXT, "fp32", "onnxruntime", folder / "repository")
    with EmbeddedServer(folder / "repository", log_path=folder / "log", poll_s=0.2, **FREE) as running:
        yield running


def test_the_log_is_private_and_has_no_secret(polling: EmbeddedServer) -> None:
    assert polling._key in " ".join(psutil.Process(polling.pid).cmdline())
    assert stat.S_IMODE(polling.log_path.stat().st_mode) == 0o600
    assert polling._key not in polling.log_path.read_text()
    assert "triton-admin-key=<secret>" in polling.log_path.read_text()


def test_a_polling_server_refuses_a_wrong_version_and_takes_the_next_good_one(
    build: Path, tmp_path: Path, polling: EmbeddedServer, said: Said
) -> None:
    text = polling.repository / "text"
    for version, break_it, reason in (
        (2, damage, "refused   text/2: model.onnx is damaged"),
        (3, lambda graph: graph.write_bytes(graph.read_bytes()[:1000]), "refused   text/3: model.onnx is truncated"),
        (4, lambda graph: graph.rename(graph.with_name("net.onnx")), "refused   text/4: model.onnx is missing"),
        (5, break_model, "refused   text: Triton cannot load it: "),
    ):
        shutil.copytree(text / "1", tmp_path / "new")
        break_it(tmp_path / "new" / "model.onnx")
        (tmp_path / "new").rename(text / str(version))
        wait_for(lambda: said().count("text: version 1 keeps serving") == version - 1)  # noqa: B023
        assert reason in said()
        assert served(polling) == "1"
    assert is_ready(polling.http_url)
    publish_version(TEXT, "fp16", "onnxruntime", polling.repository)
    wait_for(lambda: served(polling) == "6")
    assert re.search(r"Triton cannot load it: .* weights are missing\n", said())
    assert "max_queue_delay_us" not in said()  # said once, at the start
    assert is_ready(polling.http_url)


def test_a_polling_server_follows_a_model_that_comes_and_goes(tmp_path: Path, polling: EmbeddedServer) -> None:
    with triton.InferenceServerClient(polling.grpc_url) as client:
        write_add_one(tmp_path, "second")
        (tmp_path / "second").rename(polling.repository / "second")
        wait_for(lambda: client.is_model_ready("second"))
        shutil.rmtree(polling.repository / "second")
        wait_for(lambda: not client.is_model_ready("second"))
        assert client.is_model_ready("add_one")
        with pytest.raises(triton.InferenceServerException, match="restricted"):
            client.unload_model("add_one")
        with pytest.raises(triton.InferenceServerException, match="restricted"):
            client.update_log_settings({"log_error": False})


def test_triton_serves_the_old_version_until_the_new_ones_configuration_is_there(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_version(TEXT, "fp32", "onnxruntime", tmp_path / "repository")
    move = version_files.move

    def killed(source: Path, destination: Path) -> None:
        if destination.name == "config.pbtxt":
            raise KeyboardInterrupt
        move(source, destination)

    monkeypatch.setattr(version_files, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        publish_version(TEXT, "fp16", "onnxruntime", tmp_path / "repository")
    assert versions_of(tmp_path / "repository" / "text") == [2, 1]
    monkeypatch.setattr(verified_repository, "made_here", lambda _: False)  # Triton reads it itself, as NVIDIA's does
    with EmbeddedServer(tmp_path / "repository", log_path=tmp_path / "log", **FREE) as running:
        assert served(running) == "1"
