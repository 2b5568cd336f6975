"""Replays: recorded traffic sent at its own times to the embedded Triton, as `make loadtest REPLAY=` does."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from deepseek.spec import DeploymentSpec, InputError, SloSpec
from loadtests.load import traffic_file
from loadtests.load.replay import PLAN, replay_of, rows_in, with_replay
from loadtests.load.traffic_file import read_traffic
from loadtests.load.workers.sender import share_of
from loadtests.report.run_tables import settings as settings_table
from loadtests.results.run import Run
from loadtests.results.settings import Replay
from loadtests.slo.slo_demands import in_flight_for
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE, RunHere
from tests.failing_servers import url_of
from tests.saved_runs import load_settings
from tests.test_locustfile import SPEC

MODEL = '''
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """y = x; notes the first number and the length of every x."""

    def execute(self, requests):
        inputs = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "x")) for request in requests]
        with open("{log}", "a") as log:
            log.writelines(f"{{x[0, 0]:g}} {{x.shape[1]}}\\n" for x in inputs)
        return [pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("y", x + 0)]) for x in inputs]
'''
CONFIG = """
name: "{name}" backend: "python" max_batch_size: 8 instance_group {{ kind: KIND_CPU }}
input {{ name: "x" data_type: TYPE_FP32 dims: [-1] }} output {{ name: "y" data_type: TYPE_FP32 dims: [-1] }}
"""
LONG = SPEC.replace("axes.length = {{ min = 1, opt = 4, max = 8 }}", "axes.length = {{ min = 1, opt = 4, max = 64 }}")
SLOW = LONG.replace("p99_ms = 200, rate_rps = 40", "p99_ms = 2000")
LENGTHS = (4, 16, 64)
ROWS = 30  # row k has the number k, and a length of LENGTHS[k % 3]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedServer, Path]]:
    """A Triton with the models `cart` and `search`, which log what they get; their folders and inputs."""
    folder = tmp_path_factory.mktemp("replay")
    rows = {f"{row:05d}/x": np.full((1, LENGTHS[row % 3]), row, np.float32) for row in range(ROWS)}
    for name in ("cart", "search"):
        for path in (folder / "repository" / name / "1", folder / "models" / name, folder / "build" / name):
            path.mkdir(parents=True)
        (folder / "repository" / name / "1" / "model.py").write_text(MODEL.format(log=folder / f"{name}.log"))
        (folder / "repository" / name / "config.pbtxt").write_text(CONFIG.format(name=name))
        (folder / "models" / name / "deploy.toml").write_text(SLOW.format(name=name))
        np.savez(folder / "build" / name / "evaluation.npz", **rows)  # type: ignore[arg-type]
    with EmbeddedServer(folder / "repository", **FREE, log_path=folder / "triton.log") as server:
        yield server, folder


Sent = tuple[int, dict[str, Any], str]
"""Exit code, figures, error output."""


@pytest.fixture
def replay(served: tuple[EmbeddedServer, Path], run_here: RunHere) -> Callable[..., Sent]:
    """Runs `deepseek loadtest --replay`. The models' logs begin empty."""
    server, folder = served

    def run(csv: str, *more: str) -> Sent:
        for name in ("cart", "search"):
            (folder / f"{name}.log").write_text("")
        (folder / "traffic.csv").write_text(csv)
        flags = ["--model", "cart", "--models", str(folder / "models"), "--url", server.grpc_url, "--json", *more]
        flags += ["--replay", str(folder / "traffic.csv")] if csv and "--replay" not in more else []
        done = run_here("loadtest", *flags, DEEPSEEK_BUILD=str(folder / "build"))
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    return run


def received(served: tuple[EmbeddedServer, Path], name: str = "cart") -> list[tuple[int, int]]:
    """The row and length of each request of the load that a model got, sorted."""
    lines = (served[1] / f"{name}.log").read_text().splitlines()[1:]  # the first one is the check before the load
    return sorted((int(row), int(length)) for row, length in map(str.split, lines))


