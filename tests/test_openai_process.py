"""The process of the OpenAI routes: when it starts, crashes, and ends with the server."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from deepseek.spec.machine.open_files import MOST
from serving.embedded.openai_process import OpenAIProcess
from serving.embedded.supervisor import MOST_TIMES
from tests.conftest import write_add_one
from tests.gateway import free_port, wait_for
from tests.test_embedded import start
from tests.test_openai import Serving, blocked, call

__all__ = ["blocked"]  # a fixture


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
    with openai.OpenAI(base_url=serving.places["OpenAI"], api_key="unused", max_retries=5) as client:
        assert len(client.embeddings.create(model="sentence", input="ab").data[0].embedding) == 32
    second = serving.routes
    assert second.pid != first.pid
    serving.process.send_signal(signal.SIGKILL)
    _, errors = serving.process.communicate()
    assert errors == "died      the OpenAI routes: exit status -9; restarting them\n"
    second.wait(60)


def test_a_stop_waits_until_a_long_list_is_answered(blocked: tuple[Serving, Path]) -> None:
    """Ten batches of 0.5 s, which is more than the 3 s that Triton gets for its own requests."""
    serving, go = blocked
    body = b'{"model": "blocked", "input": [%s]}' % b", ".join([b'"a"'] * 10)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call, serving.places["OpenAI"], "POST", "/v1/embeddings", body)
        wait_for(Path(f"{go}.asked").exists)
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


def test_a_port_in_use_is_one_line(built_sentence: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(built_sentence / "repository", "--openai-port", str(port))
        _, errors = process.communicate()
    assert (process.returncode, errors.count("\n")) == (2, 1)
    assert f"OpenAI port 127.0.0.1:{port} cannot be used" in errors
    assert "OPENAI_PORT=" in errors


def test_routes_start_when_a_polling_server_gets_its_first_model_that_takes_texts(
    built_sentence: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    write_add_one(repository)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # the server goes on without the routes until it is free
        port = taken.getsockname()[1]
        process = start(repository, "--poll-s", "1", "--openai-port", str(port))
        assert "OpenAI" not in Serving.of(process).places
        (repository / "add_one" / "config.pbtxt").write_text("no configuration")  # one bad model stops no other
        shutil.copytree(built_sentence / "repository" / "sentence", tmp_path / "sentence")
        (tmp_path / "sentence").rename(repository / "sentence")
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(f"warning   no OpenAI routes: OpenAI port 127.0.0.1:{port} cannot be used" in line for line in lines)
    assert f"OpenAI    http://127.0.0.1:{port}/v1\n" in lines
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=5) as client:
        assert len(client.embeddings.create(model="sentence", input="ab").data[0].embedding) == 32
    process.terminate()
    process.communicate()
