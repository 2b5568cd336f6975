"""Real load tests with Locust against the embedded Triton, as `make loadtest` runs them."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2

from deepseek.spec import DeploymentSpec, InputError
from deepseek.spec.processes.children import free_ports
from loadtests.load import server_statistics
from loadtests.load.background_load import BackgroundLoad, Stream
from loadtests.load.inputs import read_rows
from loadtests.load.preflight import check
from loadtests.results.run import Run
from loadtests.results.settings import LoadSettings
from serving.embedded.launcher import EmbeddedServer
from tests.add_one import write_add_one
from tests.conftest import FREE, Refused, RunHere, run_module
from tests.failing_servers import url_of
from tests.fake_kserve import binary, grpc_serving, http_json, http_serving, triton
from tests.waiting import wait_for

SPEC = """
name = "{name}"
inputs.x = {{ dtype = "float32", shape = ["batch", "length"] }}
outputs.y = {{ dtype = "float32", shape = ["batch", "length"] }}
axes.batch = {{ min = 1, opt = 4, max = 8 }}
axes.length = {{ min = 1, opt = 4, max = 8 }}
slo = {{ p99_ms = 200, rate_rps = 40 }}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedServer, Path]]:
    """A Triton with `tiny`, and a folder with the model's spec and inputs of several lengths."""
    folder = tmp_path_factory.mktemp("tiny")
    write_add_one(folder / "repository", "tiny", delay_s=0.002, instances=1)
    (folder / "models" / "tiny").mkdir(parents=True)
    spec = SPEC.format(name="tiny").replace('["batch", "length"]', '["batch", 2, "length"]')
    (folder / "models" / "tiny" / "deploy.toml").write_text(spec)
    rows = {f"{row:05d}/x": np.full((1, 2, 1 + row % 8), row, np.float32) for row in range(100)}
    np.savez(folder / "inputs.npz", **rows)  # type: ignore[arg-type]
    with EmbeddedServer(folder / "repository", **FREE, log_path=folder / "triton.log") as server:
        yield server, folder


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    return tmp_path


def settings(
    tiny: tuple[EmbeddedServer, Path], protocol: Literal["grpc", "http"] = "grpc", **changes: Any
) -> LoadSettings:
    server, folder = tiny
    fixed: dict[str, Any] = {"model": "tiny", "models": str(folder / "models"), "target": "onnxruntime"}
    fixed |= {"protocol": protocol, "url": url_of(server, protocol), "inputs": str(folder / "inputs.npz")}
    fixed |= {"warmup_s": 1.0, "duration_s": 2.0, "timeout_s": 20.0}
    return LoadSettings(**fixed | changes)


def answered(server: EmbeddedServer) -> int:
    found = server_statistics.fetch(server.http_url, "http", "tiny") or {}
    return sum(counts["success.count"] for counts in found.values())


def wait_for_load(server: EmbeddedServer, before: int) -> None:
    """Waits until the server, which had answered `before` requests, has answered the check and some of the load."""
    wait_for(lambda: answered(server), lambda found: found >= before + 3, 300)


def words(wanted: LoadSettings, *more: str) -> list[str]:
    """The command with the options of these settings."""
    load = ["--shape", str(wanted.shape)]
    if wanted.rate_rps:
        load = ["--rate", str(wanted.rate_rps), "--duration-s", f"{wanted.duration_s:g}"]
    arguments = ["--model", wanted.model, "--models", wanted.models, "--protocol", wanted.protocol, "--url", wanted.url]
    arguments += ["--inputs", wanted.inputs, "--warmup-s", str(wanted.warmup_s), *load]
    return ["loadtest", *arguments, *more]


