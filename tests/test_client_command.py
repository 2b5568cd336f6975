"""The client's command line against a real Triton, and the tables that it prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from deepseek_client.cli import tables
from deepseek_client.cli.main import main
from deepseek_client.cli.tables import answer_table
from rich.console import Console

from serving.embedded.launcher import EmbeddedServer
from tests.test_client_signature import MODEL

both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@both
def test_the_exit_code_of_ready_is_the_readiness(
    server: EmbeddedServer, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--protocol", protocol, "--url", server.http_url if protocol == "http" else server.grpc_url]
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


def test_titles_and_scores_stay_aligned_if_a_title_is_missing() -> None:
    outputs = {"items": np.array([[1, 0, 2, 0]]), "scores": np.array([[0.5, 0.25, 0.125, 0]], np.float32)}
    console = Console(width=100)
    with console.capture() as capture:
        console.print(answer_table(MODEL, {}, outputs, {"items": ["", "first", "third"]}, 10))
    assert [line.split("│")[1:3] for line in capture.get().splitlines() if "third" in line] == [[" third ", " 0.1250 "]]


def test_padding_at_both_ends_of_an_input_is_not_shown() -> None:
    inputs = {"ids": np.array([[1, 2, 0, 1, 0, 0]]), "mask": np.array([[1, 1, 1, 1, 0, 0]])}
    console = Console(width=100)
    with console.capture() as capture:
        console.print(answer_table(MODEL, inputs, {}, {"ids": ["", "one", "two"], "mask": ["", "1"]}, 3))
    rows = [line.split("│")[1:3] for line in capture.get().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [["two", "1"], ["", "1"], ["one", "1"]]


def test_the_table_puts_the_latest_titles_beside_the_best_ones() -> None:
    titles = ["", *(f"Film [{k}]" for k in range(1, 9))]
    inputs = {"ids": np.array([[0, 0, 3, 1, 2]])}
    outputs = {"items": np.array([[7, 8, 5]]), "scores": np.array([[0.5, 0.25, 1e-9]], np.float32)}
    console = Console(width=100)
    with console.capture() as capture:
        console.print(answer_table(MODEL, inputs, outputs, {"ids": titles, "items": titles}, 2))
    lines = [
        [cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in capture.get().splitlines()
    ]
    assert ["last 2 of 3", "first 2 of 3", "first 2 of 3"] in lines
    assert ["Film [1]", "Film [7]", "0.5000"] in lines
    assert ["Film [2]", "Film [8]", "0.2500"] in lines


@pytest.mark.parametrize("title", ["[rec] (2007)", "[/b]"])
def test_a_title_in_brackets_is_shown_unchanged(title: str) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(answer_table(MODEL, {}, {"items": np.array([[1]])}, {"items": ["", title]}, 3))
    assert title in capture.get()


def test_only_the_numbers_that_are_shown_become_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may have millions of numbers."""
    made: list[float] = []

    def text_of(value: float) -> str:
        made.append(value)
        return str(value)

    monkeypatch.setattr(tables, "_value", text_of)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(answer_table(MODEL, {}, {"scores": np.arange(5000.0)[None]}, {}, 3))
    assert "first 3 of 5000" in capture.get()
    assert made == [0, 1, 2]
