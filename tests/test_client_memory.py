"""The client's shared memory, with a real Triton that allows it, refuses it, is killed or is busy."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import (
    AsyncInferenceClient,
    DeadlineExceeded,
    InferenceClient,
    InvalidInput,
    ModelStatistics,
    PreparedRequest,
    ServerBusy,
)
from deepseek_client.transport import Tensor

from serving.embedded.launcher import EmbeddedServer
from tests.add_one import replace_in, write_add_one
from tests.conftest import FREE
from tests.failing_servers import accepting, protocols, refusing, status, url_of
from tests.waiting import wait_for

X = np.arange(240_000, dtype=np.float32).reshape(1, 2, 120_000)  # 960 kB
REQUEST = PreparedRequest(
    model="fixed",
    version="",
    request_id="",
    outputs=(),
    parts=(),
    tensors=(Tensor(name="x", datatype="FP32", shape=X.shape, data=X.tobytes()),),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models `add_one`, with outputs of any size, `fixed`, with outputs of a fixed size, and `slow`."""
    folder = tmp_path_factory.mktemp("memory") / "repository"
    for name, delay_s in (("add_one", 0.0), ("fixed", 0.0), ("slow", 0.3)):
        write_add_one(folder, name, delay_s=delay_s, instances=1)
    replace_in(folder / "fixed" / "config.pbtxt", "[2, -1]", "[2, 120000]")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[EmbeddedServer]:
    with serve(repository) as running:
        yield running


def serve(repository: Path, *flags: str, **ports: int) -> EmbeddedServer:
    return EmbeddedServer(repository, log_path=repository.parent / "triton.log", flags=flags, **FREE | ports)


def client_of(server: EmbeddedServer, protocol: str, shared_memory: Any, **settings: Any) -> InferenceClient:
    return InferenceClient(url_of(server, protocol), protocol, shared_memory=shared_memory, **settings)  # type: ignore[arg-type]


def left_behind(pid: int = os.getpid()) -> list[str]:
    """The regions of a process, by default this one: other tests may run at the same time."""
    return [path.name for path in Path("/dev/shm").glob(f"deepseek-client-{pid}-*")]


def registered(server: EmbeddedServer) -> list[str]:
    with urllib.request.urlopen(f"http://{server.http_url}/v2/systemsharedmemory/status") as answer:
        return [region["name"] for region in json.load(answer)]


def wait_for_one(server: EmbeddedServer) -> None:
    wait_for(lambda: registered(server), lambda found: len(found) == 1)


def shared(client: InferenceClient, model: str) -> int:
    told: ModelStatistics = client.statistics().models[model]
    return told.through_shared_memory


@protocols
@pytest.mark.parametrize("model", ["add_one", "fixed"])
def test_tensors_go_through_shared_memory(server: EmbeddedServer, protocol: str, model: str) -> None:
    with client_of(server, protocol, "auto") as client:
        for k in range(3):
            answer = client.infer(model, {"x": X + k})["y"]
            np.testing.assert_array_equal(answer, X + k + 1)
            assert not answer.flags.writeable
        assert left_behind() == []
        assert len(registered(server)) == 1
        assert shared(client, model) == 3
    assert registered(server) == []


@protocols
async def test_concurrent_tasks_use_separate_regions(server: EmbeddedServer, protocol: str) -> None:
    async with AsyncInferenceClient(url_of(server, protocol), protocol, shared_memory="auto") as client:  # type: ignore[arg-type]
        answers = await asyncio.gather(*(client.infer("fixed", {"x": X + k}) for k in range(6)))
        assert client.statistics().models["fixed"].through_shared_memory == 6
    for k, answer in enumerate(answers):
        np.testing.assert_array_equal(answer["y"], X + k + 1)
    assert registered(server) == left_behind() == []


def test_small_tensors_use_the_socket_unless_shared_memory_is_required(server: EmbeddedServer) -> None:
    small = X[:, :, :3]
    with client_of(server, "grpc", "auto") as auto, client_of(server, "grpc", True) as always:
        for client in (auto, always):
            np.testing.assert_array_equal(client.infer("add_one", {"x": small})["y"], small + 1)
        assert (shared(auto, "add_one"), shared(always, "add_one")) == (0, 1)
        assert [bool(client.prepare("add_one", {"x": small}).parts) for client in (auto, always)] == [True, False]


@protocols
def test_a_growing_request_gets_a_larger_region(server: EmbeddedServer, protocol: str) -> None:
    with client_of(server, protocol, True) as client:
        for size in (100, 60_000, 120_000, 100):
            np.testing.assert_array_equal(client.infer("add_one", {"x": X[:, :, :size]})["y"], X[:, :, :size] + 1)
        wait_for_one(server)  # abandoned regions are unregistered in the background


