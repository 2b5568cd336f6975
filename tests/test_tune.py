"""The command `tune`: candidates on real servers, and the files that a search over computed servers writes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from rich.console import Console

from cli.commands import BY_NAME
from cli.main import values_of
from deepseek.spec import DeploymentSpec, FileDigest, InputError, Manifest, TunedBatching, TunedFile
from deepseek.spec.cpu import this_cpu
from deepseek.spec.files.measured_batches import read_measured
from export.artifact import write_manifest
from export.rows import save_rows
from loadtests.search.local_server import EMBEDDED
from loadtests.tune.candidate_server import candidate_server
from loadtests.tune.predicted_latency import Curves
from loadtests.tune.search_space import ServingSettings
from loadtests.tune.tune import conditions_of, default_and_space, table, tune
from loadtests.tune.tune_result import TuneResult, tuning_path
from tests.test_settings_search import FAST, SLOW, a_search, serving

WIDTH = 8
DEPLOY = f"""
name = "wide"
tuned = "tuned.toml"
[inputs.x]
dtype = "float32"
shape = ["batch", {WIDTH}]
[outputs.y]
dtype = "float32"
shape = ["batch", {WIDTH}]
[axes.batch]
min = 1
opt = 4
max = 8
[batching]
preferred_batch = 1
[slo]
max_error_rate = 0.05
"""
SPACE = ("--max-batch", "1,8", "--delay-us", "0", "--instances", "2", "--threads", "1")
QUICK = (*SPACE, "--least-s", "1", "--warmup-s", "0")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/wide`, y = x W, which is served in batches of 1 unless tuned, and its `build/`."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "models" / "wide").mkdir(parents=True)
    (folder / "models" / "wide" / "deploy.toml").write_text(DEPLOY)
    place = folder / "build" / "wide" / "fp32"
    place.mkdir(parents=True)
    weight = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "w")
    ends = [helper.make_tensor_value_info(each, TensorProto.FLOAT, ["batch", WIDTH]) for each in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "wide", ends[:1], ends[1:], [weight])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), place / "model.onnx")
    digest = FileDigest.of(place / "model.onnx")
    facts = {"precision": "fp32", "found": {}, "sources": {}, "versions": {}, "build_s": 0}
    size = {"size_bytes": digest.size_bytes, "axes": {"batch": {"min": 1, "opt": 4, "max": 8}}}
    write_manifest(place / "manifest.json", Manifest(model="wide", files={"model.onnx": digest}, **facts, **size))
    save_rows(folder / "build" / "wide" / "evaluation.npz", [{"x": np.full((1, WIDTH), 0.1, np.float32)}])
    return folder


def flags(wide: Path, *more: str) -> list[str]:
    """The options of a short search over the model `wide`, which is published only in fp32."""
    return ["--models", str(wide / "models"), "--model", "wide", "--precision", "fp32", *QUICK, *more]


@pytest.mark.slow
def test_a_candidate_is_published_and_served_with_its_settings(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(wide / "build"))
    conditions = conditions_of(values_of("tune", *flags(wide)), wide / "served", Console(file=io.StringIO()))
    settings = ServingSettings(max_batch=4, max_queue_delay_us=0, instances=2, threads=1)
    with candidate_server(settings, conditions, "candidate") as server:
        served = server.runner.served
        assert (served.max_batch_size, served.preferred_batch_sizes) == (8, (4,))
        assert server.runner.served.parameters["precision"] == "fp32"
        assert server.throughput_rps() > 0
        assert 0 < server.p99_ms(20, seed=0) < 5000
    assert [path.name for path in conditions.folder.iterdir()] == ["runs"]


@pytest.mark.slow
def test_layouts_that_run_as_many_batches_at_once_share_a_measured_curve(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(wide / "build"))
    conditions = conditions_of(values_of("tune", *flags(wide)), wide / "curves", Console(file=io.StringIO()))
    cores = this_cpu().cores
    layouts = [ServingSettings(max_batch=8, max_queue_delay_us=0, instances=n * cores, threads=1) for n in (1, 2)]
    curves = Curves.measured(conditions, layouts, cores)
    assert curves is not None
    ((key, curve),) = curves.of.items()
    assert (key, curve.instances, curve.precision) == ((cores, 1), cores, "fp32")
    assert curves.sizes == [1, 2, 4, 8]
    assert list((wide / "curves").iterdir()) == []
    assert read_measured("wide", "onnxruntime") is None  # the build's own measurement stays as it is


def servers_over(folder: Path) -> list[str]:
    """Command lines of running servers over the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if str(folder) in line and "{repository}" not in line and " tune " not in line]


