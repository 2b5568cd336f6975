"""The experiments of tests/bench/failure, each in a few seconds on one shared service, and their parts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from deepseek.spec import DeploymentSpec
from loadtests.load.request_log import RequestLog, SentRequest
from tests.bench.claims import Row
from tests.bench.failure.killed import server_killed
from tests.bench.failure.malformed import Tally, malformed_requests
from tests.bench.failure.mutations import MUTATIONS, Mutation, valid
from tests.bench.failure.setting import Model, Service, Setting
from tests.conftest import Refused
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
    sizes = {"overload_s": 5, "requests": 200, "watch_s": 1.0}
    with Service(folder / "shared", built / "repository", Path("tests/models")) as shared:
        yield Setting(model=models[0], other=models[1], shared=shared, **where, **sizes)  # type: ignore[arg-type]


def broken(rows: list[Row]) -> list[str]:
    return [f"{row.what}: {row.seen}" for row in rows if row.holds is False]


@pytest.mark.slow
def test_malformed_requests_are_refused_and_crash_no_process(setting: Setting) -> None:
    rows = malformed_requests(setting)
    assert broken(rows) == []
    assert sum(row.what.startswith("100 malformed requests") for row in rows) == 2


# -- requests that the gateway accepts or refuses ------------------------------------------------


IDS = [101, 7, 102]
TEXT: dict[str, list[dict]] = {
    "inputs": [
        {"name": "input_ids", "shape": [1, 3], "datatype": "INT64", "data": IDS},
        {"name": "attention_mask", "shape": [1, 3], "datatype": "INT64", "data": [1, 1, 1]},
    ]
}


def text(**changes: object) -> str:
    """A request as JSON, with changes."""
    return json.dumps({**TEXT, **changes})


def ids(**changes: object) -> str:
    """A request with changes to its first input."""
    return text(inputs=[{**TEXT["inputs"][0], **changes}, TEXT["inputs"][1]])


def with_id(id_: str) -> str:
    """A request with an id given as raw text."""
    return json.dumps({"id": 0, **TEXT}).replace("0", id_, 1)


SIZES, VALUES = "must be a list of sizes", "must be a list of values of INT64"
TWICE, HALF = "a name occurs twice", "half a surrogate pair"  # of two values, Triton would take the first


@pytest.mark.parametrize(
    ("document", "status", "says"),
    [
        (text(), 200, "embedding"),
        (text(id="7", parameters={"timeout": 5_000_000, "priority": 0, "note": "x", "share": 0.5}), 200, "embedding"),
        (text(id="a text: .5, 01, 1."), 200, "embedding"),
        (text(outputs=[{"name": "embedding", "parameters": {"binary_data": True}}]), 200, "embedding"),
        (ids(data=[IDS]), 200, "embedding"),
        *((with_id(id_), 200, "embedding") for id_ in (r'"\ud83d\ude00"', r'"\\ud83d"', r'"\\\ud83d\ude00\""', r'"\"id\": : \\"')),
        *((text(parameters={"x": "?"}).replace('"?"', number), 400, "") for number in ("01", "-01", ".5", "-.5", "1.", "1.e1", "1NaN", "Inf1")),
        (ids(shape=[1, 2**40]), 400, "values by its shape"),
        (ids(shape=[2**62, 2**62]), 400, SIZES),
        (ids(shape=[1, -3]), 400, SIZES),
        (ids(data="x"), 400, VALUES),
        (ids(data=[1.5, 2, 3]), 400, VALUES),
        (ids(datatype="INT32", data=[1, 2, -(2**31) - 1]), 400, "values of INT32"),  # Triton would take 2**31 - 1
        (ids(datatype="UINT8", data=[1, 2, -1]), 400, "values of UINT8"),
        (ids(datatype="FP32", data=[1, 2, 1e39]), 400, "values of FP32"),
        *((ids(datatype=each), 400, '"datatype\\" must be one of BYTES, BOOL') for each in ("INT64\0", "int64")),
        (ids(data=[[[[1, 2, 3], 4]]]), 400, "4 in"),
        (with_id('"7", "id": "8"'), 400, TWICE),
        (with_id('"7", "parameters": {"priority": 0, "pri\\u006frity": 0}'), 400, TWICE),
        *((with_id(id_), 400, HALF) for id_ in (r'"\ud83d"', r'"\ud83d\\\ude00"', r'"\ude00"', r'"\ud83d\ud83d\ude00"', r'"\ud83dx\ude00"', r'"\"\ud83d"')),
        ("", 400, "Unexpected end of input"),
    ],
    ids=str,
)  # fmt: skip
def test_the_gateway_forwards_valid_requests_and_explains_the_others(
    setting: Setting, document: str, status: int, says: str
) -> None:
    assert setting.shared is not None
    answer = setting.shared.gateway.http("POST", "/v2/models/text/infer", body=document.encode())
    assert (answer[0], says in answer[1].decode(errors="replace")) == (status, True), answer


def test_the_gateway_forwards_nan_and_infinity(setting: Setting) -> None:
    assert setting.shared is not None
    numbers = ",".join(["NaN", "-Infinity", "0"] * 1024)
    document = f'{{"inputs":[{{"name":"pixels","shape":[1,3,32,32],"datatype":"FP32","data":[{numbers}]}}]}}'
    status, answer = setting.shared.gateway.http("POST", "/v2/models/image/infer", body=document.encode())
    assert status == 200, answer


MANY = (  # strings, pairs, escapes, quotes, and numbers that JSON does not have
    ("BYTES", '"a"', 200_000),
    ("BYTES", '"' + r"\u00e9\ud83d\ude00" * 100_000 + '"', 1),
    ("BYTES", '"' + r"\\" * 250_000 + r'\u00e9"', 1),
    ("BYTES", '"' + r"\"" * 250_000 + '"', 1),
    ("FP32", "NaN", 200_000),
)


def test_large_bodies_are_checked_and_have_their_own_errors(tmp_path: Path) -> None:
    skip_without_nginx()
    text = (
        "client_max_body_size 9m;\nclient_body_buffer_size 1m;\njs_var $default_rate_rps 100;\njs_var $buckets_s '1';\n"
    )
    gateway = Gateway(tmp_path, text, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    try:
        large = {"x": np.zeros((2, 100_000), np.float64)}
        method, path, headers, body = valid("any", large, binary=True).over_http()
        lines = [f"{name}: {value}" for name, value in headers.items()]
        assert gateway.http(method, path, *lines, body=body)[0] == 503  # there is no server behind the gateway
        assert gateway.http(method, path, *lines, body=body[:-4])[0] == 400
        assert gateway.http(method, path, *lines, body=body * 7)[0] == 413
        for kind, value, count in MANY:  # njs must not take minutes
            tensor = f'"name": "x", "datatype": "{kind}", "shape": [{count}], "data": [{", ".join([value] * count)}]'
            assert gateway.http(method, path, body=f'{{"inputs": [{{{tensor}}}]}}'.encode())[0] == 503
        names = ", ".join(f'"{number}": 1' for number in range(10_001))
        answer = gateway.http(method, path, body=f'{{"inputs": [], "parameters": {{{names}}}}}'.encode())
        assert b"more than 10000 names" in answer[1]
    finally:
        gateway.stop()


# -- experiments ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_client_that_retries_loses_no_call_when_the_server_is_killed(setting: Setting) -> None:
    rows = server_killed(setting)
    assert broken([row for row in rows if "until it is ready" not in row.what]) == []


# -- parts of the experiments --------------------------------------------------------------------


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_each_mutation_changes_the_request_and_is_reproducible(mutation: Mutation) -> None:
    for protocol, binary in itertools.product(mutation.protocols, (False, True)):
        made = []
        for apply in (lambda *_: None, mutation.apply, mutation.apply):
            draft = valid("text", ROW, binary=binary)
            apply(Random(mutation.name), draft)
            made.append(draft.over_http() if protocol == "http" else draft.over_grpc())
        assert made[0] != made[1] == made[2]


@pytest.mark.parametrize(
    ("status", "may_pass", "right"),
    [("400", False, True), ("500", False, False), ("200", False, False), ("200", True, True), ("no answer", True, False),
     ("INVALID_ARGUMENT", False, True), ("INTERNAL", True, False), ("OK", True, True)],
)  # fmt: skip
def test_an_answer_is_right_if_it_is_a_client_error(status: str, may_pass: bool, right: bool) -> None:
    tally = Tally("http by gateway")
    tally.add(1, status, "reason", mutation="x", may_pass=may_pass)
    assert (not tally.wrong) == right


def test_latencies_count_from_the_planned_time() -> None:
    log = RequestLog([SentRequest(0.0, 0.5, 1.0, None), SentRequest(1.0, 1.0, 1.1, "ServerBusy: full")])
    assert log.answered.latency_ms(99) == 1000
    assert log.failed.latency_ms(99) == pytest.approx(100)
    assert log.lag_ms(99) == 500
    assert (log.errors, log.messages) == ({"ServerBusy": 1}, ["ServerBusy: full"])


def test_a_model_that_is_not_built_is_one_line(tmp_path: Path, refused: Refused) -> None:
    skip_without_nginx()
    assert "make engine MODEL=" in refused("measure-failure", "--only", "soak", DEEPSEEK_BUILD=str(tmp_path))
