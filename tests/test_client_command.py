"""The client's command line against a real Triton, and the tables that it prints."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deepseek_client.cli import tables
from deepseek_client.cli.main import main
from deepseek_client.cli.tables import tensor_table
from deepseek_client.metadata import DTYPES
from rich.console import Console

from serving.embedded.launcher import EmbeddedServer
from tests.conftest import RunHere
from tests.failing_servers import protocols, url_of
from tests.fake_kserve import SIGNATURE, http_json, http_serving


@protocols
def test_the_exit_code_of_ready_is_the_readiness(
    server: EmbeddedServer, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--protocol", protocol, "--url", url_of(server, protocol)]
    assert main(["ready", "add_one", *at]) == 0
    assert main(["ready", "absent", *at, "--json"]) == 1
    assert capsys.readouterr().out == 'add_one is ready\n{"ready": false}\n'


def test_metadata_prints_the_signature(server: EmbeddedServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metadata", "add_one", "--url", server.grpc_url]) == 0
    assert "add_one, version 1 (python, batches up to 8)" in capsys.readouterr().out
    assert main(["metadata", "add_one", "--url", server.grpc_url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, -1]}]


def test_infer_reads_a_file_and_writes_the_answer(
    server: EmbeddedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "request.json").write_text('{"x": [[[0.1, 2], [3, 4]]]}')
    files = ["--inputs", str(tmp_path / "request.json"), "--output", str(tmp_path / "answer.npz")]
    assert main(["infer", "add_one", "--url", server.grpc_url, "--json", *files]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = np.array([[[1.1, 3], [4, 5]]], np.float32)
    np.testing.assert_array_equal(np.array(answer["outputs"]["y"], np.float32), expected)
    with np.load(tmp_path / "answer.npz") as written:
        np.testing.assert_array_equal(written["y"], expected)


@pytest.mark.parametrize(("arguments", "code"), [("metadata add_one", 0), ("ready absent", 1)])
def test_a_reader_that_leaves_early_does_not_change_the_exit_code(
    server: EmbeddedServer, arguments: str, code: int
) -> None:
    """As in `... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "deepseek_client", *arguments.split(), "--url", server.grpc_url]
    run = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (run.returncode, run.stderr) == (code, "")


def test_a_terminal_without_utf_8_shows_the_answer(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert main(["ready", "éclair", "--url", server.grpc_url]) == 1
    assert shown.getvalue() == b"?clair is not ready\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        pytest.param("ready --url 127.0.0.1:9", 2, "`make serve` starts one here", id="nothing there"),
        pytest.param("ready --url nowhere", 2, "must be host:port", id="url"),
        pytest.param("ready --timeout-s soon", 2, "--timeout-s: invalid float value: 'soon'", id="time-out"),
        pytest.param("metadata", 2, "required: MODEL", id="no model"),
        pytest.param("metadata absent --url GRPC", 2, "'absent' is not found", id="unknown model"),
        pytest.param("infer add_one --url GRPC --inputs x.csv", 2, "must end in .npz or .json", id="kind of file"),
        pytest.param("infer add_one --url GRPC --inputs absent.npz", 2, "absent.npz: No such file", id="no file"),
        pytest.param("infer slow --url GRPC --inputs x.json --timeout-s 0.05", 1, "did not answer", id="slow"),
        pytest.param("infer add_one --text one --row 1", 2, "--row 1: picks a row of --inputs", id="row of a text"),
        pytest.param("infer add_one --inputs x.json --fill 0", 2, "--fill 0; it must be 1 or more", id="fill"),
    ],
)
def test_command_line_errors_are_one_line(
    server: EmbeddedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text('{"x": [[[0], [0]]]}')
    try:
        status = main(arguments.replace("GRPC", server.grpc_url).split())
    except SystemExit as exit:
        status = int(exit.code or 0)
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (code, 1)
    assert says in error


def shown(arrays: dict[str, np.ndarray], labels: tables.Labels, top: int, *, last: bool = False) -> list:
    """The cells of each line of the table."""
    console = Console(width=100)
    with console.capture() as capture:
        console.print(tensor_table(arrays, labels, top, batched=True, last=last))
    lines = (line for line in capture.get().splitlines() if line.startswith(("┃", "│")))
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]


def test_titles_and_scores_stay_aligned_if_a_title_is_missing() -> None:
    outputs = {"items": np.array([[1, 0, 2, 0]]), "scores": np.array([[0.5, 0.25, 0.125, 0]], np.float32)}
    assert ["third", "0.1250"] in shown(outputs, {"items": ["", "first", "third"]}, 10)


def test_padding_at_both_ends_of_an_input_is_not_shown() -> None:
    inputs = {"ids": np.array([[1, 2, 0, 1, 0, 0]]), "mask": np.array([[1, 1, 1, 1, 0, 0]])}
    lines = shown(inputs, {"ids": ["", "one", "two"], "mask": ["", "1"]}, 3, last=True)
    assert lines[-3:] == [["two", "1"], ["", "1"], ["one", "1"]]


TITLES = ["", *(f"Film [{k}]" for k in range(1, 8)), "[rec] (2007)"]  # shown unchanged, though [ ] is rich's markup


def test_a_request_shows_its_latest_titles_and_an_answer_its_best_ones() -> None:
    lines = shown({"ids": np.array([[0, 0, 3, 1, 2]])}, {"ids": TITLES}, 2, last=True)
    assert lines == [["ids"], ["last 2"], ["of 3"], ["Film [1]"], ["Film [2]"]]
    outputs = {"items": np.array([[7, 8, 5]]), "scores": np.array([[0.5, 0.25, 1e-9]], np.float32)}
    lines = shown(outputs, {"items": TITLES}, 2)
    assert lines[1:3] == [["first 2", "first 2"], ["of 3", "of 3"]]
    assert lines[-2:] == [["Film [7]", "0.5000"], ["[rec] (2007)", "0.2500"]]


def test_titles_that_the_server_answers_are_not_repeated() -> None:
    outputs = {"items": np.array([[7, 5]]), "titles": np.array([[b"Film [7]", b"Film [5]"]], object)}
    assert shown(outputs, {"items": TITLES}, 2)[-2:] == [["7", "Film [7]"], ["5", "Film [5]"]]


def test_only_the_numbers_that_are_shown_become_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may have millions of numbers."""
    made: list[float] = []

    def text_of(value: float) -> str:
        made.append(value)
        return str(value)

    monkeypatch.setattr(tables, "_value", text_of)
    assert ["of 5000"] in shown({"scores": np.arange(5000.0)[None]}, {}, 3)
    assert made == [0, 1, 2]


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "BF16"])
def test_numbers_that_json_and_numpy_lack_are_shown_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], datatype: str
) -> None:
    numbers = np.array([[1.5, np.nan, -np.inf]], DTYPES[datatype])
    y = {"name": "y", "datatype": datatype, "shape": [1, 3], "parameters": {"binary_data_size": numbers.nbytes}}
    tensors = {
        kind: [{"name": name, "datatype": datatype, "shape": [-1, 3]}]
        for kind, name in (("inputs", "x"), ("outputs", "y"))
    }

    def answer(path: str, body: bytes) -> bytes:
        if path.endswith("/infer"):
            return http_json({"outputs": [y]}, numbers.tobytes())
        return http_json({"max_batch_size": 8} if path.endswith("/config") else SIGNATURE | tensors)

    (tmp_path / "request.json").write_text('{"x": [[1, 2, 3]]}')
    files = ["--inputs", str(tmp_path / "request.json"), "--output", str(tmp_path / "answer.npz")]
    with http_serving(answer) as url:
        assert main(["infer", "m", "--protocol", "http", "--url", url, "--json", *files]) == 0
        told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert main(["infer", "m", "--protocol", "http", "--url", url, *files]) == 0
    assert told["outputs"]["y"] == [[1.5, None, None]]
    assert "1.5000" in capsys.readouterr().out
    with np.load(tmp_path / "answer.npz") as written:
        np.testing.assert_array_equal(written["y"], numbers.astype(written["y"].dtype))


def test_infer_of_a_model_that_was_not_built_says_how_to_build_it(tmp_path: Path, run_here: RunHere) -> None:
    done = run_here("infer", "--model", "minilm", DEEPSEEK_BUILD=str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path}/minilm/evaluation.npz: no such file; build the model first: make engine MODEL" in done.stderr