@pytest.mark.slow
def test_a_killed_search_leaves_no_server(wide: Path) -> None:
    command = [sys.executable, "-m", "cli", "tune", *flags(wide, "--dry-run")]
    environment = {**os.environ, "DEEPSEEK_BUILD": str(wide / "build")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        ends_at = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < ends_at and not servers_over(wide):
            time.sleep(0.1)
        assert servers_over(wide)
        process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, said
    ends_at = time.monotonic() + 60
    while servers_over(wide) and time.monotonic() < ends_at:
        time.sleep(0.2)
    assert servers_over(wide) == []


def over_computed_servers(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a search over a copy of the model `image`, on computed servers."""
    patch.setenv("DEEPSEEK_BUILD", str(folder / "build"))
    (folder / "models" / "image").mkdir(parents=True)
    deploy = Path("tests/models/image/deploy.toml").read_text()
    (folder / "models" / "image" / "deploy.toml").write_text(f'tuned = "tuned.toml"\n{deploy}')
    patch.setattr("loadtests.tune.tune.ServingSettings.of", lambda *_: SLOW)
    serving(a_search(folder), patch, fast={"ms": 50.0})
    return ["--models", str(folder / "models"), "--model", "image", *SPACE, "--max-batch", "4,8"]


def test_settings_that_are_proved_better_are_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = values_of("tune", *over_computed_servers(tmp_path, monkeypatch))
    result = tune(options, Console(quiet=True))
    assert (result.best, result.applied) == (FAST, True)
    path = tmp_path / "models" / "image" / "tuned.toml"
    values = TunedFile.read(path).targets["onnxruntime"]
    assert values.batching == TunedBatching(preferred_batch=4, max_queue_delay_us=0, instances=2, threads=1)
    assert str(result.gain) in values.measured
    assert f"written to {path}; make engine MODEL=image publishes it" in result.conclusion
    assert TuneResult.load(tuning_path("image")) == result
    assert "A better setting" in (tmp_path / "build" / "image" / "tuning.html").read_text()
    assert DeploymentSpec.of_model("image", tmp_path / "models").for_target("onnxruntime").batching.preferred_batch == 4
    shown = Console(file=io.StringIO(), width=120)
    shown.print(table(result))
    assert {"default", "best"} <= set(shown.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "tuned", "told"),
    [
        (("--dry-run",), 'tuned = "tuned.toml"\n', "the default's is 1.85 times as high"),
        ((), "", 'names no file of tuned values; add tuned = "tuned.toml" at its top'),
    ],
    ids=["dry run", "no file named"],
)
def test_a_gain_may_be_only_reported(
    more: tuple[str, ...], tuned: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = over_computed_servers(tmp_path, monkeypatch)
    deploy = tmp_path / "models" / "image" / "deploy.toml"
    deploy.write_text(deploy.read_text().replace('tuned = "tuned.toml"\n', tuned))
    result = tune(values_of("tune", *arguments, *more), Console(quiet=True))
    assert (result.best, result.applied, told in result.conclusion) == (FAST, False, True), result.conclusion
    assert not deploy.with_name("tuned.toml").exists()


def test_the_result_is_kept_if_the_tuned_values_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = values_of("tune", *over_computed_servers(tmp_path, monkeypatch))
    monkeypatch.setattr(TunedFile, "write", Mock(side_effect=InputError("tuned.toml: cannot be written")))
    with pytest.raises(InputError, match="cannot be written"):
        tune(options, Console(quiet=True))
    kept = TuneResult.load(tuning_path("image"))
    assert (kept.best, kept.applied) == (FAST, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"tuned\.toml: cannot be read"), ("[targets", r"tuned\.toml: not valid TOML")],
    ids=["a folder", "broken"],
)
def test_an_unusable_file_of_tuned_values_is_reported_before_the_search(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = values_of("tune", *over_computed_servers(tmp_path, monkeypatch))
    path = tmp_path / "models" / "image" / "tuned.toml"
    path.mkdir() if content is None else path.write_text(content)
    monkeypatch.setattr("loadtests.tune.tune.SettingsSearch", Mock(side_effect=AssertionError))
    with pytest.raises(InputError, match=message):
        tune(options, Console(quiet=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-batch", "9"), "--max-batch: seen 9; allowed: 1 to 8"),
        (("--delay-us", "0,1000"), "--delay-us: seen 1000; the embedded Triton serves only 0"),
        (
            ("--target", "tensorrt", "--env-file", "tests/.env"),
            "/.env of the stack; run make engine there, or give the command of a server: --server",
        ),
        (("--precision", "fp16"), "/models PRECISION=fp16"),
        (("--server", "serve {port}"), "the allowed fields are {repository}, {http_port}, {grpc_port}, {metrics_port}"),
        (("--server", "false"), "the default settings: not served: "),
    ],
    ids=["batch", "delay", "tensorrt", "not built", "fields", "server"],
)
def test_bad_input_is_one_line(
    wide: Path, more: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(wide / "build"))
    with pytest.raises(InputError) as error:
        tune(values_of("tune", *flags(wide), *more), Console(quiet=True))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_queue_delays_are_tried_only_on_a_server_that_serves_them() -> None:
    spec = DeploymentSpec.load("tests/models/text")  # 1000 us
    default, space = default_and_space(values_of("tune"), EMBEDDED, spec, 2)
    assert (default.max_queue_delay_us, space.delays_us) == (0, (0,))
    default, space = default_and_space(values_of("tune"), "triton {repository}", spec, 2)
    assert (default.max_queue_delay_us, space.delays_us) == (1000, (0, 200, 1000, 5000))


def test_servers_at_the_same_time_have_no_fixed_port() -> None:
    ports = [option.flag for option in BY_NAME["serve"].options if option.flag.endswith("-port")]
    assert len(ports) == 4
    assert [flag for flag in ports if flag not in EMBEDDED] == []


def test_serving_settings_of_a_spec() -> None:
    spec: Any = DeploymentSpec.load("tests/models/image")
    found = ServingSettings.of(spec, "onnxruntime", cores=8)
    assert (found.instances, found.threads, found.cuda_graphs) == (2, 4, None)
    assert str(found).startswith("2 instances x 4 threads, batches of ")
