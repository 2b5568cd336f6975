"""`deepseek plan`: plans for people and machines, the file of devices, replicas and cost, one-line errors."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import pytest

from deepseek.sizing import presets
from deepseek.sizing.cost import SERVER_MS, Demand, Serving, bill, measured_serving, predicted_serving
from deepseek.sizing.devices import THIS_MACHINE, Device, load_devices, measured_path, read_devices, write_device
from deepseek.sizing.measure import measure_graph
from deepseek.sizing.roofline import predict
from deepseek.spec import InputError
from deepseek.spec.objectives import SloSpec, p99_limits
from tests.add_one import replace_in
from tests.conftest import Refused, RunHere

SIZES = ["--layers", "4", "--hidden", "64", "--heads", "4"]
MINE = """[mine]
name = "Mine"
memory_gib = 1
bandwidth_gb_s = 50
compute_units = 4
rates = { fp32 = 1, fp16 = 2.5 }
source = "a datasheet"
"""
DEVICES = read_devices(Path("deepseek/devices.toml"))
BERT = presets()["bert-base"]


@pytest.fixture(autouse=True)
def elsewhere(own_build: Path) -> None:
    """Hides the measured machine of this checkout."""


@pytest.fixture
def plan(run_here: RunHere) -> RunHere:
    """Runs `deepseek plan …` in this process."""
    return partial(run_here, "plan")


def saved(path: Path, graph: str) -> Path:
    """Writes an ONNX file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> g {graph}'), path)
    return path


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file with one device of 1 GiB."""
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    return path


def test_a_plan_is_short_and_names_what_it_predicts(plan: RunHere) -> None:
    run = plan("--preset", "bert-base", "--length", "384", "--rate", "2000", "--p99-ms", "30")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) < 55
    parts = ("109 million parameters", "checkpointing", "RAM 3.48 GB to 5.23 GB", "a100-80", "samples/s", "~prediction")
    assert [part for part in parts if part not in run.stdout] == []
    assert "tokens/s" in plan(*SIZES, "--generate").stdout


def test_json_has_the_whole_plan_with_null_for_what_is_impossible(plan: RunHere) -> None:
    found = json.loads(plan(*SIZES, "--json", "--device", "t4", "--rate", "10").stdout)
    assert found["training"]["fp32"]["total_bytes"] > found["training"]["fp32"]["activation_bytes"] > 0
    assert found["devices"]["t4"]["training"]["way"] == "single"
    assert found["devices"]["t4"]["bill"]["replicas"] == 2
    found = json.loads(plan("--preset", "gpt2-xl", "--json", "--device", "t4").stdout, parse_constant=pytest.fail)
    (tensor,) = [way for way in found["devices"]["t4"]["training_ways"] if way["way"] == "tensor"]
    assert (tensor["devices"], tensor["memory_bytes"]) == (None, None)  # no number of devices divides 25 heads


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "bert-base", "--layers", "3"], "seen --preset and --layers"),
        (
            ["--preset", "bert-base", "--max-length", "64"],
            "--max-length: only with --layers; --preset has its own sizes",
        ),
        (["--preset", "bert"], "--preset: seen 'bert'; allowed: bert-base"),
        (["--layers", "3"], "--layers: --hidden is missing"),
        (
            ["--preset", "gpt2-xl", "--head", "none"],
            "--head: only with --layers; --preset has its own sizes",
        ),
        ([*SIZES, "--axis", "length=8"], "--axis length=8: only for a graph; leave it out of --layers"),
        ([*SIZES, "--rate", "0"], "--rate: seen '0'; a number, 1e-6 to 1e12, is needed"),
        ([*SIZES, "--rate", "5", "--growth", "1e308"], "--growth: seen '1e308'; a number, 0 to 1e12, is needed"),
        (["--layers", f"{10**20}", *SIZES[2:]], "a whole number, 1 to 1,000,000,000, is needed"),
        ([*SIZES, "--rate", "14", "--capacity", "nowhere.json"], "nowhere.json: cannot be read"),
        ([*SIZES, "--capacity", "nowhere.json"], "--capacity: only with --rate, which adds replicas and cost"),
        (
            [*SIZES, "--rate", "5", "--price", "1"],
            "--price: the machine of make capacity costs this, but it has no result",
        ),
        ([*SIZES, "--disk-mb-s", "0"], "--disk-mb-s: seen '0'; a number, 1e-6 to 1e12, is needed"),
        (["--onnx", "README.md"], "README.md: not an ONNX file"),
        (["--onnx", "nowhere.onnx"], "nowhere.onnx: cannot be read"),
        (["--onnx", "x.onnx", "--axis", "length"], "--axis: seen 'length'; NAME=SIZE"),
        (["--model", "recommender"], "not built; build it with: make engine MODEL=recommender"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_one_line_error_and_exit_2(arguments: list[str], says: str, refused: Refused) -> None:
    assert says in refused("plan", *arguments)


def test_a_graph_is_planned_at_deploy_tomls_sizes_and_measured_here(built: Path, tmp_path: Path, plan: RunHere) -> None:
    shutil.copytree(built / "build" / "text", tmp_path / "build" / "text")
    arguments = ("--model", "text", "--models", "tests/models", "--device", THIS_MACHINE, "--rate", "5")
    run = plan(*arguments, "--measure")
    assert run.returncode == 0, run.stderr
    assert "on this machine, one instance" in run.stdout
    assert load_devices()[THIS_MACHINE].rates.keys() == {"fp32", "int8"}
    found = json.loads(plan(*arguments, "--json").stdout)
    assert found["devices"][THIS_MACHINE]["calibrated"]
    assert found["devices"][THIS_MACHINE]["capacity"]["batch"] == 8  # deploy.toml's largest, at 5/s within 50 ms
    assert found["notes"]
    assert "model.onnx: axis: seen 'lenght'; allowed: length " in plan(*arguments, "--axis", "lenght=8").stderr


def test_an_axis_of_one_size_is_a_plain_number_in_the_graph(own_build: Path, tmp_path: Path, plan: RunHere) -> None:
    shutil.copytree("tests/models/text", tmp_path / "models" / "text")
    toml = tmp_path / "models" / "text" / "deploy.toml"
    replace_in(toml, "min = 1\nopt = 16\nmax = 64", "min = 16\nopt = 16\nmax = 16")
    saved(
        own_build / "text" / "fp32" / "model.onnx", "(float[batch, 16] x) => (float[batch, 16] y) { y = Softmax (x) }"
    )
    arguments = ("--model", "text", "--models", str(tmp_path / "models"))
    assert json.loads(plan(*arguments, "--json").stdout)["length"] == 16
    assert "--length 8: all axes of text besides the batch have one size" in plan(*arguments, "--length", "8").stderr


def test_a_plan_of_a_file_is_headed_by_the_files_name(tmp_path: Path, plan: RunHere) -> None:
    path = saved(
        tmp_path / "data" / "models" / "net.onnx", "(float[batch, 4] x) => (float[batch, 4] y) { y = Softmax (x) }"
    )
    assert plan("--onnx", str(path)).stdout.startswith(f"net ({path}): ")


def test_of_two_ways_to_serve_on_as_many_devices_the_faster_is_chosen(plan: RunHere) -> None:
    large = ("--layers", "80", "--hidden", "8192", "--heads", "64", "--max-length", "4096", "--generate")
    found = json.loads(plan(*large, "--device", "h100", "--json").stdout)["devices"]["h100"]
    # A pipeline of four needs as many, but a token passes all weights one after the other: 129 GB at 3.35 TB/s.
    assert (found["serving"]["way"], found["serving"]["devices"]) == ("tensor", 4)
    assert found["latency_ms"] < 129 / 3.35


def test_every_device_of_the_project_has_a_source() -> None:
    devices = load_devices()
    assert {"t4", "v100-16", "a10", "l4", "a100-80", "h100", "b200", "mi300x", "ascend-910b"} <= devices.keys()
    assert all(len(device.source) > 20 for device in devices.values())
    assert all(device.rates["fp16"] > device.rates["fp32"] for device in devices.values())


def test_your_own_file_replaces_the_projects_devices(mine: Path, plan: RunHere) -> None:
    (device,) = load_devices(mine).values()
    assert (device.rate("fp16"), device.usable_bytes) == (2.5e12, 0.8 * 2**30)
    with pytest.raises(InputError, match="Mine has no rate for int8; it has fp16, fp32"):
        device.rate("int8")
    run = plan("--preset", "gpt2-xl", "--devices", str(mine), "--rate", "5")
    assert run.returncode == 0, run.stderr
    assert "mine      single: needs more than 80 % of 1 GiB" in run.stdout
    assert "sharded: activations are not divided: checkpoint, or use a smaller batch" in run.stdout


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("memory_gib = 1", "memory_gib = -1", "mine.memory_gib: seen -1.*greater than 0"),
        ("memory_gib = 1", "memory_gb = 1", "mine.memory_gb: unknown key .* did you mean memory_gib"),
        ("fp32 = 1, ", "", "mine.rates: seen fp16; fp32 is required"),
        ("[mine]", "[mine", "not valid TOML"),
        ("[mine]", 'mine = "yes"\n[other]', "each device is a table.*seen mine, other"),
        (MINE, "", "each device is a table"),
    ],
)
def test_a_malformed_file_of_devices_is_a_one_line_error(mine: Path, old: str, new: str, says: str) -> None:
    mine.write_text(MINE.replace(old, new))
    with pytest.raises(InputError, match=f"^{mine}: .*{says}"):
        read_devices(mine)


def test_an_unknown_device_or_file_is_an_error() -> None:
    with pytest.raises(InputError, match=r"device 'a1000' is not in .* it has t4, "):
        load_devices(names=["a1000"])
    with pytest.raises(InputError, match="MEASURE=1"):
        load_devices(names=[THIS_MACHINE])
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_devices("absent.toml")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "float16", "float", "double"])
def test_a_graph_with_inputs_of_any_type_is_measured(dtype: str, tmp_path: Path) -> None:
    graph = f"({dtype}[batch, n] x) => (float[batch, n] y) {{ y = Cast <to=1> (x) }}"
    path = saved(tmp_path / "model.onnx", graph)
    with patch("deepseek.sizing.measure.best_s", lambda run: run() and 0.5):
        assert measure_graph(path, [2], 4, {}) == {2: 500.0}


MEASURED = Device(
    name='A "CPU"',
    memory_gib=3.5,
    bandwidth_gb_s=12.25,
    compute_units=2,
    rates={"fp32": 0.125},
    launch_us=0.5,
    platform="cpu",
    source="measured",
)


def test_a_measured_machine_is_written_and_read_back() -> None:
    write_device(measured_path(), THIS_MACHINE, MEASURED)
    assert load_devices()[THIS_MACHINE] == MEASURED


def test_the_measured_machine_joins_your_own_devices_and_json_has_the_measured_graph(
    mine: Path, tmp_path: Path, plan: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "net.onnx", "(float[batch, 4] x) => (float[batch, 4] y) { y = Softmax (x) }")
    monkeypatch.setattr("deepseek.sizing.measure.measure_machine", lambda: MEASURED)
    monkeypatch.setattr("deepseek.sizing.measure.best_s", lambda run: run() and 0.5)
    found = json.loads(plan("--onnx", str(path), "--devices", str(mine), "--measure", "--json").stdout)
    assert found["devices"].keys() == {"mine", THIS_MACHINE}
    assert found["on_this_machine"]["8"]["measured_ms"] == 500


def test_replicas_handle_growth_during_scale_out_and_the_loss_of_one() -> None:
    demand = Demand(rate_rps=2000, p99_ms=30, growth_per_minute=0.1, scale_out_s=120)  # 2,400/s after two minutes
    assert bill(demand, 500, 1.0).replicas == 5 + 1
    assert bill(Demand(rate_rps=1, p99_ms=30), 500, 1.0).replicas == 2


def test_cost_per_million_is_the_monthly_cost_over_the_monthly_inferences() -> None:
    demand = Demand(rate_rps=100, p99_ms=30, growth_per_minute=0)
    found, unpriced = bill(demand, 50, 2.0), bill(demand, 50, None)
    assert found.month_usd == 3 * 2.0 * 730
    assert found.million_usd == pytest.approx(3 * 2.0 / (100 * 3600) * 1e6)
    assert (unpriced.month_usd, unpriced.million_usd) == (None, None)


def test_the_predicted_batch_meets_p99_and_the_next_does_not() -> None:
    found = predicted_serving(BERT, DEVICES["a30"], precision="fp16", length=128, p99_ms=10)
    assert isinstance(found, Serving)
    assert found.batch is not None
    sizes = (found.batch, 2 * found.batch)
    ms = [1e3 * predict(BERT, DEVICES["a30"], precision="fp16", batch=size, length=128).latency_s for size in sizes]
    assert 2 * ms[0] + SERVER_MS <= 10 < 2 * ms[1] + SERVER_MS
    assert found.capacity_rps == pytest.approx(0.7 * 1000 * found.batch / ms[0])
    limited = predicted_serving(BERT, DEVICES["a30"], precision="fp16", length=128, p99_ms=1000, most_batch=12)
    assert isinstance(limited, Serving)
    assert limited.batch == 8


def test_an_unreachable_limit_and_a_too_small_device_are_reported() -> None:
    slow = predicted_serving(BERT, DEVICES["t4"], precision="fp16", length=512, p99_ms=2)
    assert "one sample takes" in str(slow)
    tiny = DEVICES["t4"].model_copy(update={"memory_gib": 0.5})
    small = predicted_serving(BERT, tiny, precision="fp16", length=512, p99_ms=50)
    assert small == "does not fit in 80 % of 0.5 GiB"
    many = predicted_serving(BERT, DEVICES["t4"], precision="fp16", length=512, p99_ms=50, instances=10_000)
    assert "does not fit" in str(many)


def capacity(tmp_path: Path, **changes: Any) -> Path:
    """A file like the one that `make capacity` writes."""
    path = tmp_path / "capacity.json"
    objectives = ["p99_ms ≤ 50.0 ms", "rate_rps ≥ 100.0/s", "max_error_rate ≤ 0.100%"]
    found = {"model": "m", "capacity_rps": 7.0, "confirmed": True, "objectives": objectives}
    path.write_text(json.dumps(found | changes))
    return path


def test_the_measured_capacity_is_shown_beside_the_predictions(tmp_path: Path, plan: RunHere) -> None:
    asked = ["--rate", "14", "--p99-ms", "50", "--growth", "0", "--capacity", str(capacity(tmp_path)), "--price", "0.5"]
    run = plan(*SIZES, *asked)
    assert re.search(r"as measured +7/s +- +3 +1,095 +\S+ measurement", run.stdout)  # 3 x 0.5 x 730 USD


@pytest.mark.parametrize(
    ("changes", "p99_ms", "says"),
    [
        ({}, 30, "measured for p99 <= 50 ms, but the limit is 30 ms"),
        ({"capacity_rps": None}, 50, "no rate met the SLO"),
        ({"objectives": ["error_rate <= 0.1%"]}, 50, "measured for no p99"),
        ({"objectives": ["p99_ms < 5 @ 1 rps"]}, 50, "measured for no p99"),
    ],
    ids=["stricter", "none", "no-p99", "p99-of-a-lower-rate"],
)
def test_a_capacity_without_a_matching_objective_is_not_used(
    tmp_path: Path, changes: dict[str, Any], p99_ms: float, says: str
) -> None:
    assert says in str(measured_serving(capacity(tmp_path, **changes), p99_ms))


def test_objectives_as_the_capacity_search_writes_them_are_read() -> None:
    from deepseek.spec.objectives import SIGNS, formatted
    from loadtests.search.capacity_result import Capacity

    assert {"capacity_rps", "objectives", "confirmed"} <= Capacity.model_fields.keys()
    lines = SloSpec(p99_ms=80, p50_ms=9.5, rate_rps=100, objectives=("mean_ms < 20",)).all_objectives()
    written = [f"{each.name} {SIGNS[each.relation]} {formatted(each.kind, each.limit)}" for each in lines]
    assert p99_limits(written, 50) == [80.0]
