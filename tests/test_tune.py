"""The search for better settings on real servers of a model for which batching is known to help."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from deepseek.spec import FileDigest, Manifest, TunedBatching, TunedFile, TunedTarget
from export.artifact import save_rows, write_manifest
from loadtests.journal import Journal
from loadtests.tune import _tuned_file, check_writable, parse, tune
from loadtests.tuning import Tuning
from tests.conftest import run_module

# Each batch reads 128 MB of weights, whatever its size: batches of 8 are several times as fast as batches of 1.
WIDTH, LAYERS = 2048, 8
DEPLOY = """
name = "wide"
tuned = "tuned.toml"
[inputs.x]
dtype = "float32"
shape = ["batch", 2048]
[outputs.y]
dtype = "float32"
shape = ["batch", 2048]
[axes.batch]
min = 1
opt = 4
max = 8
[batching]
max_batch = 1
[slo]
max_error_rate = 0.05
"""
# Coarse: what is to be found is a factor of 3.
SPACE = ("--max-batch", "1,8", "--delay-us", "0", "--instances", "2", "--threads", "1")
QUICK = (*SPACE, "--least-s", "1", "--warmup-s", "0", "--resolution", "1.4", "--pairs", "3")


def write_graph(path: Path) -> None:
    """y = x W1 W2 ..."""
    generator = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for layer in range(LAYERS):
        weight = generator.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        result = "y" if layer == LAYERS - 1 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [result]))
        name = result
    ends = [helper.make_tensor_value_info(each, TensorProto.FLOAT, ["batch", WIDTH]) for each in ("x", "y")]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/wide`, which is served in batches of 1 unless tuned, and its `build/`."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "models" / "wide").mkdir(parents=True)
    (folder / "models" / "wide" / "deploy.toml").write_text(DEPLOY)
    place = folder / "build" / "wide" / "fp32"
    place.mkdir(parents=True)
    write_graph(place / "model.onnx")
    digest = FileDigest.of(place / "model.onnx")
    facts = {"precision": "fp32", "found": {}, "sources": {}, "versions": {}, "build_s": 0}
    size = {"size_bytes": digest.size_bytes, "axes": {"batch": {"min": 1, "opt": 4, "max": 8}}}
    write_manifest(place / "manifest.json", Manifest(model="wide", files={"model.onnx": digest}, **facts, **size))
    rows = [{"x": np.full((1, WIDTH), 0.1, np.float32)}]
    save_rows(folder / "build" / "wide" / "evaluation.npz", rows)
    return folder


def flags(wide: Path, *more: str) -> list[str]:
    """Of a short search over the model `wide`, which is only there in fp32."""
    return ["--models", str(wide / "models"), "--model", "wide", "--precision", "fp32", *QUICK, *more]


def journal_of(wide: Path) -> Path:
    return wide / "build" / "wide" / "tuning" / "journal.jsonl"


def processes_over(folder: Path) -> list[str]:
    """Command lines of running processes that name the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if str(folder) in line]


@pytest.fixture(scope="module")
def killed(wide: Path) -> Path:
    """The same after a search that was killed outright, with one setting measured and another under way."""
    command = [sys.executable, "-m", "loadtests.tune", *flags(wide)]
    environment = {**os.environ, "BUILD": str(wide / "build")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        ends_at = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < ends_at:
            if journal_of(wide).exists() and '"tried"' in journal_of(wide).read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, said
    return wide


@pytest.fixture(scope="module")
def found(killed: Path) -> Tuning:
    """What the same command finds afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUILD", str(killed / "build"))
        known = Journal(journal_of(killed), json.loads(journal_of(killed).read_text().splitlines()[0])["facts"])
        result = tune(parse(flags(killed)), Console(file=io.StringIO()))
    (before,) = known.tried.values()
    (after,) = [tried for tried in result.trials if tried.settings == before.settings]
    assert after.model_copy(update={"pareto": False}) == before  # it was not measured again
    assert result.started == known.started
    return result


@pytest.mark.alone
@pytest.mark.slow
def test_a_killed_search_leaves_no_server(killed: Path) -> None:
    ends_at = time.monotonic() + 20
    while processes_over(killed) and time.monotonic() < ends_at:
        time.sleep(0.2)
    assert processes_over(killed) == []


@pytest.mark.alone
@pytest.mark.slow
def test_the_search_goes_on_after_a_kill_and_finds_what_is_better(found: Tuning, wide: Path) -> None:
    assert (found.default.max_batch, found.best and found.best.max_batch) == (1, 8), found
    assert found.gain is not None
    assert (found.gain.of, found.gain.pairs) == ("capacity_rps", 3)
    assert found.gain.low > 1.2
    assert found.applied
    assert not journal_of(wide).exists()
    assert {tried.settings.max_batch for tried in found.trials} == {1, 8}
    assert all(tried.throughput_rps > 0 for tried in found.trials)
    assert 8 in [tried.settings.max_batch for tried in found.trials if tried.pareto]


@pytest.mark.alone
@pytest.mark.slow
def test_what_was_found_is_written_and_used_by_the_next_publish(found: Tuning, wide: Path, tmp_path: Path) -> None:
    values = TunedFile.read(wide / "models" / "wide" / "tuned.toml").targets["onnxruntime"]
    assert values.batching == TunedBatching(max_batch=8, max_queue_delay_us=0, instances=2, threads=1)
    assert str(found.gain) in values.measured
    which = ("--models", str(wide / "models"), "--model", "wide", "--precision", "fp32", "--repository", str(tmp_path))
    assert run_module("export.to_triton", *which, BUILD=str(wide / "build")).returncode == 0
    config = (tmp_path / "wide" / "config.pbtxt").read_text()
    assert "max_batch_size: 8" in config
    assert Tuning.load(wide / "build" / "wide" / "tuning.json") == found


def test_a_file_of_tuned_values_that_cannot_be_read_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    path, console = tmp_path / "tuned.toml", Console(file=io.StringIO())
    path.write_text(broken := "[targets.tensorrt\n")
    check_writable(path, console)
    assert f"it will be kept as {path}.broken, and made anew" in console.file.getvalue()  # type: ignore[attr-defined]
    _tuned_file(path).with_target("onnxruntime", TunedTarget()).write(path)
    assert (tmp_path / "tuned.toml.broken").read_text() == broken
    assert set(TunedFile.read(path).targets) == {"onnxruntime"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-batch", "9"), "--max-batch 9: 1 to 8 are possible"),
        (("--pairs", "1"), "--pairs 1: it must be 2 or more"),
        (("--target", "tensorrt"), "the embedded Triton cannot serve it; give the command of a server that can"),
        (("--precision", "fp16"), "/models PRECISION=fp16"),
        (("--server", "serve {port}"), "the fields are {repository}, {http_port}, {grpc_port}, {metrics_port}"),
        (("--server", "false"), "the default setting is not served: "),
    ],
    ids=["batch", "pairs", "tensorrt", "not built", "fields", "server"],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_line_and_exit_2(wide: Path, more: tuple[str, ...], message: str) -> None:
    run = run_module("loadtests.tune", *flags(wide), *more, BUILD=str(wide / "build"))
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert "Traceback" not in run.stderr