@protocols
def test_after_a_deadline_the_region_is_abandoned_and_unregistered(server: EmbeddedServer, protocol: str) -> None:
    with client_of(server, protocol, True, retries=0) as client:
        request = client.prepare("slow", {"x": X})
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                client.send(request, timeout_s=0.1)
        np.testing.assert_array_equal(client.send(request)["y"], X + 1)
        wait_for_one(server)
    assert registered(server) == left_behind() == []


def test_tensors_use_the_socket_if_the_server_refuses_shared_memory(repository: Path) -> None:
    flags = (f"--{name}=shared-memory:key=value" for name in ("http-restricted-api", "grpc-restricted-protocol"))
    with serve(repository, *flags) as server:
        for protocol in ("http", "grpc"):
            with client_of(server, protocol, "auto") as client:
                request = client.prepare("fixed", {"x": X})
                for _ in range(2):
                    np.testing.assert_array_equal(client.send(request)["y"], X + 1)
                assert shared(client, "fixed") == 0
    assert left_behind() == []


DISABLED = "client shared memory is disabled; enable it with --allow-client-shm=true"


@protocols
def test_disabled_shared_memory_is_not_mistaken_for_a_lost_connection(protocol: str) -> None:
    with refusing(protocol, "503 Service Unavailable", grpc.StatusCode.UNAVAILABLE, DISABLED) as (url, seen):
        client = InferenceClient(url, protocol, shared_memory=True)  # type: ignore[arg-type]
        with client, pytest.raises(InvalidInput, match=r"is disabled.*'auto' uses the socket"):
            client.send(REQUEST)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("refusal", "regions"),
    [
        pytest.param("Exceeds maximum queue size", 1, id="did not run"),
        pytest.param("upstream connect error", 2, id="a proxy lost the server, which may still write into the region"),
    ],
)
def test_a_region_is_used_again_only_if_the_request_did_not_run(refusal: str, regions: int) -> None:
    seen = set()

    def answer(connection: socket.socket) -> None:
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
        if b"/infer " not in head:
            return status("200 OK", "{}")(connection)
        seen.add(json.loads(body)["inputs"][0]["parameters"]["shared_memory_region"])
        return status("503 Service Unavailable", json.dumps({"error": refusal}))(connection)

    with accepting(answer) as url, InferenceClient(url, "http", shared_memory=True, retries=0) as client:
        for _ in range(2):
            with pytest.raises(ServerBusy):
                client.send(REQUEST)
    assert len(seen) == regions


def test_a_restarted_server_gets_new_regions(repository: Path) -> None:
    async def main() -> None:
        with serve(repository) as first:
            client = AsyncInferenceClient(first.http_url, "http", shared_memory="auto", retries=0)
            await asyncio.gather(*(client.infer("fixed", {"x": X}) for _ in range(2)))
            os.kill(first.pid, signal.SIGKILL)
            assert left_behind() == []
            ports = {"http_port": first.http_port, "grpc_port": first.grpc_port}
        with serve(repository, **ports):
            async with client:
                for _ in range(3):
                    np.testing.assert_array_equal((await client.infer("fixed", {"x": X}))["y"], X + 1)
                told = client.statistics().models["fixed"]
                assert (told.calls, told.through_shared_memory) == (5, 4)  # one used the socket, and showed the restart

    asyncio.run(main())
    assert left_behind() == []


FORKED = """
import os, sys
import numpy as np
from deepseek_client import InferenceClient
with InferenceClient(sys.argv[1], "http", shared_memory=True, timeout_s=60) as client:
    client.infer("fixed", {"x": np.zeros((1, 2, 120_000), np.float32)})
    (region,) = client._core._replicas.all[0].regions._idle
    before = region.read("y", 960_000)
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        assert region.read("y", 960_000) == before
    answer = client.infer("fixed", {"x": np.full((1, 2, 120_000), child, np.float32)})
    assert answer["y"].max() == child + 1
    assert client.statistics().models["fixed"].through_shared_memory == 2
"""


def test_a_forked_process_leaves_its_parents_memory_alone(server: EmbeddedServer) -> None:
    subprocess.run([sys.executable, "-c", FORKED, server.http_url], check=True, timeout=100)
    assert registered(server) == []


def test_a_killed_client_leaves_no_file_behind(server: EmbeddedServer) -> None:
    code = f"""
import os, signal, numpy as np
from deepseek_client import InferenceClient
client = InferenceClient({server.grpc_url!r}, shared_memory=True)
client.infer("fixed", {{"x": np.zeros((1, 2, 120_000), np.float32)}})
assert client.statistics().models["fixed"].through_shared_memory == 1
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.Popen([sys.executable, "-c", code])
    assert killed.wait() == -signal.SIGKILL
    assert left_behind(killed.pid) == []


def test_a_full_dev_shm_falls_back_to_the_socket(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with client_of(server, "http", "auto") as client:
        np.testing.assert_array_equal(client.infer("fixed", {"x": X})["y"], X + 1)
        assert shared(client, "fixed") == 0
    with client_of(server, "http", True) as client, pytest.raises(InvalidInput, match="No space left"):
        client.infer("fixed", {"x": X})
    assert left_behind() == []
