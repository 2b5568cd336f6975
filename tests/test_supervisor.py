"""A model whose process is killed serves again, or the server ends and says why."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from deepseek_client import ConnectionLost, DeadlineExceeded, InferenceClient, ModelNotReady, ServerError, Unreachable

from deepseek.spec import GateFailed, InputError
from serving.embedded import supervisor
from serving.embedded.launcher import EmbeddedServer
from serving.embedded.model_control import ModelControl, is_ready
from serving.embedded.serve import _serve
from serving.embedded.server_process import ServerProcess
from serving.embedded.stub_processes import LOOK_S
from tests.add_one import ADD_ONE, write_add_one
from tests.conftest import FREE
from tests.test_embedded import Said, said, start
from tests.waiting import wait_for

__all__ = ["said"]  # a fixture

X = {"x": np.zeros((1, 2, 3), np.float32)}
INITIALIZE = "    def initialize(self, args):\n"
EXECUTE = "    def execute(self, requests):\n"


def write_model(repository: Path, name: str, *, initialize: str = "pass", instances: int = 2) -> Path:
    """A model y = x + 1 that runs code when it is loaded; returns its model.py."""
    write_add_one(repository, name, instances=instances)
    path = repository / name / "1" / "model.py"
    path.write_text(ADD_ONE.replace(INITIALIZE, f"{INITIALIZE}        {initialize}\n", 1))
    return path


ENSEMBLE = """
name: "twice"
platform: "ensemble"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [2, -1] }
output { name: "y" data_type: TYPE_FP32 dims: [2, -1] }
ensemble_scheduling {
  step { model_name: "pair" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "z" } }
  step { model_name: "pair" model_version: -1 input_map { key: "x" value: "z" } output_map { key: "y" value: "y" } }
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server as in a container, which follows the repository.

    `pair` takes a second to load; the ensemble `twice` calls it two times; `other` is unaffected.
    """
    folder = tmp_path_factory.mktemp("watched")
    (folder / "repository" / "twice" / "1").mkdir(parents=True)
    (folder / "repository" / "twice" / "config.pbtxt").write_text(ENSEMBLE)
    write_model(folder / "repository", "pair", initialize="import time; time.sleep(1)")
    write_add_one(folder / "repository", "other")
    with EmbeddedServer(
        folder / "repository", **FREE, poll_s=0.2, behind_gateway=True, exit_timeout_s=1, log_path=folder / "log"
    ) as running:
        yield running


def stubs(running: EmbeddedServer, model: str) -> list[psutil.Process]:
    """The live processes of a model that already have their own command line."""
    found = []
    for each in psutil.Process(running.pid).children():
        with contextlib.suppress(psutil.Error):
            found += [each] if f"/{model}/" in " ".join(each.cmdline()) else []
    return found


def test_a_model_that_lost_its_processes_is_not_ready_and_then_serves_again(server: EmbeddedServer, said: Said) -> None:
    with InferenceClient(server.grpc_url, retries=0) as client:
        client.infer("pair", X)
        for stub in stubs(server, "pair"):
            stub.kill()
        wait_for(lambda: not client.ready("pair"))
        np.testing.assert_array_equal(client.infer("other", X)["y"], X["x"] + 1)
        wait_for(lambda: "serves again" in said())
        assert client.ready("pair")
        wait_for(lambda: len(stubs(server, "pair")) == 2)  # the others of what was unloaded have ended
        for _ in range(8):
            np.testing.assert_array_equal(client.infer("pair", X)["y"], X["x"] + 1)
        np.testing.assert_array_equal(client.infer("twice", X)["y"], X["x"] + 2)
    first, second = said().splitlines()
    assert first.startswith("died      pair: process ")
    assert first.count("process ") == 2
    assert "was killed by SIGKILL" in first
    assert second.startswith("          pair: serves again after ")


def test_patient_callers_notice_a_delay_only_and_the_old_processes_end(server: EmbeddedServer, said: Said) -> None:
    """Once the model is unloaded, its requests are refused, not failed. Triton alone would keep the other process."""
    before = stubs(server, "pair")
    load = ThreadPoolExecutor(4)
    with load, InferenceClient(server.grpc_url, retries=0) as client:
        under_way = [load.submit(client.infer, "pair", X) for _ in range(200)]
        before[0].kill()
        wait_for(lambda: not client.ready("pair"))
        with InferenceClient(server.grpc_url, retries=100, retry_budget=None, timeout_s=120) as patient:
            np.testing.assert_array_equal(patient.infer("pair", X)["y"], X["x"] + 1)
    assert {type(each.exception()) for each in under_way} <= {type(None), ServerError, ModelNotReady}
    wait_for(lambda: "serves again" in said())
    assert said().count("process ") == 1
    wait_for(lambda: not {each.pid for each in before} & {each.pid for each in stubs(server, "pair")})


def test_replacing_or_removing_a_model_does_not_count_as_a_death(server: EmbeddedServer, said: Said) -> None:
    path = server.repository / "other" / "1" / "model.py"
    before = stubs(server, "other")
    part = path.with_suffix(".part")
    part.write_text(f"{path.read_text()}\n# a new one\n")
    part.replace(path)
    _, alive = psutil.wait_procs(before, timeout=60)
    assert not alive
    (server.repository / "other").rename(server.repository.with_name("gone"))  # at once; and is unloaded
    wait_for(lambda: not stubs(server, "other"))
    time.sleep(3 * LOOK_S)
    assert said() == ""


ONCE = "import os, pathlib; f = pathlib.Path({flag!r}); f.exists() and (f.unlink(), os.kill(os.getpid(), 9))"


def test_a_process_killed_while_a_new_version_loads_gets_a_second_try(
    server: EmbeddedServer, said: Said, tmp_path: Path
) -> None:
    flag = tmp_path / "kill"
    flag.touch()
    write_model(tmp_path, "new", initialize=ONCE.format(flag=str(flag)), instances=1)
    (tmp_path / "new").rename(server.repository / "new")
    wait_for(lambda: not flag.exists() and stubs(server, "new"))
    with InferenceClient(server.grpc_url) as client:
        wait_for(lambda: client.ready("new"))
        np.testing.assert_array_equal(client.infer("new", X)["y"], X["x"] + 1)
    assert "died" not in said()


def test_a_load_that_takes_too_long_names_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        control = ModelControl(f"127.0.0.1:{silent.getsockname()[1]}", "", timeout_s=0.1)
        reason = control.change("slow", "load")
    assert reason == "no answer within 0.1 s (--timeout-s); Triton may still finish the load"


@pytest.mark.parametrize("times", [1, 2])
def test_a_server_that_crashes_while_it_starts_is_started_once_more(tmp_path: Path, times: int, said: Said) -> None:
    count = f"import os; n = len(os.listdir({str(tmp_path)!r})); "
    crash = f"n < {times + 1} and (open({str(tmp_path)!r} + f'/{{n}}', 'w'), os.kill(os.getppid(), 6), os._exit(1))"
    (tmp_path / "places").mkdir()
    write_model(tmp_path / "places" / "repository", "crashing", initialize=count + crash, instances=1)
    ends = pytest.raises(InputError, match="tritonserver was ended by SIGABRT")
    with (
        contextlib.nullcontext() if times == 1 else ends,
        EmbeddedServer(tmp_path / "places" / "repository", **FREE, log_path=tmp_path / "places" / "log") as running,
    ):
        assert is_ready(running.http_url)
    assert said() == "died      tritonserver was ended by SIGABRT while it started; starting it again\n"


def test_a_model_that_keeps_dying_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setattr(supervisor, "MOST_TIMES", 1)
    path = write_model(tmp_path / "repository", "dying", instances=1)
    path.write_text(path.read_text().replace(EXECUTE, f"{EXECUTE}        import os; os.kill(os.getpid(), 11)\n", 1))

    def call(url: str) -> None:
        with InferenceClient(url, retries=0, timeout_s=1) as client, contextlib.suppress(Unreachable):
            while True:
                with contextlib.suppress(ConnectionLost, DeadlineExceeded, ModelNotReady, ServerError):
                    client.infer("dying", X)
                time.sleep(0.05)

    with (
        ThreadPoolExecutor(1) as caller,
        EmbeddedServer(tmp_path / "repository", **FREE, exit_timeout_s=1, log_path=tmp_path / "log") as running,
    ):
        calls = caller.submit(call, running.grpc_url)
        with pytest.raises(GateFailed, match=r"dying: .* was ended by SIGSEGV; it was reloaded 1 times and served for"):
            _serve(running, [])
    assert calls.exception() is None
    assert said().count("reloading the model") == 1


def test_a_server_that_is_killed_is_one_line(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    with EmbeddedServer(tmp_path / "repository", **FREE, log_path=tmp_path / "log") as running:
        with running.log_path.open("a") as log:
            log.write("E1201 \"failed to load 'add_one' version 2: it was refused before\"\n")
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(GateFailed, match="tritonserver was killed by SIGKILL"):
            _serve(running, [])


def test_a_crashed_server_that_does_not_exit_is_killed(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's last test: it ends the shared server."""
    monkeypatch.setattr(supervisor, "CRASH_S", 0.1)
    with server.log_path.open("ab") as file:
        file.write(b"Signal (11) received.\n")  # on busy cores, its stack trace takes a minute
    with pytest.raises(GateFailed, match="tritonserver crashed but does not exit"):
        _serve(server, [])


def test_a_stop_while_models_load_is_no_error(tmp_path: Path) -> None:
    began = tmp_path / "began"
    code = f"open({str(began)!r}, 'w'); import time; time.sleep(9)"
    write_model(tmp_path / "repository", "slow", initialize=code)
    process = start(tmp_path / "repository")
    wait_for(began.exists)
    process.terminate()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "stopping\n")


def test_the_files_of_a_running_server_are_not_cleaned_away(tmp_path: Path) -> None:
    process = ServerProcess(tmp_path / "log", exit_timeout_s=1, echo_log=False)
    folder = os.open(process.scratch, os.O_RDONLY)
    with pytest.raises(BlockingIOError):  # systemd-tmpfiles leaves out a folder that it cannot lock
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.remove_files()
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)
    assert not process.scratch.exists()
