"""Paths of artifacts, and atomic writes."""

import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from deepseek_client.cli.commands import _write

from deepseek.spec.files.folders import scratch_in, write_whole
from export.artifact import staged
from export.graphs.graph_file import save_graph
from export.rows import Row, row_digest, save_arrays
from serving.embedded.verified_repository import _stamp
from serving.repository.archive import pack
from tests.conftest import Refused

OWNER = """
import sys, time
from pathlib import Path
from deepseek.spec.files.folders import scratch_in, write_whole
with scratch_in(Path(sys.argv[1])):
    print("there", flush=True)
    time.sleep(60)
"""


def test_a_scratch_folder_stays_while_its_owner_runs_and_is_removed_after_a_kill(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with scratch_in(tmp_path) as mine:
            assert len(list(tmp_path.iterdir())) == 2
            with staged(mine / "nested.txt") as path:
                path.write_text("in a scratch folder of a scratch folder")
        assert len(list(tmp_path.iterdir())) == 1
        owner.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # a zombie: ended, but still in /proc
        with scratch_in(tmp_path) as mine:
            assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [save_arrays, _write], ids=["export", "client"])
def test_a_tensor_may_have_any_name(write: Callable[[Path, dict[str, np.ndarray]], None], tmp_path: Path) -> None:
    arrays = {name: np.full((1, 2), place) for place, name in enumerate(("file", "allow_pickle"))}
    write(tmp_path / "x.npz", arrays)
    with np.load(tmp_path / "x.npz") as read:
        assert {name: read[name].tolist() for name in read} == {"file": [[0, 0]], "allow_pickle": [[1, 1]]}


def test_external_weights_replace_those_of_the_earlier_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.graphs.graph_file.EXTERNAL_DATA_BYTES", 1000)
    data = tmp_path / "trial.onnx.data"
    for seed in range(3):
        weights = np.random.default_rng(seed).standard_normal((32, 32)).astype(np.float32)
        graph = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 20]> g (float[n, 32] x) => (float[n, 32] y) { y = MatMul(x, w) }'
        )
        graph.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
        save_graph(graph, tmp_path / "trial.onnx")
        assert data.stat().st_size == weights.nbytes
        (read,) = onnx.load(tmp_path / "trial.onnx").graph.initializer
        assert np.array_equal(onnx.numpy_helper.to_array(read), weights)
    graph.graph.ClearField("initializer")
    save_graph(graph, tmp_path / "trial.onnx")
    assert not data.exists()


def test_the_error_for_a_missing_artifact_names_the_command_that_makes_it(tmp_path: Path, refused: Refused) -> None:
    model = ("--models", "tests/models", "--model", "image")
    said = refused("quantize", *model, "--precision", "int8", DEEPSEEK_BUILD=str(tmp_path))
    assert said.endswith("; make it with: deepseek to-onnx --model image --models tests/models\n")
    said = refused("to-tensorrt", *model, "--precision", "fp32", DEEPSEEK_BUILD=str(tmp_path))
    assert said.endswith("; make it with: make engine MODEL=image MODELS=tests/models PRECISION=fp32\n")


def test_rows_that_differ_only_in_shape_or_type_are_different() -> None:
    values = np.zeros((1, 8), np.int64)
    rows: list[Row] = [{"x": values}, {"x": values.reshape(1, 2, 4)}, {"x": values.view(np.float64)}, {"y": values}]
    assert len(set(map(row_digest, rows))) == 4
    assert row_digest({"x": values.copy()}) == row_digest(rows[0])


def test_a_pipe_and_what_lies_under_dev_are_written_in_place(tmp_path: Path) -> None:
    """As root, replacing /dev/null would make it a file for every process."""
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with file.open("w") as opened:
        write_whole(pipe, "to a pipe")
        write_whole(Path(f"/dev/fd/{opened.fileno()}"), "to a redirected output")
    assert (os.read(reader, 100), pipe.is_fifo(), file.read_text()) == (b"to a pipe", True, "to a redirected output")
    os.close(reader)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "repository" / "text").mkdir(parents=True)
    (tmp_path / "repository" / "text" / "config.pbtxt").touch()
    pack(tmp_path / "repository", archive := tmp_path / "packed" / "models.tar.gz")
    before = archive.read_bytes()
    (tmp_path / "repository" / "text" / "labels.txt").symlink_to("gone")
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "repository", archive)
    assert [(path.name, path.read_bytes()) for path in archive.parent.iterdir()] == [("models.tar.gz", before)]


def test_a_version_that_is_a_link_to_a_folder_is_packed_and_watched_like_any(tmp_path: Path) -> None:
    model = tmp_path / "repository" / "text"
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "model.onnx").write_bytes(b"graph")
    model.mkdir(parents=True)
    (model / "config.pbtxt").touch()
    (model / "1").symlink_to(tmp_path / "stored")
    pack(tmp_path / "repository", tmp_path / "models.tar.gz")
    with tarfile.open(tmp_path / "models.tar.gz") as tar:
        assert tar.getnames() == ["text", "text/1", "text/1/model.onnx", "text/config.pbtxt"]
    before = _stamp(model)
    assert [name for name, *_ in before] == ["1/model.onnx", "config.pbtxt"]
    (tmp_path / "stored" / "model.onnx").write_bytes(b"another")
    assert _stamp(model) != before
