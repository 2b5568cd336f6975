"""OpenAI's routes behind the gateway: the package `openai` with a key, and errors in OpenAI's shape."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import ssl
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.repository.served_models import ServedModel, served_models
from serving.stack.gateway_limits import limits
from serving.stack.server_sizes import OPENAI_MIB, server_sizes
from tests.failing_servers import answering, mute
from tests.gateway import Gateway, skip_without_nginx
from tests.test_embedded import Serving
from tests.test_openai import serve
from tests.waiting import wait_for

BODY = b'{"model": "sentence", "input": ["ab", "cd ab"]}'


@pytest.fixture(scope="module")
def models(built_sentence: Path) -> list[ServedModel]:
    return served_models(built_sentence / "repository", Path("tests/models"))


@pytest.fixture(scope="module")
def serving(built_sentence: Path) -> Iterator[Serving]:
    """The server as the CPU image starts it."""
    skip_without_nginx()
    with serve(built_sentence / "repository", "--behind-gateway") as running:
        yield running


def address(serving: Serving) -> str:
    """host:port of the routes."""
    return serving.places["OpenAI"].removeprefix("http://").removesuffix("/v1")


def in_front(
    serving: Serving, folder: Path, models: list[ServedModel], openai: str | None = None, **settings: Any
) -> Gateway:
    """A gateway in front of the server; `openai`: another address of the routes."""
    triton = serving.places["HTTP"].removeprefix("http://").removesuffix("/v2")
    routes = address(serving) if openai is None else openai
    return Gateway(folder, limits(models), triton, serving.places["gRPC"], openai=routes, **settings)


@pytest.fixture(scope="module")
def gateway(serving: Serving, models: list[ServedModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with in_front(serving, tmp_path_factory.mktemp("gateway"), models) as running:
        yield running


def client_of(gateway: Gateway, key: str | None = None) -> openai.OpenAI:
    """OpenAI's client, as an application uses it."""
    trusted = ssl.create_default_context(cafile=str(gateway.folder / "ca.crt"))
    return openai.OpenAI(
        base_url=f"https://localhost:{gateway.port}/v1",
        api_key=gateway.key if key is None else key,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(verify=trusted),
    )


def embed(gateway: Gateway, *headers: str, body: bytes = BODY, key: str | None = None) -> tuple[int, bytes, Any]:
    """Status, headers and JSON of a bare request."""
    status, answer = gateway.http("POST", "/v1/embeddings", *headers, body=body, key=key)
    head, _, rest = answer.partition(b"\r\n\r\n")
    return status, head, json.loads(rest)


def refused(head: bytes, answer: Any) -> tuple[str, str | None, str]:
    """Type, code and message of an error; "retry" is in front of the type of one with Retry-After."""
    assert answer.keys() == {"error"}
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    waits = re.findall(rb"(?mi)^retry-after: (\S+)\r?$", head)
    assert waits in ([], [b"1"])
    return "retry " * len(waits) + error["type"], error["code"], error["message"]


def test_openais_client_works_with_a_key_and_on_the_machine_itself_without(gateway: Gateway) -> None:
    texts = ["ab " * (1 + place % 30) for place in range(40)]  # more than a batch
    with client_of(gateway) as client:
        answer = client.embeddings.create(model="sentence", input=texts)
        assert [len(each.embedding) for each in answer.data] == [32] * 40
        assert answer.usage.prompt_tokens > 40
        assert [model.id for model in client.models.list()] == ["sentence"]
        assert client.models.retrieve("sentence").id == "sentence"
    with openai.OpenAI(base_url=f"http://{gateway.local_http}/v1", api_key="unused", max_retries=0) as client:
        assert len(client.embeddings.create(model="sentence", input="ab").data[0].embedding) == 32
    pair = {"source_sentence": "ab", "sentences": ["ab", "cd"]}
    status, cosines = gateway.http("POST", "/similarity", body=json.dumps({"inputs": pair}).encode())
    assert (status, len(json.loads(cosines.partition(b"\r\n\r\n")[2]))) == (200, 2)
    line, *_ = gateway.lines(path="/v1/embeddings", status=200)
    assert (line["caller"], line["api"], line["model"]) == ("shop", "openai", "")
    counted = 'gateway_requests_total{protocol="http",api="openai",model="",status="200"}'
    wait_for(lambda: gateway.metrics().get(counted, 0) >= 4)


