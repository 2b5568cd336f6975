"""The embedded Triton: up in seconds, one line when it cannot, nothing left when it stops."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tritonclient import grpc as triton

from deepseek.spec import DeploymentSpec, FileDigest, GateFailed, InputError
from export.to_triton import publish_version
from serving.embedded import EmbeddedServer
from serving.ports import HeldPorts
from tests.conftest import write_add_one
from tests.gateway import free_port

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


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_nothing_is_left_running_however_it_ends(tmp_path: Path, how: signal.Signals, again: bool) -> None:
    write_add_one(tmp_path / "repository")
    process = start(tmp_path / "repository")
    below = wait_until_serving(process)
    assert {"tritonserver"} <= {each.name() for each in below}
    process.send_signal(how)
    if again:
        time.sleep(0.2)  # while it is stopping
        process.send_signal(how)
    _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130 if again else 0}.get(how, 0)
    _, alive = psutil.wait_procs(below, timeout=10)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_a_process_that_does_not_notice_is_ended_all_the_same(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    process = start(tmp_path / "repository")
    below = wait_until_serving(process)
    stub = next(each for each in below if "stub" in " ".join(each.cmdline()))
    scratch = Path(stub.exe()).parents[2]
    stub.suspend()  # as one that waits for ever for what Triton would have said
    process.kill()
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(below, timeout=40)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    assert not scratch.exists()
    assert not list(Path("/dev/shm").glob(f"{scratch.name}*"))


def test_a_launcher_killed_before_there_is_a_server_leaves_nothing(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    (tmp_path / "tmp").mkdir()
    dies = (
        "import os, signal, serving.launcher as launcher\n"
        "def dies(*_):\n"
        "    print(launcher.tempfile.gettempdir(), *os.listdir(launcher.tempfile.gettempdir()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "launcher.assemble_backend = dies\n"
        f"with launcher.EmbeddedServer({str(tmp_path / 'repository')!r}, http_port=0, grpc_port=0, metrics_port=0):\n"
        "    pass"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    ran = subprocess.run([sys.executable, "-c", dies], env=environment, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert "embedded-triton-" in ran.stdout
    until_s = time.monotonic() + 10
    while list((tmp_path / "tmp").iterdir()):
        assert time.monotonic() < until_s
        time.sleep(0.05)


def test_the_log_is_ours_alone_and_knows_no_secret(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    log = tmp_path / "log"
    log.touch(0o644)
    with EmbeddedServer(tmp_path / "repository", log_path=log, **FREE) as running:
        assert running._key in " ".join(psutil.Process(running._process.pid).cmdline())  # type: ignore[union-attr]
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert running._key not in log.read_text()
    assert "triton-admin-key=<secret>" in log.read_text()


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


def test_a_command_that_cannot_be_run_is_one_line(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    script = tmp_path / "script"
    script.write_text("echo no first line that names a shell\n")
    script.chmod(0o755)
    process = start(tmp_path / "repository", "--", str(script))
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (2, f"error: {script}: cannot be run while serving: Exec format error\n")


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"HTTP port 127.0.0.1:{port} cannot be used .* HTTP_PORT="):
            EmbeddedServer(tmp_path / "repository", http_port=port, grpc_port=0, metrics_port=0)


def test_a_port_that_was_picked_is_nobody_elses_until_the_server_listens() -> None:
    ports = HeldPorts("127.0.0.1", {"HTTP": 0, "gRPC": 0})
    assert len(set(ports.numbers.values())) == 2
    for port in ports.numbers.values():
        with socket.socket() as another, pytest.raises(OSError, match="in use"):
            another.bind(("127.0.0.1", port))
    with pytest.raises(InputError, match=rf"HTTP port localhost:{ports.numbers['gRPC']} cannot be used"):
        HeldPorts("localhost", {"HTTP": ports.numbers["gRPC"]})  # another start, while neither listens
    ports.release()
    with socket.socket() as another:
        another.bind(("127.0.0.1", ports.numbers["HTTP"]))
    named = HeldPorts("localhost", {"HTTP": 0})
    named.release()
    assert named.address == "127.0.0.1"  # Triton takes no names


def test_two_endpoints_on_one_port_and_an_address_of_another_machine_are_one_line(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(InputError, match=rf"^gRPC port 127.0.0.1:{port} cannot be used .*another one's.* GRPC_PORT="):
        EmbeddedServer(tmp_path / "repository", http_port=port, grpc_port=port, metrics_port=0)
    for address in ("192.0.2.1", "::1"):  # RFC 5737, and IPv6
        with pytest.raises(InputError, match=rf"^--address {address}: this machine has no such IPv4 address"):
            EmbeddedServer(tmp_path / "repository", address=address, **FREE)


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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--poll-s", "0"), "--poll-s 0: it must be more than 0"),
        (("--exit-timeout-s", "-5"), "--exit-timeout-s -5: it must be more than 0"),
        (("--timeout-s", "nan"), "--timeout-s nan: it must be more than 0"),
        (("--", "nosuchcommand", "x"), "nosuchcommand: no such command to run while serving"),
    ],
)
def test_a_wrong_flag_is_one_line_before_anything_starts(flags: tuple[str, ...], says: str) -> None:
    run = subprocess.run([sys.executable, "-m", "serving.embedded", *flags], capture_output=True, text=True)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert f"error: {says}" in run.stderr


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


TEXT = DeploymentSpec.load("tests/models/text")


def damage(path: Path) -> None:
    """Flips one bit in the middle; as a new file, since the old one may be in use."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def served(running: EmbeddedServer) -> str:
    """The version that answers."""
    inputs = [triton.InferInput(name, [1, 5], "INT64") for name in TEXT.inputs]
    for tensor in inputs:
        tensor.set_data_from_numpy(np.ones((1, 5), np.int64))
    with triton.InferenceServerClient(running.grpc_url) as client:
        return client.infer("text", inputs).get_response().model_version


