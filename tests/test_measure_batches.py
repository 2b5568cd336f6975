"""Measured batches: the curve, the batching and queue that follow, and what the server then joins."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import DeploymentSpec, InputError, PublishedManifest, TextSpec
from deepseek.spec.checks import checked
from deepseek.spec.files.batching_plan import batching_of, tail_limit_ms
from deepseek.spec.files.measured_batches import BatchTime, MeasuredBatches, batches_path, read_measured
from deepseek.spec.machine.cpu import Cpu, has_int8_dot_products, this_cpu
from export.publishing.triton_config import model_config
from export.stages import measure_batches
from export.stages.measure_batches import BusySessions, measure, measured_batches, sizes_to_measure
from export.stages.publish import publish_version
from loadtests.search.capacity_result import ServerSettings
from serving.embedded.launcher import EmbeddedServer
from serving.repository.checks import read_config
from tests.add_one import ADD_ONE
from tests.conftest import FREE, Refused, RunHere, run_stage
from tests.test_onnxruntime_backend import counter
from tests.waiting import wait_for

IMAGE = DeploymentSpec.load("tests/models/image")
ENCODER = {1: 9.0, 2: 16.0, 4: 30.0, 8: 59.0}  # ms; MiniLM in fp32 on one thread
SMALL = {1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4, 16: 4.0, 32: 7.2, 64: 13.0}


def spec_of(most: int = 64, p99_ms: float | None = 200, **batching: Any) -> DeploymentSpec:
    """A spec with two instances of one thread."""
    facts: dict[str, Any] = IMAGE.model_dump(mode="json", exclude_none=True) | {"targets": {}}
    facts["axes"]["batch"] = {"min": 1, "opt": 4, "max": most}
    facts |= {"batching": {"instances": 2, "threads": 1, **batching}, "slo": {"p99_ms": p99_ms} if p99_ms else {}}
    return DeploymentSpec.model_validate_json(json.dumps(facts))


def measured_as(times_ms: dict[int, float], **facts: Any) -> MeasuredBatches:
    """A measurement with this curve."""
    known: dict[str, Any] = {"precision": "fp32", "instances": 2, "threads": 1, "at_once": 2}
    times = tuple(BatchTime(rows=rows, ms=ms) for rows, ms in times_ms.items())
    return MeasuredBatches(**known | {"cpu": Cpu(model="EPYC", cores=2), "times": times} | facts)


# -- what follows from a curve --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times_ms", "p99_ms", "batch"),
    [
        (ENCODER, 200, 4),
        (ENCODER, 1000, 4),  # 8 rows are only 1.7 % faster than 4
        (ENCODER, 70, 2),
        (SMALL, 80, None),  # all 64: half of them lose more than 3 %
        (SMALL, 40, 32),
        ({1: 10.0, 2: 20.0, 4: 40.0}, None, 1),  # a batch gains nothing
        ({1: 60.0}, 200, 1),  # even one row is too slow
    ],
)
def test_the_preferred_batch_is_the_smallest_that_keeps_the_throughput_and_fits_a_quarter_of_p99(
    times_ms: dict[int, float], p99_ms: float | None, batch: int | None
) -> None:
    assert batching_of(spec_of(p99_ms=p99_ms), measured_as(times_ms)).preferred_batch == batch


def test_queue_and_timeout_follow_from_the_same_numbers_which_the_plan_states() -> None:
    plan = batching_of(spec_of(), measured_as(ENCODER))
    assert (plan.queue_timeout_ms, plan.max_queue_size) == (139, 146)  # 200 - 30.5 - 30; 4 x 262.3/s x 0.139 s
    taken = "batches of 4 take 30 ms + 0.3 ms in the server"
    size = f"{taken} and give 264 rows/s; the best of up to 50 ms (p99 / 4), of 4, give 264 rows/s"
    assert plan.reasons == {
        "run_rows": size,
        "preferred_batch": size,
        "queue_timeout_ms": "p99 200 ms - 30.5 ms, a batch in the server - 30 ms, the model's part again",
        "max_queue_size": "4 x 262.3 requests/s x 139 ms, at least 128 and two batches an instance, at most 100000",
    }
    assert plan.measured == measured_as(ENCODER)


def test_a_short_batch_is_larger_as_each_costs_the_server_time_too() -> None:
    recommender = {1: 0.36, 2: 0.63, 4: 1.19, 8: 2.32, 16: 4.69, 32: 9.55, 64: 19.6}  # alone, 4 rows would be enough
    assert batching_of(spec_of(p99_ms=80), measured_as(recommender)).run_rows == 16


def test_texts_are_joined_for_longer_than_they_run_at_once() -> None:
    spec = spec_of().model_copy(update={"text": TextSpec(tokenizer="tokenizer.json")})
    plan = batching_of(spec, measured_as(ENCODER))
    assert (plan.run_rows, plan.preferred_batch, plan.queue_timeout_ms) == (4, 8, 139)  # 66.7 ms / 7.5; 200 - 30.5 - 30
    assert plan.reasons["preferred_batch"] == "texts of 7.5 ms each within 66.7 ms (p99 / 3), at least 4"
    assert batching_of(spec, measured_as({1: 60.0})).preferred_batch == 1
    by_hand = spec.model_copy(update={"batching": spec.batching.model_copy(update={"preferred_batch": 32})})
    assert batching_of(by_hand, measured_as(ENCODER)).run_rows == 4


@pytest.mark.parametrize(
    ("times_ms", "instances", "texts", "timeout_ms"),
    [
        ({1: 2.6, 8: 16.8, 16: 35.0}, 1, 11, 152),  # 2.1 ms a text; 25 ms are p99 / 8
        (ENCODER, 1, 4, 139),  # 7.5 ms a text: 3 take p99 / 8, and 4 not more than p99 / 4
        (ENCODER, 2, 3, 109),  # two take turns, 15 ms a text: 4 take more than p99 / 4
        ({1: 60.0}, 1, 1, 79),
    ],
)
def test_on_one_core_two_batches_of_texts_are_ahead(
    times_ms: dict[int, float], instances: int, texts: int, timeout_ms: int
) -> None:
    spec = spec_of(instances=instances).model_copy(update={"text": TextSpec(tokenizer="tokenizer.json")})
    plan = batching_of(spec, measured_as(times_ms, at_once=1, instances=instances))
    assert (plan.preferred_batch, plan.queue_timeout_ms) == (texts, timeout_ms)


def test_a_model_too_slow_for_its_slo_lets_a_request_wait_for_one_batch() -> None:
    plan = batching_of(spec_of(), measured_as({1: 90.0}))
    assert (plan.preferred_batch, plan.queue_timeout_ms, plan.max_queue_size) == (1, 91, 128)
    assert plan.reasons["queue_timeout_ms"] == "one batch, 90.3 ms: p99 200 ms leaves less to wait"


TINY = {1: 0.013, 64: 0.02, 512: 0.07}


@pytest.mark.parametrize(
    ("p99_ms", "least", "joined", "timeout_ms", "waiting"),
    [
        (10, 1, 50, 7, 993),  # 2.5 ms / 0.05 ms; 10 - 2.82 - 0.02; 4 x 35.5/ms x 7 ms
        (10, 8, 400, 7, 976),  # requests of 8 rows
        (3_600_000, 1, None, 3_599_973, 100_000),
        (None, 1, None, 200, 31_545),
    ],
)
def test_a_tiny_model_joins_only_as_many_requests_as_the_server_handles_in_time(
    p99_ms: float | None, least: int, joined: int | None, timeout_ms: int, waiting: int
) -> None:
    spec = spec_of(512, p99_ms)
    axis = spec.axes["batch"].model_copy(update={"min": least})
    plan = batching_of(spec.model_copy(update={"axes": {"batch": axis}}), measured_as(TINY))
    assert (plan.run_rows, plan.preferred_batch) == (None, joined)
    assert (plan.queue_timeout_ms, plan.max_queue_size) == (timeout_ms, waiting)
    if joined:
        why = "50 requests of 0.05 ms for the server each, within 2.5 ms (p99 / 4)"
        assert plan.reasons["preferred_batch"] == why


def test_values_set_by_hand_win() -> None:
    by_hand: dict[str, Any] = {"preferred_batch": 16, "queue_timeout_ms": 70, "max_queue_size": 9}
    plan = batching_of(spec_of(**by_hand), measured_as(ENCODER))
    assert plan.model_dump(include=set(by_hand)) == by_hand
    assert (set(plan.reasons.values()), plan.measured) == ({"set by hand"}, None)
    plan = batching_of(spec_of(preferred_batch=2), measured_as(ENCODER))
    assert (plan.preferred_batch, plan.queue_timeout_ms) == (2, 167)


@pytest.mark.parametrize(
    "other", [{"instances": 1}, {"threads": 2}, {"precision": "int8"}, {"times": (), "skipped": "on a GPU"}]
)
def test_a_measurement_of_another_layout_or_precision_is_not_used(other: dict[str, Any]) -> None:
    plan = batching_of(spec_of(), measured_as(ENCODER, **other), "fp32")
    assert (plan.preferred_batch, plan.queue_timeout_ms, plan.max_queue_size) == (None, 100, 512)
    assert plan.measured is None


def test_without_a_latency_in_the_slo_the_timeout_is_the_default_and_above_the_queue_delay() -> None:
    assert batching_of(spec_of(p99_ms=None), None).queue_timeout_ms == 200
    assert batching_of(spec_of(p99_ms=4, max_queue_delay_us=5000), None).queue_timeout_ms == 10


def test_the_limit_is_the_tail_or_else_the_strictest_latency() -> None:
    slo = spec_of().slo
    assert tail_limit_ms(slo.model_copy(update={"objectives": ("p99.9_ms < 150", "p50_ms < 9")})) == 150
    assert tail_limit_ms(slo.model_copy(update={"p99_ms": None, "p95_ms": 40.0})) == 40


def test_max_batch_also_limits_the_preferred_batch() -> None:
    assert batching_of(spec_of(max_batch=8), measured_as(SMALL)).preferred_batch is None
    facts = IMAGE.model_dump(mode="json", exclude_none=True)
    with pytest.raises(InputError, match=r"batching.preferred_batch: seen 16; allowed: 1 to 8, the largest batch"):
        checked(DeploymentSpec, {**facts, "batching": {"max_batch": 8, "preferred_batch": 16}}, "")


# -- the curve ------------------------------------------------------------------------------------


class Clock:
    """A clock that only turns move."""

    def __init__(self, times_s: Callable[[int], float]) -> None:
        self.now, self.turns, self._times_s = 0.0, list[int](), times_s

    def __call__(self) -> float:
        return self.now

    def turn(self, size: int) -> float:
        self.turns.append(size)
        self.now += self._times_s(size)
        return self._times_s(size)


def test_sizes_take_turns_up_to_the_first_that_is_too_slow() -> None:
    clock = Clock(lambda size: 0.01 * size)
    found = measure(clock.turn, [1, 2, 4, 8, 16], longest_s=0.05, budget_s=100, clock=clock)
    assert found == {size: pytest.approx(0.01 * size) for size in (1, 2, 4, 8)}
    assert clock.turns[12:20] == [1, 2, 4, 8] * 2


@pytest.mark.parametrize("row_s", [0.001, 0.1, 1, 30])
def test_the_measurement_ends_within_its_budget_or_after_one_size(row_s: float) -> None:
    clock = Clock(lambda size: row_s * size)
    found = measure(clock.turn, sizes_to_measure(1, 256), longest_s=float("inf"), budget_s=5, clock=clock)
    assert 1 in found
    assert clock.now <= 5.5 or list(found) == [1]


def test_noise_in_some_turns_does_not_count() -> None:
    calls = iter(range(1000))
    clock = Clock(lambda size: 0.01 * size * (5 if next(calls) % 7 == 3 else 1))
    found = measure(clock.turn, [1, 2, 4], longest_s=1, budget_s=100, clock=clock)
    assert found == {size: pytest.approx(0.01 * size) for size in (1, 2, 4)}


def test_all_sessions_run_a_batch_at_the_same_time() -> None:
    meeting, shapes = threading.Barrier(3, timeout=60), set[tuple[int, ...]]()

    def predict(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        meeting.wait()  # breaks unless three run at once
        shapes.add(inputs["x"].shape)
        return {}

    sessions = BusySessions([predict] * 3, lambda size: {"x": np.zeros((size, 2))})
    sessions.turn(4)
    assert shapes == {(4, 2)}


# -- the stage ------------------------------------------------------------------------------------


def test_the_stage_measures_the_chosen_graph_and_publishing_uses_it(
    built: Path, tmp_path: Path, own_build: Path
) -> None:
    shutil.copytree(built / "build" / "image", own_build / "image")
    run_stage("image", "measure-batches", build=own_build)
    measured = read_measured("image", "onnxruntime")
    assert measured is not None
    assert measured.times[0].rows == 1
    assert (measured.instances, measured.cpu, measured.skipped) == (2, this_cpu(), "")
    chosen = json.loads((own_build / "image" / "choice-onnxruntime.json").read_text())["chosen"]
    slow = measured_as({1: 7.0, 2: 9.0, 4: 14.0, 8: 28.0}, precision=chosen, threads=measured.threads, cpu=measured.cpu)
    batches_path("image", "onnxruntime").write_text(slow.model_dump_json())
    spec = IMAGE.model_copy(update={"slo": IMAGE.slo.model_copy(update={"p99_ms": 60.0})})
    publish_version(spec, chosen, "onnxruntime", tmp_path / "repository")
    batching = read_config(tmp_path / "repository" / "image" / "config.pbtxt").dynamic_batching
    manifest = PublishedManifest.load(tmp_path / "repository" / "image" / "1" / "manifest.json")
    assert list(batching.preferred_batch_size) == [4]
    assert batching.default_queue_policy.default_timeout_microseconds == 31_000
    assert manifest.batching is not None
    assert manifest.batching.measured == slow


@pytest.mark.parametrize(
    ("provider", "backend", "why"),
    [("cuda", "python", "execution provider cuda"), ("cpu", "onnxruntime", "Triton's own ONNX Runtime backend")],
)
def test_accelerators_and_tritons_own_backend_are_not_measured(provider: str, backend: Any, why: str) -> None:
    spec = IMAGE.model_copy(update={"onnxruntime": IMAGE.onnxruntime.model_copy(update={"backend": backend})})
    assert measured_batches(spec, "fp32", provider, "onnxruntime").skipped == f"not measured on {why}"


def test_a_missing_provider_is_one_line_and_an_output_file_leaves_its_neighbours_alone(
    built: Path, tmp_path: Path, run_here: RunHere, refused: Refused
) -> None:
    shutil.copytree("tests/models/image", tmp_path / "image")
    toml = tmp_path / "image" / "deploy.toml"
    which = ("measure-batches", "--models", str(tmp_path), "--model", "image", "--precision", "fp32")
    output, neighbour = tmp_path / "times", tmp_path / "times.csv"
    neighbour.write_text("mine")
    environment = {"DEEPSEEK_BUILD": str(built / "build")}
    assert run_here(*which, "--output", str(output), **environment).returncode == 0
    assert MeasuredBatches.model_validate_json(output.read_bytes()).times
    assert neighbour.read_text() == "mine"
    toml.write_text(toml.read_text() + '[onnxruntime]\nprovider = "cann"\n')
    assert refused(*which, **environment).startswith("error: execution provider 'cann' is not in ONNX Runtime")


def test_instances_with_more_threads_than_cores_compute_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_batches, "this_cpu", lambda: Cpu(model="EPYC", cores=4))

    def at_once(**batching: Any) -> tuple[int, int]:
        found = measured_batches(spec_of(**batching), "fp32", "cuda", "onnxruntime")
        return found.at_once, found.threads

    assert at_once(instances=2, threads=2) == (2, 2)
    assert at_once(instances=6, threads=2) == (2, 2)
    assert at_once(instances=2, threads=None) == (2, 2)
    assert at_once(instances=2, threads=8) == (1, 8)


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd asimddp", True),
        ("isa\t: rv64imafdc", None),
    ],
)
def test_a_cpu_has_dot_products_of_8_bit_integers_if_the_kernel_says_so(
    tmp_path: Path, line: str, has: bool | None
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert has_int8_dot_products(tmp_path / "cpuinfo") is has
    assert has_int8_dot_products(tmp_path / "none") is None


# -- what Triton does with it ---------------------------------------------------------------------

RECORDING = ADD_ONE.replace(
    "        time.sleep(self.delay_s)\n",
    """        import os
        rows = [np.from_dlpack(pb_utils.get_input_tensor_by_name(each, "x")).shape[0] for each in requests]
        with open(os.environ["BATCHES"], "a") as file:
            print(rows, file=file, flush=True)
        while len(rows) == 1 and rows[0] == 7 and not os.path.exists(os.environ["BATCHES"] + ".go"):
            time.sleep(0.01)