def test_the_recorded_rows_are_sent_at_their_times_after_a_warm_up_at_the_mean_rate(
    served: tuple[EmbeddedServer, Path], replay: Callable[..., Sent]
) -> None:
    rows = [3, 3, 7, 29, 0, 12, 3, 8]
    times = [1767225600.25 + second for second in (0, 0.5, 1, 1.5, 2, 6, 2.5, 3)]  # one line is late
    csv = "time,row\n" + "".join(f"{time:.3f},{row}\n" for time, row in zip(times, rows, strict=True))
    code, figures, errors = replay(csv, "--speed", "2", "--warmup-s", "1", "--workers", "2")
    assert code in (0, 3), errors  # 3 if this machine is too busy
    run = Run.load(figures["run"])
    assert (run.window.planned, run.window.ok, run.window.unsent) == (8, 8, 0)
    assert (run.seconds[0].second, run.seconds[0].planned) == (-1, 2)
    assert [second.planned for second in run.window.seconds] == [4, 3, 0, 1]
    sent = Counter(row for row, _ in received(served))
    assert (sent >= Counter(rows), sent.total()) == (True, 10)
    assert run.settings.duration_s == 4
    assert run.settings.replay is not None
    assert run.settings.replay.sha256 == hashlib.sha256(csv.encode()).hexdigest()
    assert (run.settings.replay.speed, run.settings.replay.requests, run.settings.replay.peak_rps) == (2, 8, 4)
    assert run.settings.load == "replay of traffic.csv at speed 2, 2 requests/s on average (open loop)"
    assert run.settings.replay.sha256 in settings_table(run)
    assert sorted(path.name for path in run.folder.iterdir()) == ["run.json", "seconds.jsonl"]


def test_several_models_are_replayed_as_a_mix(
    served: tuple[EmbeddedServer, Path], replay: Callable[..., Sent], run_here: RunHere
) -> None:
    csv = "time,model,row\n0,cart,1\n0.2,search,2\n0.4,cart,3\n2.4,search,4\n"
    code, figures, errors = replay(csv, "--mix", "cart,search", "--warmup-s", "0")
    assert code in (0, 3), errors
    cart, search = (Run.load(each["run"]) for each in figures["runs"])
    assert [row for row, _ in received(served)] == [1, 3]
    assert [row for row, _ in received(served, "search")] == [2, 4]
    assert [(run.settings.mix, run.settings.duration_s) for run in (cart, search)] == [("cart,search", 3)] * 2
    assert (cart.window.ok, search.window.ok) == (2, 2)
    assert [second.planned for second in search.window.seconds] == [1, 0, 1]
    mix = ("--models", str(served[1] / "models"), "--mix", "cart,search")
    judged = run_here("verdict", *mix, DEEPSEEK_BUILD=str(served[1] / "build"))
    assert judged.returncode == 3, judged.stderr  # too few requests to judge


def test_requests_in_flight_are_bounded_by_the_busiest_second() -> None:
    recorded = Replay(file="traffic.csv", sha256="", speed=1.0, requests=1000, peak_rps=900.0)
    settings = load_settings(replay=recorded, duration_s=1000.0)
    assert in_flight_for(settings, SloSpec(p99_ms=1000)) == 1800  # twice what may be in time; the mean rate is 1/s


def planned(served: tuple[EmbeddedServer, Path], csv: str, protocol: Literal["grpc", "http"] = "grpc") -> list[int]:
    """The rows that the plan of a replay of `cart` sends, in the order of their times."""
    server, folder = served
    (folder / "traffic.csv").write_text(csv)
    traffic = read_traffic(folder / "traffic.csv", {"cart": ROWS})
    spec = DeploymentSpec.of_model("cart", folder / "models")
    inputs = str(folder / "build" / "cart" / "evaluation.npz")
    settings = load_settings(model="cart", protocol=protocol, url=url_of(server, protocol), inputs=inputs)
    return replay_of(traffic, with_replay(settings, traffic, 1.0), spec)["row"].tolist()


def test_the_nearest_length_is_sent_and_equal_keys_send_equal_rows(served: tuple[EmbeddedServer, Path]) -> None:
    wanted = [1, 4, 10, 11, 40, 41, 900]
    rows = planned(served, "time,length\n" + "".join(f"{k / 10},{length}\n" for k, length in enumerate(wanted)))
    assert [LENGTHS[row % 3] for row in rows] == [4, 4, 4, 16, 16, 64, 64]
    assert len(set(rows)) == len(rows)  # rows of one length take turns
    rows = planned(served, "time,length,key\n" + "".join(f"{k / 20},16,user {k % 2}\n" for k in range(10)))
    assert {LENGTHS[row % 3] for row in rows} == {16}
    assert rows == rows[:2] * 5
    assert rows[0] != rows[1]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_nearest_size_of_the_encoded_request_is_sent(
    served: tuple[EmbeddedServer, Path], protocol: Literal["grpc", "http"]
) -> None:
    rows = planned(served, "time,bytes\n0,1\n0.1,100000\n", protocol)
    assert [LENGTHS[row % 3] for row in rows] == [4, 64]


