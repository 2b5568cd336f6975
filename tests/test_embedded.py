"""The embedded Triton: up in seconds, one line when it cannot, nothing left when it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from deepseek.spec import InputError
from serving.embedded import EmbeddedServer
from tests.conftest import write_add_one

FREE: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
FREE_FLAGS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


def start(repository: Path, *command: str) -> subprocess.Popen[str]:
    """The launcher in a process of its own, started as a user does."""
    arguments = [sys.executable, "-m", "serving.embedded", "--repository", str(repository), *FREE_FLAGS, *command]
    environment = {**os.environ, "BUILD": str(repository.parent / "build")}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_until_serving(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Reads up to the last line that start-up prints; returns the processes below the launcher."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Ctrl-C"):
            return psutil.Process(process.pid).children(recursive=True)
    raise AssertionError(process.stderr.read() if process.stderr else "")


def test_health_metrics_and_endpoints_are_real(server: EmbeddedServer) -> None:
    assert urllib.request.urlopen(f"http://{server.http_url}/v2/health/ready").status == 200
    metrics = urllib.request.urlopen(server.metrics_url).read().decode()
    assert 'nv_inference_request_success{model="add_one",version="1"}' in metrics


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_nothing_is_left_running_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    write_add_one(tmp_path / "repository")
    process = start(tmp_path / "repository")
    below = wait_until_serving(process)
    assert {"tritonserver"} <= {each.name() for each in below}
    process.send_signal(how)
    _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors
    assert process.returncode == (0 if how != signal.SIGKILL else -signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=10)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_shared_memory_and_scratch_are_removed(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    with EmbeddedServer(tmp_path / "repository", log_path=tmp_path / "log", **FREE) as running:
        scratch = running._scratch
        assert scratch is not None
        assert list(Path("/dev/shm").glob(f"{scratch.name}*"))
    assert not scratch.exists()
    assert not list(Path("/dev/shm").glob(f"{scratch.name}*"))


def test_a_command_runs_while_it_serves_and_its_status_is_passed_on(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    process = start(tmp_path / "repository", "--", "sh", "-c", "echo inside; exit 7")
    output, _ = process.communicate(timeout=30)
    assert "inside" in output
    assert process.returncode == 7


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"HTTP port 127.0.0.1:{port} cannot be used .* HTTP_PORT="):
            EmbeddedServer(tmp_path / "repository", http_port=port, grpc_port=0, metrics_port=0)


@pytest.mark.parametrize(
    ("breakage", "reason"),
    [
        ("raise RuntimeError('weights are missing')", "weights are missing"),
        ("import nosuchmodule", "No module named 'nosuchmodule'"),
        ("def (", "invalid syntax"),
    ],
    ids=["raises", "import", "syntax"],
)
def test_a_model_that_does_not_load_gives_tritons_reason_in_one_line(
    tmp_path: Path, breakage: str, reason: str
) -> None:
    write_add_one(tmp_path / "repository")
    write_add_one(tmp_path / "repository", "broken")
    (tmp_path / "repository" / "broken" / "1" / "model.py").write_text(breakage + "\n")
    process = start(tmp_path / "repository")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert "'broken'" in errors
    assert reason in errors


def test_a_broken_configuration_gives_tritons_reason(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    (tmp_path / "repository" / "add_one" / "config.pbtxt").write_text(
        'name: "add_one" nosuchfield: 3 backend: "python"'
    )
    with (
        pytest.raises(InputError, match="nosuchfield"),
        EmbeddedServer(tmp_path / "repository", log_path=tmp_path / "log", **FREE),
    ):
        pass


def test_an_empty_repository_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model in it .* make engine"), EmbeddedServer(tmp_path, **FREE):
        pass


def test_an_engine_for_another_backend_says_what_serves_it(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.pbtxt").write_text('name: "big"\nbackend: "tensorrt"\n')
    with pytest.raises(InputError, match="has no tensorrt backend"), EmbeddedServer(tmp_path, **FREE):
        pass


def test_a_server_that_is_never_ready_is_given_up_on(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    path = tmp_path / "repository" / "add_one" / "1" / "model.py"
    path.write_text("import time\ntime.sleep(60)\n" + path.read_text())
    started = time.monotonic()
    with (
        pytest.raises(InputError, match="not ready within 2 s"),
        EmbeddedServer(tmp_path / "repository", timeout_s=2, log_path=tmp_path / "log", **FREE),
    ):
        pass
    assert time.monotonic() - started < 20