def command(wanted: LoadSettings, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *words(wanted, *more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_command_sends_every_planned_request_once_at_each_rate_and_saves_the_run(
    tiny: tuple[EmbeddedServer, Path], run_here: RunHere
) -> None:
    wanted = settings(tiny, "http", shape="20x1, 20-60x1, 60x1", arrivals="constant")
    done = run_here(*words(wanted, "--arrivals", "constant", "--json"))
    assert done.returncode in (0, 3), done.stderr  # 3 if this machine is too busy
    figures = json.loads(done.stdout)
    run = Run.load(figures["run"])
    assert [second.planned for second in run.window.seconds] == [20, 40, 60]
    assert (run.window.planned, run.window.ok, run.window.failed, run.window.unsent) == (120, 120, 0, 0)
    assert 2 <= run.window.latency("service").percentile_ms(0) <= run.window.latency("intended").percentile_ms(50)
    assert (figures["answered"], figures["latency"]["intended"]["p50_ms"] > 2) == (120, True)
    assert "requests cannot prove p99_ms" in done.stderr
    statistics = run.server["statistics"]
    assert 0 < statistics["success"]["count"] <= 140  # some of the warm-up may be in flight as the window starts
    assert statistics["compute_infer"]["ns"] > statistics["success"]["count"] * 1_000_000 / 8
    assert run.server["version"] == "1"


def test_a_killed_run_leaves_no_load_behind(tiny: tuple[EmbeddedServer, Path]) -> None:
    wanted = settings(tiny, rate_rps=40.0, duration_s=60.0, warmup_s=0.0)
    before = answered(tiny[0])
    with command(wanted, "--workers", "2") as process:
        wait_for_load(tiny[0], before)
        generators = psutil.Process(process.pid).children(recursive=True)
        assert len(generators) >= 3
        process.kill()
        process.communicate(timeout=60)
    _, alive = psutil.wait_procs(generators, timeout=60)
    assert alive == []


def short_load(folder: Path) -> dict[str, Any]:
    """Settings of 10 requests of one row to a model `m`, whose files go into `folder`."""
    (folder / "m").mkdir()
    (folder / "m" / "deploy.toml").write_text(SPEC.format(name="m"))
    np.savez(folder / "rows.npz", **{"00000/x": np.ones((1, 3), np.float32)})  # type: ignore[arg-type]
    load = {"model": "m", "models": str(folder), "inputs": str(folder / "rows.npz")}
    return load | {"rate_rps": 20.0, "duration_s": 0.5, "warmup_s": 0.0}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([3], "answered 'y' as float32 [3]; expected y (FP32 [-1, 3])"),
        ([0, 3], "m answered 'y' with 0 rows for the 1 sent"),
    ],
    ids=["signature", "rows"],
)
def test_an_answer_unlike_the_models_signature_or_the_request_counts_as_failed(
    tiny: tuple[EmbeddedServer, Path], tmp_path: Path, shape: list[int], message: str
) -> None:
    wrong = service_pb2.ModelInferResponse.InferOutputTensor(name="y", datatype="FP32", shape=shape)
    content = bytes(4 * math.prod(shape))
    answer = service_pb2.ModelInferResponse(outputs=[wrong], raw_output_contents=[content]).SerializeToString()
    with grpc_serving(lambda _: answer) as url:
        stream = Stream(name="fake", settings=settings(tiny, url=url, **short_load(tmp_path)))
        with BackgroundLoad([stream]) as sending:
            log = sending.wait()["fake"]
    assert (len(log), log.errors) == (10, {"ServerError": 10})
    assert message in log.messages[0]


def test_the_answer_of_a_model_without_batches_may_have_another_first_dimension(
    tiny: tuple[EmbeddedServer, Path], tmp_path: Path
) -> None:
    two = binary(shape=[2, 3], parameters={"binary_data_size": 24})
    others = triton(lambda: http_json({"outputs": [two]}, bytes(24)))
    config = http_json({"max_batch_size": 0})
    with http_serving(lambda path, body: config if path.endswith("/config") else others(path, body)) as url:
        stream = Stream(name="fake", settings=settings(tiny, "http", url=url, **short_load(tmp_path)))
        with BackgroundLoad([stream]) as sending:
            log = sending.wait()["fake"]
    assert (len(log), log.errors) == (10, {})


def test_a_worker_on_another_machine_sends_the_load_of_its_master(
    tiny: tuple[EmbeddedServer, Path], run_here: RunHere
) -> None:
    wanted, remote = settings(tiny, rate_rps=60.0, duration_s=1.0), ("--remote-workers", "1", "--json")
    with command(wanted, *remote) as master:
        worker = run_here(*words(wanted, *remote, "--worker-of", "127.0.0.1"))
        output, errors = master.communicate(timeout=240)
    assert (worker.returncode, worker.stdout) == (0, ""), worker.stderr
    run = Run.load(json.loads(output)["run"])
    assert master.returncode in (0, 3), errors
    assert run.window.ok == run.window.planned == 60
    assert run.settings.workers == 1


