"""The command `tune`: candidates on real servers, and the files that a search over computed servers writes."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from rich.console import Console

from cli.commands import BY_NAME
from cli.main import values_of
from deepseek.spec import DeploymentSpec, InputError, TunedBatching, TunedFile
from deepseek.spec.files.measured_batches import read_measured
from deepseek.spec.machine.cpu import this_cpu
from loadtests.search.local_server import EMBEDDED
from loadtests.tune.candidate_server import candidate_server
from loadtests.tune.predicted_latency import Curves
from loadtests.tune.search_space import ServingSettings
from loadtests.tune.tune import conditions_of, default_and_space, tune
from loadtests.tune.tune_result import TuneResult, tuning_path
from tests.add_one import replace_in
from tests.test_settings_search import FAST, SLOW, a_search, serving
from tests.waiting import wait_for

SPACE = ("--max-batch", "4,8", "--delay-us", "0", "--instances", "2", "--threads", "1")


@pytest.fixture
def image(built: Path, own_build: Path) -> list[str]:
    """The options of a short search over the model `image`; its `build/` is a copy."""
    shutil.copytree(built / "build" / "image", own_build / "image")
    quick = ("--precision", "fp16", "--least-s", "1", "--warmup-s", "0")
    return ["--models", "tests/models", "--model", "image", *SPACE, *quick]


@pytest.mark.slow
def test_a_candidate_is_published_and_served_with_its_settings(
    image: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine must not fail this.
    monkeypatch.setattr("loadtests.tune.candidate_server.generator_problems", lambda *_, **__: [])
    conditions = conditions_of(values_of("tune", *image), tmp_path / "served", Console(file=io.StringIO()))
    with candidate_server(FAST, conditions, "candidate") as server:
        served = server.runner.served
        assert (served.max_batch_size, served.preferred_batch_sizes) == (8, (4,))
        assert served.parameters["precision"] == "fp16"
        assert server.throughput_rps() > 0
        assert 0 < server.p99_ms(20, seed=0) <= 5000
    assert [path.name for path in conditions.folder.iterdir()] == ["runs"]


@pytest.mark.slow
def test_layouts_that_run_as_many_batches_at_once_share_a_measured_curve(image: list[str], tmp_path: Path) -> None:
    conditions = conditions_of(values_of("tune", *image), tmp_path / "curves", Console(file=io.StringIO()))
    cores, own = this_cpu().cores, read_measured("image", "onnxruntime")
    layouts = [ServingSettings(max_batch=8, max_queue_delay_us=0, instances=n * cores, threads=1) for n in (1, 2)]
    curves = Curves.measured(conditions, layouts, cores)
    assert curves is not None
    ((key, curve),) = curves.of.items()
    assert (key, curve.instances, curve.precision, curves.sizes[0]) == ((cores, 1), cores, "fp16", 1)
    assert list(conditions.folder.iterdir()) == []
    assert read_measured("image", "onnxruntime") == own  # the build's own measurement is unchanged


def servers_over(folder: Path) -> list[str]:
    """Command lines of running servers over the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if str(folder) in line and "{repository}" not in line and " tune " not in line]


@pytest.mark.slow
def test_a_killed_search_leaves_no_server(image: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "tune", *image, "--dry-run"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_for(lambda: process.poll() is not None or servers_over(tmp_path), wait_s=400)
        assert servers_over(tmp_path)
        process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, said
    wait_for(lambda: servers_over(tmp_path), [].__eq__)


@pytest.fixture
def computed(tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a search over a copy of the model `image`, on computed servers."""
    (tmp_path / "models" / "image").mkdir(parents=True)
    deploy = Path("tests/models/image/deploy.toml").read_text()
    (tmp_path / "models" / "image" / "deploy.toml").write_text(f'tuned = "tuned.toml"\n{deploy}')
    monkeypatch.setattr("loadtests.tune.tune.ServingSettings.of", lambda *_: SLOW)
    serving(a_search(tmp_path), monkeypatch, fast={"ms": 50.0})
    return ["--models", str(tmp_path / "models"), "--model", "image", *SPACE]


def test_settings_that_are_proved_better_are_written_and_drawn(tmp_path: Path, computed: list[str]) -> None:
    result = tune(values_of("tune", *computed), Console(quiet=True))
    assert (result.best, result.applied) == (FAST, True)
    path = tmp_path / "models" / "image" / "tuned.toml"
    values = TunedFile.read(path).targets["onnxruntime"]
    assert values.batching == TunedBatching(preferred_batch=4, max_queue_delay_us=0, instances=2, threads=1)
    assert str(result.gain) in values.measured
    assert f"written to {path}; make engine MODEL=image publishes it" in result.conclusion
    assert TuneResult.load(tuning_path("image"), "image") == result
    assert "A better setting" in (tmp_path / "build" / "image" / "tuning.html").read_text()
    assert DeploymentSpec.of_model("image", tmp_path / "models").for_target("onnxruntime").batching.preferred_batch == 4


@pytest.mark.parametrize(
    ("more", "tuned", "told"),
    [
        (("--dry-run",), 'tuned = "tuned.toml"\n', "the default's is 2.01 times as high"),
        ((), "", 'names no file of tuned values; add tuned = "tuned.toml" at its top'),
    ],
    ids=["dry run", "no file named"],
)
def test_a_gain_may_be_only_reported(
    more: tuple[str, ...], tuned: str, told: str, tmp_path: Path, computed: list[str]
) -> None:
    deploy = tmp_path / "models" / "image" / "deploy.toml"
    replace_in(deploy, 'tuned = "tuned.toml"\n', tuned)
    result = tune(values_of("tune", *computed, *more), Console(quiet=True))
    assert (result.best, result.applied, told in result.conclusion) == (FAST, False, True), result.conclusion
    assert not deploy.with_name("tuned.toml").exists()


def test_an_unusable_file_of_tuned_values_is_reported_before_the_search(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "image" / "tuned.toml").write_text("[targets")
    monkeypatch.setattr("loadtests.tune.tune.SettingsSearch", Mock(side_effect=AssertionError))
    with pytest.raises(InputError, match=r"tuned\.toml: not valid TOML"):
        tune(values_of("tune", *computed), Console(quiet=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-batch", "9"), "--max-batch: seen 9; allowed: 1 to 8"),
        (("--delay-us", "0,1000"), "--delay-us: seen 1000; the embedded Triton serves only 0"),
        (
            ("--target", "tensorrt", "--env-file", "tests/.env"),
            "/.env of the stack; run make engine there, or give the command of a server: --server",
        ),
        (("--precision", "fp8"), "PRECISION=fp8"),
        (("--server", "serve {port}"), "the allowed fields are {repository}, {http_port}, {grpc_port}, {metrics_port}"),
        (("--server", "false"), "the default settings: ended with status 1"),
        (("--route", "/rerank"), "--route /rerank: deploy.toml of image has no [text]; leave --route out"),
    ],
    ids=["batch", "delay", "tensorrt", "not built", "fields", "server", "route"],
)
def test_bad_input_is_one_line(image: list[str], more: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        tune(values_of("tune", *image, *more), Console(quiet=True))


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