def wait_for(condition: Callable[[], bool]) -> None:
    """Until a condition holds, 20 s at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_damaged_newest_version_leaves_the_older_one_in_service(
    build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "repository"
    for precision in ("fp32", "fp16"):
        publish_version(TEXT, precision, "onnxruntime", repository)
    damage(repository / "text" / "2" / "model.onnx")
    with EmbeddedServer(repository, log_path=tmp_path / "log", **FREE) as running:
        assert served(running) == "1"
    assert re.match(
        r"refused   text/2: model.onnx is damaged: .*; publish it again: .*\n +text: version 1 is served\n$",
        capsys.readouterr().err,
    )


def test_an_older_version_is_served_under_its_own_configuration(build: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_version(TEXT, "fp32", "onnxruntime", repository)
    publish_version(TEXT, "fp16", "onnxruntime", repository)
    damage(repository / "text" / "2" / "model.onnx")
    config = repository / "text" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 64"))  # as of a wider profile
    with EmbeddedServer(repository, log_path=tmp_path / "log", **FREE) as running:
        assert served(running) == "1"
        url = f"http://{running.http_url}/v2/models/text/config"
        assert json.load(urllib.request.urlopen(url))["max_batch_size"] == 8


def test_without_a_good_version_nothing_starts_and_one_line_says_why(build: Path, tmp_path: Path) -> None:
    publish_version(TEXT, "fp32", "onnxruntime", tmp_path / "repository")
    damage(tmp_path / "repository" / "text" / "1" / "model.onnx")
    process = start(tmp_path / "repository")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert errors.startswith("error: text/1: model.onnx is damaged")


def test_servers_of_one_checkout_have_logs_of_their_own(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    servers = [EmbeddedServer(tmp_path / "repository", **FREE) for _ in range(2)]
    for server in servers:
        server._ports.release()
    assert servers[0].log_path != servers[1].log_path


def test_a_configuration_above_the_profile_is_refused(build: Path, tmp_path: Path) -> None:
    publish_version(TEXT, "fp32", "onnxruntime", tmp_path / "repository")
    config = tmp_path / "repository" / "text" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 64"))
    with (
        pytest.raises(
            GateFailed, match=r"text/config.pbtxt: max_batch_size 64 is above the profile's largest batch, 8"
        ),
        EmbeddedServer(tmp_path / "repository", log_path=tmp_path / "log", **FREE),
    ):
        pass


def test_a_polling_server_refuses_a_wrong_version_and_takes_the_next_good_one(
    build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository, said = tmp_path / "repository", ""
    publish_version(TEXT, "fp32", "onnxruntime", repository)
    with EmbeddedServer(repository, log_path=tmp_path / "log", poll_s=1, **FREE) as running:

        def says(line: str) -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return line in said

        for version, break_it, reason in (
            (2, damage, "refused   text/2: model.onnx is damaged"),
            (3, lambda path: path.write_bytes(path.read_bytes()[:1000]), "refused   text/3: model.onnx is truncated"),
            (4, lambda path: path.rename(path.with_name("net.onnx")), "refused   text/4: model.onnx is missing, net"),
        ):
            shutil.copytree(repository / "text" / "1", tmp_path / "new")
            break_it(tmp_path / "new" / "model.onnx")
            (tmp_path / "new").rename(repository / "text" / str(version))
            wait_for(lambda reason=reason: says(reason))  # type: ignore[misc]
            assert served(running) == "1"
        publish_version(TEXT, "fp32", "onnxruntime", repository)
        wait_for(lambda: served(running) == "5")
    assert said.count("text: version 1 goes on serving") == 3


def test_a_polling_server_keeps_what_triton_could_not_replace(
    build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digests are right and Triton still fails: only it can know."""
    repository = tmp_path / "repository"
    publish_version(TEXT, "fp32", "onnxruntime", repository)
    with EmbeddedServer(repository, log_path=tmp_path / "log", poll_s=1, **FREE) as running:
        new = shutil.copytree(repository / "text" / "1", tmp_path / "new")
        (new / "model.py").write_text("raise RuntimeError('weights are missing')\n")
        manifest = json.loads((new / "manifest.json").read_text())
        manifest["files"]["model.py"] = FileDigest.of(new / "model.py").model_dump()
        (new / "manifest.json").write_text(json.dumps(manifest))
        new.rename(repository / "text" / "2")
        said: list[str] = []
        wait_for(lambda: said.append(capsys.readouterr().err) or "goes on serving" in "".join(said))  # type: ignore[func-returns-value]
        assert served(running) == "1"
    assert re.search(r"refused   text: Triton does not load it: .* weights are missing\n", "".join(said))


def test_a_polling_server_follows_a_model_that_comes_and_goes(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    with EmbeddedServer(tmp_path / "repository", log_path=tmp_path / "log", poll_s=1, **FREE) as running:
        client = triton.InferenceServerClient(running.grpc_url)
        write_add_one(tmp_path / "elsewhere", "second")
        (tmp_path / "elsewhere" / "second").rename(tmp_path / "repository" / "second")
        wait_for(lambda: client.is_model_ready("second"))
        shutil.rmtree(tmp_path / "repository" / "second")
        wait_for(lambda: not client.is_model_ready("second"))
        assert client.is_model_ready("add_one")
        with pytest.raises(triton.InferenceServerException, match="restricted"):
            client.unload_model("add_one")
        client.close()


def test_what_is_not_checked_or_no_model_is_said(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    (tmp_path / "repository" / "lost+found").mkdir()
    process = start(tmp_path / "repository", "--", "true")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert "warning   add_one: not checked: no manifest.json" in output
    assert "warning   lost+found: left out: no config.pbtxt" in output
