"""The process of the OpenAI routes: when it starts, crashes, and ends with the server."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import urllib.parse
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from deepseek.spec import InputError
from deepseek.spec.machine.open_files import MOST
from serving.embedded.openai_process import OpenAIProcess
from serving.embedded.serve import _Routes
from serving.embedded.supervisor import MOST_TIMES
from tests.add_one import write_add_one
from tests.gateway import free_port
from tests.test_embedded import start
from tests.test_openai import Serving, call, serve
from tests.waiting import wait_for

BLOCKED = """
import json, os, time
import numpy as np
import triton_python_backend_utils as pb_utils
from numpy1_stub import fix_strings


class TritonPythonModel:
    def initialize(self, args):
        fix_strings(pb_utils)
        self.go = json.loads(args["model_config"])["parameters"]["go"]["string_value"]

    def execute(self, requests):
        open(self.go + ".asked", "w").close()
        while not os.path.exists(self.go):
            time.sleep(0.01)
        time.sleep(0.2 * os.path.exists(self.go + ".slow"))
        arrays = {"embedding": np.ones((1, 3), np.float32), "tokens": np.ones((1, 1), np.int32)}
        answer = [pb_utils.Tensor.from_dlpack(name, array) for name, array in arrays.items()]
        return [pb_utils.InferenceResponse(answer) for _ in requests]
"""
BLOCKED_CONFIG = """
name: "blocked"
backend: "python"
max_batch_size: 1
input { name: "text" data_type: TYPE_STRING dims: [1] }
output { name: "embedding" data_type: TYPE_FP32 dims: [3] }
output { name: "tokens" data_type: TYPE_INT32 dims: [1] }
instance_group { kind: KIND_CPU count: 1 }
dynamic_batching { default_queue_policy { max_queue_size: 1 } }
parameters { key: "text" value { string_value: '{"max_tokens": 8, "max_bytes": 100}' } }
parameters { key: "go" value { string_value: "GO" } }
"""
ASK = ("POST", "/v1/embeddings", b'{"model": "blocked", "input": "a"}')


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path]]:
    """A server whose model `blocked` answers when a file exists, with a queue of one; and the file."""
    folder = tmp_path_factory.mktemp("blocked")
    version, go = folder / "repository" / "blocked" / "1", folder / "go"
    version.mkdir(parents=True)
    (version / "model.py").write_text(BLOCKED)
    shutil.copy("serving/backend/numpy1_stub.py", version)
    (version.parent / "config.pbtxt").write_text(BLOCKED_CONFIG.replace("GO", str(go)))
    with serve(folder / "repository") as running:
        try:
            yield running, go
        finally:
            go.touch()


def test_a_full_queue_is_429_with_retry_after(blocked: tuple[Serving, Path]) -> None:
    serving, go = blocked
    url = serving.places["OpenAI"]
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(call, url, *ASK) for _ in range(8)]
        wait_for(lambda: sum(each.done() for each in calls) >= 5)  # refused, while one runs and one or two wait
        refused = [each.result() for each in calls if each.done()]
        go.touch()
        statuses = sorted(each.result()[0] for each in calls)
    assert {(status, headers["Retry-After"]) for status, headers, _ in refused} == {(429, "1")}
    assert refused[0][2]["error"]["code"] == "rate_limit_exceeded"
    assert statuses.count(200) >= 1  # the one that ran; on a busy machine all others may come before it starts
    assert set(statuses) == {200, 429}


def test_a_stop_waits_until_a_long_list_is_answered(blocked: tuple[Serving, Path]) -> None:
    """Ten batches of 0.2 s, which is more than the second that Triton gets for its own requests. It ends the server."""
    serving, go = blocked
    asked = Path(f"{go}.asked")
    for file in (go, asked):
        file.unlink(missing_ok=True)
    body = b'{"model": "blocked", "input": [%s]}' % b", ".join([b'"a"'] * 10)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call, serving.places["OpenAI"], "POST", "/v1/embeddings", body)
        wait_for(asked.exists)
        serving.process.terminate()
        wait_for(lambda: not listens(serving.places["OpenAI"]))
        Path(f"{go}.slow").touch()
        go.touch()
        status, _, found = answer.result()
    serving.process.communicate()
    assert (status, len(found["data"]), serving.process.returncode) == (200, 10, 0)


def listens(url: str) -> bool:
    """Whether something accepts connections there."""
    place = urllib.parse.urlsplit(url)
    with contextlib.suppress(OSError), socket.create_connection((place.hostname or "", place.port or 0)):
        return True
    return False


@pytest.fixture
def few_files() -> Iterator[int]:
    """This process and its children may have 1024 open files, unless they ask for more: up to the yielded number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield min(MOST, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_files(pid: int) -> int:
    """How many a process may have."""
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]