@pytest.mark.parametrize("key", ["", "dsk_" + "A" * 43, "unused"])
def test_every_path_without_a_key_is_401(gateway: Gateway, key: str) -> None:
    for path in ("/v1/embeddings", "/v1/models", "/v1/models/sentence", "/v1/completions", "/v1/", "/similarity"):
        status, answer = gateway.http("GET", path, key=key)
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert (status, refused(head, json.loads(rest))[:2]) == (401, ("invalid_request_error", "invalid_api_key"))
    with client_of(gateway, key or "none") as client, pytest.raises(openai.AuthenticationError, match="Bearer <key>"):
        client.embeddings.create(model="sentence", input="ab")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/embeddings"),
        ("POST", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/metrics"),
        ("GET", "/v1/models/%2e%2e/metrics"),
        ("GET", "/v1//models"),
        ("GET", "/v1/models?x=1"),
        ("GET", "/similarity"),
        ("POST", "/rerank?x=1"),
        ("GET", "/metrics"),
        ("GET", "/v1/../metrics"),
        ("GET", "/"),
    ],
)
def test_no_other_route_of_the_process_is_reached(gateway: Gateway, method: str, path: str) -> None:
    status, answer = gateway.http(method, path, body=b"{}" if method == "POST" else b"")
    if status == 403:  # outside /v1/ once nginx has normalized the path
        assert b"not a method and path for inference" in answer
    else:
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert (status, refused(head, json.loads(rest))[1]) == (404, "unknown_url")
    assert {line["triton"] for line in gateway.lines(method=method, path=path)} == {""}


def test_every_route_but_statistics_and_the_document_is_reached(serving: Serving, gateway: Gateway) -> None:
    routes = json.load(urllib.request.urlopen(f"http://{address(serving)}/openapi.json"))["paths"]
    inside = {"/metrics", "/openapi.json", "/v2/models/{model}/stats"}
    assert inside | {"/v1/embeddings"} < routes.keys()
    for path, methods in routes.items():
        (method,) = (name.upper() for name in methods)
        target = path.replace("{model}", "sentence")
        gateway.http(method, target, body=b"{}" if method == "POST" else b"")
        reached = {line["triton"] for line in gateway.lines(method=method, path=target)} - {""}
        where = f"docker/gateway/nginx.conf: {path} in the map $api, and in the location of the OpenAI routes"
        assert reached == ({address(serving)} if path not in inside else set()), where


def test_refusals_of_the_routes_pass_unchanged(gateway: Gateway) -> None:
    status, head, answer = embed(gateway, body=b'{"model": "another", "input": "a"}')
    assert (status, refused(head, answer)[:2]) == (404, ("invalid_request_error", "model_not_found"))
    status, head, answer = embed(gateway, body=b'{"model": "sentence"}')
    assert (status, answer["error"]["param"]) == (400, "input")


def test_a_body_that_is_too_large_or_compressed_is_refused(gateway: Gateway, models: list[ServedModel]) -> None:
    with client_of(gateway) as client, pytest.raises(openai.APIStatusError, match="send fewer texts at once") as error:
        client.embeddings.create(model="sentence", input=["a" * models[0].body_bytes])
    assert (error.value.status_code, error.value.type) == (413, "invalid_request_error")
    status, head, answer = embed(gateway, "Content-Encoding: gzip")
    assert (status, refused(head, answer)[0]) == (415, "invalid_request_error")


def test_the_rate_of_a_key_holds_there_too(gateway: Gateway) -> None:
    with client_of(gateway, gateway.add_key("slow", rate_rps=1)) as client:

        def until_refused() -> None:
            for _ in range(100):
                client.models.list()

        with pytest.raises(openai.RateLimitError) as caught:
            until_refused()
    found = caught.value
    waits = found.response.headers["Retry-After"]
    assert (found.type, found.code, waits) == ("rate_limit_error", "rate_limit_exceeded", "1")


@pytest.mark.parametrize("status", [429, 503])
def test_a_retry_after_of_the_routes_stands_alone(
    serving: Serving, models: list[ServedModel], tmp_path: Path, status: int
) -> None:
    said = f"HTTP/1.1 {status} Later\r\nRetry-After: 7\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    with (
        answering(lambda connection: connection.sendall(said)) as (routes, _),
        in_front(serving, tmp_path, models, routes) as running,
    ):
        found, answer = running.http("GET", "/v1/models")
    assert found == status
    assert re.findall(rb"(?mi)^retry-after: (\S+)\r?$", answer) == [b"7"]