def test_the_share_of_a_lost_worker_counts_as_missing(tiny: tuple[EmbeddedServer, Path]) -> None:
    before = answered(tiny[0])
    with command(settings(tiny, rate_rps=40.0, duration_s=3.0), "--workers", "2", "--timeout-s", "1") as process:
        wait_for_load(tiny[0], before)
        locust = psutil.Process(process.pid).children()[0]
        locust.children()[0].kill()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert "1 of 2 workers were lost" in errors
    assert "planned requests were never sent" in errors


def test_workers_that_a_busy_machine_holds_up_send_their_share_late(tiny: tuple[EmbeddedServer, Path]) -> None:
    before = answered(tiny[0])
    with command(
        settings(tiny, rate_rps=40.0, duration_s=3.0), "--workers", "2", "--timeout-s", "20", "--json"
    ) as load:
        wait_for_load(tiny[0], before)
        held_up = psutil.Process(load.pid).children()[0].children()
        for worker in held_up:
            worker.suspend()
        time.sleep(6)  # Locust gives workers up after 4 s
        for worker in held_up:
            worker.resume()
        output, errors = load.communicate(timeout=240)
    run = Run.load(json.loads(output)["run"])
    assert (len(held_up), run.window.planned, run.window.unsent, run.window.ok > 0) == (2, 120, 0, True), errors


def test_the_users_own_settings_of_locust_do_not_change_the_load(
    tiny: tuple[EmbeddedServer, Path], run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locust.conf").write_text("users = 7\nown-option = 1\n")
    monkeypatch.chdir(tmp_path)
    wanted = settings(tiny, rate_rps=40.0, warmup_s=0.0, duration_s=1.0)
    done = run_here(*words(wanted, "--json"), LOCUST_USER_CLASSES="Mine", LOCUST_CSV=str(tmp_path / "csv"))
    assert json.loads(done.stdout)["answered"] == 40, done.stderr
    assert list(tmp_path.glob("csv*")) == []


def test_a_log_has_no_progress_bar_even_if_it_has_colours(tiny: tuple[EmbeddedServer, Path], run_here: RunHere) -> None:
    wanted = settings(tiny, rate_rps=40.0, warmup_s=0.0, duration_s=1.0)
    done = run_here(*words(wanted), FORCE_COLOR="1")
    assert ("\x1b[" in done.stderr, "starting" in done.stderr, "measuring" in done.stderr) == (True, False, False)


def test_locust_alone_that_is_stopped_before_the_end_of_the_load_fails(
    tiny: tuple[EmbeddedServer, Path], tmp_path: Path
) -> None:
    wanted = settings(tiny, rate_rps=40.0, duration_s=600.0)
    (tmp_path / "settings.json").write_text(json.dumps([asdict(wanted)]))
    more = ("--headless", "--run-time", "1s", "--settings", str(tmp_path / "settings.json"))
    run = run_module("locust", "--locustfile", "loadtests/locustfile.py", *more)
    assert (run.returncode, "error: stopped before the end of the load" in run.stderr) == (3, True), run.stderr


def test_locusts_page_shows_the_run_and_stays_open_until_ctrl_c(tiny: tuple[EmbeddedServer, Path]) -> None:
    port = free_ports(1)[0]
    with command(
        settings(tiny, rate_rps=40.0, warmup_s=0.0, duration_s=1.0), "--web", "--web-port", str(port), "--json"
    ) as process:
        assert process.stdout is not None
        lines = [""]
        while lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]  # it has ended
        figures = json.loads("".join(lines))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats/requests", timeout=60) as answer:
            shown = {entry["name"]: entry for entry in json.load(answer)["stats"]}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
            assert b"<title>Locust</title>" in answer.read()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert figures["answered"] == shown["tiny"]["num_requests"] == 40
    assert process.returncode in (0, 3)