""",
)


WAITING = 'nv_inference_pending_request_count{model="add_one",version="1"}'


def test_triton_joins_up_to_the_preferred_batch_and_runs_larger_requests_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One instance is held by a request of 7 rows while nine others queue up behind it."""
    batches, version = tmp_path / "batches", tmp_path / "repository" / "add_one" / "1"
    monkeypatch.setenv("BATCHES", str(batches))
    version.mkdir(parents=True)
    (version / "model.py").write_text(RECORDING)
    config = ModelConfig(name="add_one", backend="python", max_batch_size=8)
    config.input.add(name="x", data_type="TYPE_FP32", dims=[2])
    config.output.add(name="y", data_type="TYPE_FP32", dims=[2])
    config.instance_group.add(count=1, kind="KIND_CPU")
    wanted = model_config(spec_of(most=8, queue_timeout_ms=60_000, preferred_batch=4), "fp32", "onnxruntime", {})
    config.dynamic_batching.CopyFrom(wanted.dynamic_batching)
    (version.parent / "config.pbtxt").write_text(str(config))

    with (
        EmbeddedServer(tmp_path / "repository", **FREE, log_path=tmp_path / "log") as server,
        InferenceClient(server.grpc_url, "grpc") as client,
        InferenceClient(server.http_url, "http") as other,
        ThreadPoolExecutor(10) as pool,
    ):
        for each in (client, other):
            found = ServerSettings.of(each.metadata("add_one"))
            assert (found.max_batch, found.preferred_batch) == (8, 4)

        def send(rows: int) -> Any:
            return pool.submit(client.infer, "add_one", {"x": np.zeros((rows, 2), np.float32)})

        sent = [send(7)]
        wait_for(lambda: batches.is_file() and batches.read_text() == "[7]\n")
        for waiting, rows in enumerate([1, 1, 1, 1, 1, 1, 6, 1, 1], 1):
            sent.append(send(rows))
            wait_for(lambda: counter(server, WAITING), partial(eq, waiting))
        Path(f"{batches}.go").touch()
        for answer in sent:
            answer.result(timeout=60)
    assert batches.read_text().split("\n")[1:-1] == ["[1, 1, 1, 1]", "[1, 1]", "[6]", "[1, 1]"]
