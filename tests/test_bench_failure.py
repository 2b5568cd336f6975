"""The experiments of tests/bench/failure, each in a few seconds on one shared service, and what they are made of."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from deepseek_client import InvalidInput

from deepseek.spec import DeploymentSpec, InvalidMeasurement
from tests.bench.failure import machine
from tests.bench.failure.killed import server_killed
from tests.bench.failure.load import Answers, Load
from tests.bench.failure.machine import clock_jumps, disk_full, restart
from tests.bench.failure.malformed import Tally, _pids, malformed_requests
from tests.bench.failure.mutations import Mutation
from tests.bench.failure.mutations_grpc import GRPC, valid_grpc
from tests.bench.failure.mutations_http import HTTP, valid_http
from tests.bench.failure.setting import Model, Row, Service, Setting
from tests.conftest import run_module
from tests.gateway import Gateway, free_port, skip_without_nginx

ROW = {"input_ids": np.arange(9).reshape(1, 9), "attention_mask": np.ones((1, 9), np.int64)}


@pytest.fixture(scope="module")
def setting(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """Two tiny models behind one gateway."""
    folder = tmp_path_factory.mktemp("failure")
    models = [
        Model(spec=DeploymentSpec.of_model(name, "tests/models"), inputs=built / "build" / name / "evaluation.npz")
        for name in ("text", "image")
    ]
    where = {"folder": folder, "repository": built / "repository", "models": Path("tests/models")}
    sizes = {"overload_s": 5, "requests": 400, "connections": 50, "watch_s": 1.0}
    with Service(folder / "shared", built / "repository", Path("tests/models")) as shared:
        yield Setting(model=models[0], other=models[1], shared=shared, **where, **sizes)  # type: ignore[arg-type]


def broken(rows: list[Row]) -> list[str]:
    """The rows that do not hold."""
    return [f"{row.what}: {row.seen}" for row in rows if row.holds is False]


def test_malformed_requests_are_refused_and_end_no_process(setting: Setting) -> None:
    rows = malformed_requests(setting)
    assert broken(rows) == []
    assert sum(row.what.startswith("100 malformed requests") for row in rows) == 4


# -- what the gateway takes and what it does not, one by one -------------------------------------


def asked(gateway: Gateway, model: str, document: object, *headers: str, tail: bytes = b"") -> tuple[int, bytes]:
    """An inference over HTTP by the gateway; a string is sent as it is."""
    text = document.encode() if isinstance(document, str) else json.dumps(document).encode()
    return gateway.http("POST", f"/v2/models/{model}/infer", *headers, body=text + tail)


IDS = [101, 7, 102]
TEXT: dict[str, list[dict]] = {
    "inputs": [
        {"name": "input_ids", "shape": [1, 3], "datatype": "INT64", "data": IDS},
        {"name": "attention_mask", "shape": [1, 3], "datatype": "INT64", "data": [1, 1, 1]},
    ]
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"id": "7", "parameters": {"timeout": 5_000_000, "priority": 0, "note": "x", "share": 0.5}},
        {"id": "a text: .5, 01, 1."},
        {"outputs": [{"name": "embedding", "parameters": {"binary_data": True}}]},
        {"inputs": [{**TEXT["inputs"][0], "data": [IDS]}, TEXT["inputs"][1]]},
    ],
    ids=["plain", "parameters", "numbers in a string", "binary output", "nested data"],
)
def test_the_gateway_hands_on_what_the_protocol_has(setting: Setting, changes: dict) -> None:
    assert setting.shared is not None
    status, answer = asked(setting.shared.gateway, "text", {**TEXT, **changes})
    assert (status, b"embedding" in answer) == (200, True), answer


def test_the_gateway_hands_on_numbers_that_are_none(setting: Setting) -> None:
    assert setting.shared is not None
    numbers = ",".join(["NaN", "-Infinity", "0"] * 1024)
    text = f'{{"inputs":[{{"name":"pixels","shape":[1,3,32,32],"datatype":"FP32","data":[{numbers}]}}]}}'
    status, answer = asked(setting.shared.gateway, "image", text)
    assert status == 200, answer


@pytest.mark.parametrize("number", ["01", "-01", ".5", "-.5", "1.", "1.e1"])
def test_the_gateway_refuses_numbers_that_json_does_not_have(setting: Setting, number: str) -> None:
    """Triton before 26.05 answers them with 500."""
    assert setting.shared is not None
    text = json.dumps({**TEXT, "parameters": {"share": "?"}}).replace('"?"', number)
    assert asked(setting.shared.gateway, "text", text)[0] == 400


def test_a_large_body_is_looked_at_too_and_has_its_own_errors(tmp_path: Path) -> None:
    skip_without_nginx()
    text = (
        "client_max_body_size 9m;\nclient_body_buffer_size 1m;\njs_var $default_rate_rps 100;\njs_var $buckets_s '1';\n"
    )
    gateway = Gateway(tmp_path, text, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    try:
        large = {"x": np.zeros((2, 100_000), np.float64)}
        method, path, headers, body = valid_http("any", large, binary=True).encoded()
        lines = [f"{name}: {value}" for name, value in headers.items()]
        assert gateway.http(method, path, *lines, body=body)[0] == 503  # there is no server to hand it on to
        assert gateway.http(method, path, *lines, body=body[:-4])[0] == 400
        assert gateway.http(method, path, *lines, body=body * 7)[0] == 413
    finally:
        gateway.stop()


@pytest.mark.parametrize(
    ("shape", "data", "says"),
    [
        ([1, 2**40], IDS, b"values by its shape"),
        ([2**62, 2**62], IDS, b"must be a list of sizes"),
        ([1, -3], IDS, b"must be a list of sizes"),
        ([1, 3], "x", b"must be a list of values of INT64"),
        ([1, 3], [1.5, 2, 3], b"must be a list of values of INT64"),
        ([1, 3], [[[[1, 2, 3], 4]]], b"4 in"),
    ],
)
def test_the_gateway_says_what_is_wrong(setting: Setting, shape: list, data: object, says: bytes) -> None:
    assert setting.shared is not None
    wrong = {**TEXT["inputs"][0], "shape": shape, "data": data}
    status, answer = asked(setting.shared.gateway, "text", {"inputs": [wrong, TEXT["inputs"][1]]})
    assert (status, says in answer) == (400, True), answer


@pytest.mark.parametrize(
    ("id_", "says"),
    [
        ('"7", "id": "8"', b"a name comes twice"),
        ('"7", "parameters": {"priority": 0, "pri\\u006frity": 0}', b"a name comes twice"),
        (r'"\ud83d"', b"half a character"),
        (r'"\ud83d\\\ude00"', b"half a character"),
        (r'"\ude00"', b"half a character"),
    ],
)
def test_the_gateway_refuses_what_triton_reads_otherwise(setting: Setting, id_: str, says: bytes) -> None:
    """Of a name that comes twice, Triton takes the first value: a size that is not looked at would end it."""
    assert setting.shared is not None
    status, answer = asked(setting.shared.gateway, "text", json.dumps({"id": 0, **TEXT}).replace("0", id_, 1))
    assert (status, says in answer) == (400, True), answer


def test_the_gateway_refuses_an_empty_body(setting: Setting) -> None:
    assert setting.shared is not None
    for headers in ((), ("Content-Length: 0",)):
        assert setting.shared.gateway.http("POST", "/v2/models/text/infer", *headers)[0] == 400


def test_the_gateway_hands_on_strings_that_look_wrong_and_are_not(setting: Setting) -> None:
    assert setting.shared is not None
    for id_ in (r'"\ud83d\ude00"', r'"\\ud83d"', r'"\"id\": : \\"'):
        status, answer = asked(setting.shared.gateway, "text", json.dumps({"id": 0, **TEXT}).replace("0", id_, 1))
        assert status == 200, answer


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        (9, 5, "axis length is 5, in input_ids it is 9"),
        (9, 9, "99999"),
    ],
    ids=["inputs that do not fit each other", "an id out of the vocabulary"],
)
def test_a_request_that_the_model_cannot_take_is_the_callers_fault(
    setting: Setting, ids: int, mask: int, says: str
) -> None:
    assert setting.shared is not None
    row = {"input_ids": np.full((1, ids), 99999 if ids == mask else 3), "attention_mask": np.ones((1, mask), np.int64)}
    with setting.shared.client() as client, pytest.raises(InvalidInput, match=says):
        client.infer("text", row)


# -- experiments ---------------------------------------------------------------------------------


def test_a_client_that_retries_loses_nothing_over_a_server_that_is_killed(setting: Setting) -> None:
    rows = server_killed(setting)
    assert broken([row for row in rows if "until it is ready" not in row.what]) == []


@pytest.mark.slow
@pytest.mark.usefixtures("build")
def test_a_full_disk_leaves_the_repository_whole_and_the_server_serving(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SERVED_S", 60.0)
    rows = disk_full(setting)
    if "not run" in rows[0].seen:
        pytest.skip(rows[0].seen)
    assert broken(rows) == []


def test_a_server_that_does_not_start_on_the_full_disk_does_not_hold() -> None:
    service = Mock(spec=Service)
    service.start.side_effect = InvalidMeasurement("the server did not start: no space")
    row = restart(service, "text", 2)
    assert (row.holds, row.seen) == (False, "the server did not start: no space")


@pytest.mark.slow
def test_a_clock_that_jumps_disturbs_nobody(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "JUMP_WATCH_S", 2.0)  # until libfaketime has looked
    monkeypatch.setattr(machine, "RATE", 5)
    rows = clock_jumps(setting)
    if "not run" in rows[0].seen:
        pytest.skip(rows[0].seen)
    assert broken([row for row in rows if "p99" not in row.what]) == []


# -- what they are made of -----------------------------------------------------------------------


@pytest.mark.parametrize("mutation", HTTP, ids=lambda each: each.name)
def test_a_malformed_request_over_http_is_another_one_and_the_same_each_time(mutation: Mutation) -> None:
    for binary in (False, True):
        made = []
        for _ in range(2):
            random, draft = Random(mutation.name), valid_http("text", ROW, binary=binary)
            mutation.apply(random, draft)
            made.append(draft.encoded())
        assert made[0] == made[1] != valid_http("text", ROW, binary=binary).encoded()


@pytest.mark.parametrize("mutation", GRPC, ids=lambda each: each.name)
def test_a_malformed_message_is_another_one_and_the_same_each_time(mutation: Mutation) -> None:
    made = []
    for _ in range(2):
        random, draft = Random(mutation.name), valid_grpc("text", ROW, raw=True)
        mutation.apply(random, draft)
        made.append(draft.encoded())
    assert made[0] == made[1] != valid_grpc("text", ROW, raw=True).encoded()


@pytest.mark.parametrize(
    ("status", "may_pass", "right"),
    [("400", False, True), ("500", False, False), ("200", False, False), ("200", True, True), ("no answer", True, False),
     ("INVALID_ARGUMENT", False, True), ("INTERNAL", True, False), ("OK", True, True)],
)  # fmt: skip
def test_an_answer_is_judged_by_whose_fault_it_says_it_is(status: str, may_pass: bool, right: bool) -> None:
    tally = Tally("http by gateway")
    tally.add(1, Mutation(name="x", apply=lambda *_: None, may_pass=may_pass), status, "reason")
    assert (not tally.wrong and not tally.known) == right


def test_a_load_sends_all_that_its_shape_has(setting: Setting) -> None:
    assert setting.shared is not None
    right = setting.stream(setting.shared, "http", "30x2", setting.other)
    with Load([right]) as load:
        answers = load.wait()[right.name]
    assert len(answers) == len(answers.kept) == 60
    assert answers.latency_ms(50) > 0


def test_latencies_count_from_the_planned_time() -> None:
    answers = Answers(
        np.array([0.0, 1.0]), np.array([0.5, 1.0]), np.array([1.0, 1.1]), np.array(["", "ServerBusy"]), {}
    )
    assert answers.kept.latency_ms(99) == 1000
    assert answers.failed.latency_ms(99) == pytest.approx(100)
    assert answers.kinds == {"ServerBusy": 1}


def test_what_is_not_built_is_one_line(tmp_path: Path) -> None:
    skip_without_nginx()
    run = run_module("tests.bench.failure", "--only", "cut", BUILD=str(tmp_path))
    assert run.returncode == 2
    assert "make engine MODEL=" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_process_that_ends_while_it_is_looked_at_is_none_of_the_servers() -> None:
    child = subprocess.Popen(["sleep", "60"])
    found = psutil.Process(child.pid)
    service: Any = SimpleNamespace(processes=lambda: [found, psutil.Process()])
    assert _pids(service) == {child.pid, os.getpid()}
    child.kill()
    child.wait()
    assert _pids(service) == {os.getpid()}