def test_stop_on_locusts_page_ends_the_run_without_a_result(tiny: tuple[EmbeddedServer, Path], build: Path) -> None:
    port, before = free_ports(1)[0], answered(tiny[0])
    wanted = settings(tiny, rate_rps=40.0, warmup_s=0.0, duration_s=600.0)
    with command(wanted, "--web", "--web-port", str(port)) as process:
        wait_for_load(tiny[0], before)
        stop = urllib.request.Request(f"http://127.0.0.1:{port}/stop", method="POST")
        with contextlib.suppress(OSError), urllib.request.urlopen(stop, timeout=60):  # it may end before its answer
            pass
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert errors.splitlines()[-1].startswith("error: stopped on Locust's page before its end; nothing was saved: wait")
    assert list((build / "tiny" / "loadtests").iterdir()) == []


def test_an_unusable_port_for_the_page_is_reported_before_any_load(
    tiny: tuple[EmbeddedServer, Path], refused: Refused
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asked = taken.getsockname()[1]
        said = refused(*words(settings(tiny, rate_rps=40.0), "--web", "--web-port", str(asked)))
    assert f"--web-port {asked}: " in said


def test_an_interrupted_run_ends_and_leaves_nothing(tiny: tuple[EmbeddedServer, Path], build: Path) -> None:
    """By SIGTERM, which is handled as Ctrl-C."""
    before = answered(tiny[0])
    with command(settings(tiny, rate_rps=40.0, duration_s=600.0)) as process:
        wait_for_load(tiny[0], before)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted"
    assert list((build / "tiny" / "loadtests").iterdir()) == []


def test_a_disk_that_fills_during_a_run_ends_it_in_one_line(tiny: tuple[EmbeddedServer, Path], build: Path) -> None:
    before = answered(tiny[0])
    with command(settings(tiny, rate_rps=40.0, duration_s=600.0), "--timeout-s", "1") as process:
        wait_for_load(tiny[0], before)
        (rows,) = (build / "tiny" / "loadtests").glob(".scratch-*/run/tiny.seconds.jsonl")
        full = rows.with_name("full")
        full.symlink_to("/dev/full")
        full.replace(rows)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: the folder written to: No space left on device; free some space")
    assert list((build / "tiny" / "loadtests").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "127.0.0.1:9"}, "127.0.0.1:9"),
        ({"model": "absent"}, "absent"),
        ({"inputs": "none.npz"}, "none.npz: no such file; correct --inputs"),
        ({"inputs": "shop/evaluation.npz"}, "no such file; build the model first: make engine MODEL=shop"),
        ({"rate_rps": 1e9}, "plans 2000000000 requests"),
        ({"rate_rps": 1e308}, "plans inf requests"),
        ({"warmup_s": 1e9}, r"plans 80 requests, and 4e\+10 to warm up"),
        ({"users": 3}, "give one of --rate"),
        ({"rate_rps": None, "users": 600}, "at most 512"),
    ],
    ids=lambda value: "-".join(map(str, value.items()))[:40] if isinstance(value, dict) else "",
)
def test_bad_input_gives_a_one_line_error_before_any_load(
    tiny: tuple[EmbeddedServer, Path], changes: dict[str, Any], message: str
) -> None:
    wanted = settings(tiny, **{"rate_rps": 40.0, **changes})
    with pytest.raises(InputError, match=message):
        check(wanted, DeploymentSpec.of_model("tiny", wanted.models))


def test_inputs_of_another_model_are_refused(tiny: tuple[EmbeddedServer, Path], tmp_path: Path) -> None:
    wanted = settings(tiny, rate_rps=40.0, inputs=str(tmp_path / "other.npz"))
    spec, row = DeploymentSpec.of_model("tiny", wanted.models), np.ones((1, 2, 4))
    for wrong, says in ({"00000/z": row}, r"contains z, deploy\.toml has x"), ({"00000/x": row}, "float64"):
        np.savez(tmp_path / "other.npz", **wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=says):
            check(wanted, spec)
    np.savez(tmp_path / "objects.npz", **{"00000/x": np.array([["a"]], object)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"it holds Python objects; save texts as .astype\(str\)"):
        read_rows(tmp_path / "objects.npz")
    np.savez(tmp_path / "number.npz", **{"00000/x": np.float32(1)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"00000/x is a single number; the first axis must be a batch of 1"):
        read_rows(tmp_path / "number.npz")
    np.save(tmp_path / "x.npy", row)
    with pytest.raises(InputError, match=r"x.npy: not an .npz file of inputs"):
        read_rows(tmp_path / "x.npy")