@pytest.mark.parametrize("column", ["row", "length", "bytes"])
def test_inputs_that_do_not_fit_the_model_are_refused_in_one_line(
    served: tuple[EmbeddedServer, Path], replay: Callable[..., Sent], tmp_path: Path, column: str
) -> None:
    np.savez(tmp_path / "other.npz", **{"00000/z": np.ones((1, 4), np.float32)})  # type: ignore[arg-type]
    np.savez(tmp_path / "evaluation.npz", **{"00000/z": np.ones((1, 4), np.float32)})  # type: ignore[arg-type]
    (tmp_path / "texts.txt").write_text("a")
    for name, says in (
        ("other.npz", "contains z, deploy.toml has x; correct --inputs"),
        ("evaluation.npz", "contains z, deploy.toml has x; build the model first: make engine MODEL="),
        ("texts.txt", "deploy.toml of cart has no [te"),
    ):
        code, _, errors = replay(f"time,{column}\n0,0\n", "--inputs", str(tmp_path / name))
        assert (code, len(errors.splitlines())) == (2, 1), errors
        assert says in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "5"), "--rate: not with --replay"),
        (("--mix", "cart:1,search:2"), "name only the models: cart,search"),
        (("--mix", "cart,search"), "no column model, which --mix needs"),
        (("--speed", "1e-9"), "allowed: 604800 s"),
        (("--replay", "/absent.csv"), "/absent.csv: No such file or directory"),
        ((), "--speed 2: only for --replay"),
    ],
)
def test_options_that_contradict_a_replay_are_refused_before_any_request(
    served: tuple[EmbeddedServer, Path], replay: Callable[..., Sent], options: tuple[str, ...], message: str
) -> None:
    code, _, errors = replay("time\n0\n1\n" if options else "", *(options or ("--speed", "2")))
    assert (code, len(errors.splitlines())) == (2, 1), errors
    assert message in errors
    assert (served[1] / "cart.log").read_text() == ""


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("", "line 1: the columns are ''; allowed: time"),
        ("time\n", "no request"),
        ("row,model\n1,a\n", "line 1: the columns are 'row,model'; allowed: time"),
        ("time,lenght\n0,4\n", "line 1: the columns are 'time,lenght'"),
        ("time,row,length\n0,1,4\n", "row and length both choose the input"),
        ("time,row,key\n0,1,4\n", "row and key both choose the input"),
        ("time\n0\nsoon\n", "line 3: time 'soon'; allowed: seconds"),
        ("time\n0\n\nnan\n", "line 4: time 'nan'"),
        ("time\n1767225600250\n", "line 2: time '1767225600250'; allowed: .*; divide milliseconds by 1000"),
        ("time\n1767225600\n2026-01-01T00:00:01Z\n7\n", "line 4: time '7' is 1767225593 s from the first"),
        ("time,model\n0,a\n1,c\n", "line 3: model 'c'; allowed: a, b; .*MIX="),
        ("time,model,row\n0,a,4\n1,b,4\n2,a,5\n", "line 4: row '5'; allowed: 0 to 4"),
        ("time,length\n0,\n", "line 2: length ''; allowed: a number"),
        ("time,model,row\n0,a\n", "line 2: 2 values; the first line names 3"),
        ('time,key\n0,"a\n', "line 2: unexpected end of data"),
        ("time,key\n0," + "k" * 70000, "a line of 65536 bytes or more"),
        (b"time,key\n0,\xff\n", "line 2: not UTF-8"),
        ("time\n0\n1\n2\n3\n4\n", "line 6: more than 4 requests"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, csv: str | bytes, message: str
) -> None:
    monkeypatch.setattr(traffic_file, "MOST_REQUESTS", 4)
    path = tmp_path / "traffic.csv"
    path.write_bytes(csv if isinstance(csv, bytes) else csv.encode())
    models = {"a": 5, "b": 9} if isinstance(csv, str) and "model" in csv else {"a": 5}
    with pytest.raises(InputError, match=message):
        read_traffic(path, models)


def test_times_are_seconds_or_iso_times_and_may_be_out_of_order(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    times = ["2026-01-01T00:00:01.500Z", "2026-01-01T01:00:00+01:00", "2026-01-01T00:00:03"]
    path.write_text("\ufefftime,row\n" + "".join(f"{time},{row}\n" for row, time in enumerate(times)))
    found = read_traffic(path, {"a": 3}).of("a")
    assert (found.times_s.tolist(), found.values.tolist()) == ([0, 1.5, 3], [1, 0, 2])


def test_a_model_without_a_request_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    path.write_text("time,model\n0,a\n1,a\n")
    traffic = read_traffic(path, {"a": 3, "b": 3})
    assert traffic.of("a").times_s.tolist() == [0, 1]
    with pytest.raises(InputError, match="no request of b; leave it out of --mix"):
        traffic.of("b")


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_share_a_plan(workers: int) -> None:
    plan = np.zeros(10_000, PLAN)
    plan["time_s"], plan["row"] = np.arange(len(plan)), np.arange(len(plan)) % 7
    shares = [list(share_of(plan, worker, workers)) for worker in range(workers)]
    assert sorted(chain(*shares)) == plan.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert rows_in(plan) == list(range(7))