def test_a_key_for_bulk_requests_cannot_raise_its_priority_and_a_broken_connection_is_502(
    serving: Serving, models: list[ServedModel], tmp_path: Path
) -> None:
    with answering(lambda connection: None) as (routes, seen), in_front(serving, tmp_path, models, routes) as running:
        bulk = running.add_key("nightly", bulk=True)
        for key, *headers in ((bulk, "X-Priority: online"), (running.key, "X-Priority: bulk"), (running.key,)):
            status, head, answer = embed(running, *headers, key=key)
            assert (status, refused(head, answer)[0]) == (502, "server_error")
            assert "the request may have run" in answer["error"]["message"]
    assert [re.findall(rb"(?i)x-priority: (\w+)", request) for request in seen] == [[b"bulk"], [b"bulk"], []]


def test_without_a_process_of_the_routes_it_starts_and_answers_503(
    serving: Serving, models: list[ServedModel], tmp_path: Path
) -> None:
    with in_front(serving, tmp_path, models, "127.0.0.1:9") as alone:
        status, head, answer = embed(alone)
        said = ("retry server_error", None, "the server is not available; try again")
        assert (status, refused(head, answer)) == (503, said)
        assert alone.http("GET", "/v2/models/sentence")[0] == 200


def test_a_late_answer_is_504_and_a_key_has_its_concurrency(
    serving: Serving, models: list[ServedModel], tmp_path: Path
) -> None:
    """With one request at a time, and a second to answer."""
    program = shutil.copytree("docker/gateway", tmp_path / "program")
    text = (program / "nginx.conf").read_text()
    assert "limit_conn keys 512;" in text
    assert "proxy_read_timeout 65s;" in text
    (program / "nginx.conf").write_text(text.replace("keys 512;", "keys 1;").replace("timeout 65s;", "timeout 1s;"))
    found: dict[int, tuple[str, str | None, str]] = {}
    with (
        answering(mute) as (routes, _),
        in_front(serving, tmp_path, models, routes, program=program) as running,
        ThreadPoolExecutor(4) as pool,
    ):

        def seen_both() -> bool:
            for status, head, answer in pool.map(lambda _: embed(running), range(4)):
                found[status] = refused(head, answer)
            return len(found) > 1

        wait_for(seen_both)
    assert found == {
        429: ("retry rate_limit_error", "rate_limit_exceeded", "this key has too many concurrent requests"),
        504: ("server_error", None, "the server did not answer in time"),
    }


def test_large_bodies_that_find_no_room_are_429(serving: Serving, models: list[ServedModel], tmp_path: Path) -> None:
    """Room for two."""
    wide = [replace(model, text_bytes=4 * 2**20) for model in models]
    body = json.dumps({"model": "sentence", "input": "a" * 3 * 2**20}).encode()
    found: dict[int, tuple[str, str | None, str]] = {}
    with in_front(serving, tmp_path, wide, room_mib=8) as running:

        def send(_: int) -> None:
            with contextlib.suppress(ValueError):  # closed before the caller had read why
                status, head, answer = embed(running, body=body)
                found[status] = refused(head, answer)

        with ThreadPoolExecutor(8) as pool:
            wait_for(lambda: list(pool.map(send, range(8))) and len(found) > 1)
    assert found.keys() == {400, 429}
    assert found[400][2].endswith("(max_bytes)")
    no_room = "no memory for another large request; try again"
    assert found[429] == ("retry rate_limit_error", "rate_limit_exceeded", no_room)


def test_without_a_model_that_takes_texts_it_is_404_until_there_is_one(
    serving: Serving, models: list[ServedModel], tmp_path: Path
) -> None:
    without = [replace(model, text_bytes=0) for model in models]
    with in_front(serving, tmp_path, without) as running, client_of(running) as client:
        with pytest.raises(openai.NotFoundError, match="not served here: no model takes texts"):
            client.models.list()
        status, head, answer = embed(running)
        assert (status, refused(head, answer)[:2]) == (404, ("invalid_request_error", "unknown_url"))
        assert embed(running, key="")[0] == 401
        (running.folder / "limits.conf").write_text(limits(models))
        wait_for(lambda: embed(running)[0], lambda found: found == 200)


def test_the_routes_share_the_servers_memory_on_a_cpu_and_have_their_own_on_a_gpu(models: list[ServedModel]) -> None:
    texts, without = replace(models[0], text_bytes=1), replace(models[0], text_bytes=0)
    assert server_sizes([texts]).memory_mib == server_sizes([without]).memory_mib + OPENAI_MIB
    on_gpu, gpu_without = (server_sizes([replace(model, needs_gpu=True)]) for model in (texts, without))
    assert on_gpu.memory_mib == gpu_without.memory_mib
    assert (on_gpu.openai_mib, gpu_without.openai_mib) == (OPENAI_MIB, 0)