def test_crashed_routes_are_restarted_and_all_ends_with_the_server(built_sentence: Path, few_files: int) -> None:
    serving = Serving.of(start(built_sentence / "repository", "--openai-port", "0"))
    first = serving.routes
    assert open_files(serving.process.pid) == few_files
    first.kill()
    with openai.OpenAI(base_url=serving.places["OpenAI"], api_key="unused", max_retries=20) as client:
        assert len(client.embeddings.create(model="sentence", input="ab").data[0].embedding) == 32
    second = serving.routes
    assert second.pid != first.pid
    serving.process.send_signal(signal.SIGKILL)
    _, errors = serving.process.communicate()
    assert errors == "died      the OpenAI routes: exit status -9; restarting them\n"
    second.wait(60)


def test_routes_that_keep_crashing_are_a_failure(tmp_path: Path) -> None:
    said: list[str] = []
    place = {"address": "127.0.0.1", "port": 0, "http_port": 1}
    with OpenAIProcess(tmp_path, **place, say=said.append) as routes:  # type: ignore[arg-type]
        reasons: list[str] = []

        def crash() -> bool:
            os.kill(routes.pid, signal.SIGKILL)
            reasons.extend(filter(None, [routes.look()]))
            return bool(reasons)

        wait_for(crash)
        assert not listens(routes.url)
    assert len(said) == MOST_TIMES
    assert "ended 4 times within 60 s, last with exit status -9" in reasons[0]


def test_without_a_server_it_is_503_with_retry_after(tmp_path: Path, few_files: int) -> None:
    place = {"address": "127.0.0.1", "port": 0, "http_port": free_port()}
    (tmp_path / "sentence").mkdir()
    (tmp_path / "sentence" / "config.pbtxt").touch()
    with OpenAIProcess(tmp_path, **place, say=print) as routes:  # type: ignore[arg-type]
        for request in (("POST", "/v1/embeddings", b'{"model": "sentence", "input": "a"}'), ("GET", "/v1/models")):
            status, headers, answer = call(routes.url, *request)
            assert (status, headers["Retry-After"], answer["error"]["type"]) == (503, "1", "server_error")
        assert open_files(routes.pid) == few_files


def routes_of(repository: Path, port: int, running: ExitStack, **changed: Any) -> _Routes:
    """The routes as `deepseek serve` starts them, beside a Triton that is not there."""
    options = Namespace(**{"behind_gateway": False, "command": [], "openai_port": port, "poll_s": None} | changed)
    server: Any = SimpleNamespace(repository=repository, served=repository, address="127.0.0.1", http_port=1)
    return _Routes(options, server, running)


def test_only_texts_need_the_routes(built_sentence: Path, built_shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without them, a recommender is served without the page."""
    texts, names = (folder / "repository" for folder in (built_sentence, built_shop))
    with ExitStack() as running:
        taken = running.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = taken.getsockname()[1]
        why = f"OpenAI port 127.0.0.1:{port} cannot be used"
        with pytest.raises(InputError, match=f"^{why} .*OPENAI_PORT="):
            routes_of(texts, port, running)
        assert routes_of(names, port, running).process is None
        assert capsys.readouterr().err.startswith(f"warning   no page to try the models: {why}")
        for repository, reason in ((texts, "ended"), (names, None)):
            routes = routes_of(repository, 0, running)
            assert routes.process is not None
            routes.process.look = lambda: "ended"  # type: ignore[method-assign]
            assert [routes.look(), routes.look()] == [reason, reason]
        assert routes.process is None
        assert capsys.readouterr().err == "warning   no page to try the models: ended\n"


def test_routes_start_when_a_polling_server_gets_its_first_model_that_takes_texts(
    built_sentence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_add_one(tmp_path)
    with ExitStack() as running:
        with socket.create_server(("127.0.0.1", 0)) as taken:  # the server goes on without the routes until it is free
            port = taken.getsockname()[1]
            routes = routes_of(tmp_path, port, running, poll_s=0)
            assert (routes.look(), routes.process) == (None, None)
            (tmp_path / "add_one" / "config.pbtxt").write_text("no configuration")  # one bad model stops no other
            shutil.copytree(built_sentence / "repository" / "sentence", tmp_path / "sentence")
            for _ in range(2):
                assert (routes.look(), routes.process) == (None, None)
        assert routes.look() is None
        refused, url = capsys.readouterr().err.splitlines()
        assert refused.startswith(f"warning   no OpenAI routes: OpenAI port 127.0.0.1:{port} cannot be used")
        assert url == f"OpenAI    http://127.0.0.1:{port}/v1"
        assert listens(f"http://127.0.0.1:{port}/v1")
