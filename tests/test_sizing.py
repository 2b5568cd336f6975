"""`deepseek plan`: plans for people and machines, and one-line errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import main, values_of
from deepseek.sizing.devices import THIS_MACHINE, load_devices
from deepseek.sizing.plan_hardware import planned
from deepseek.spec import InputError

SIZES = ["--layers", "4", "--hidden", "64", "--heads", "4"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the measured machine of this checkout."""
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "build"))


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `deepseek plan …` in this process."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = main(["plan", *arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


def test_a_plan_is_short_and_names_what_it_predicts(plan: Run) -> None:
    run = plan("--preset", "bert-base", "--length", "384", "--rate", "2000", "--p99-ms", "30")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) < 55
    for word in (
        "109 million parameters",
        "checkpointing",
        "RAM 3.48 GB to 5.23 GB",
        "a100-80",
        "USD a month",
        "~prediction",
    ):
        assert word in run.stdout


def test_json_has_the_whole_plan(plan: Run) -> None:
    run = plan(*SIZES, "--json", "--device", "t4", "--rate", "10")
    found = json.loads(run.stdout)
    assert found["training"]["fp32"]["total_bytes"] > found["training"]["fp32"]["activation_bytes"] > 0
    assert found["devices"]["t4"]["training"]["way"] == "single"
    assert found["devices"]["t4"]["bill"]["replicas"] == 2


def test_json_has_null_where_no_number_of_devices_can_share_a_product(plan: Run) -> None:
    run = plan("--preset", "gpt2-xl", "--json", "--device", "t4")  # 25 heads
    found = json.loads(run.stdout, parse_constant=pytest.fail)
    (tensor,) = [way for way in found["devices"]["t4"]["training_ways"] if way["way"] == "tensor"]
    assert (tensor["devices"], tensor["memory_bytes"]) == (None, None)


def test_a_generating_model_is_planned_in_tokens(plan: Run) -> None:
    for flags, unit in ((["--generate"], "tokens/s"), ([], "samples/s")):
        assert f"latency {unit}" in re.sub(" +", " ", plan(*SIZES, *flags).stdout)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "bert-base", "--layers", "3"], "seen --preset and --layers"),
        (["--preset", "bert"], "--preset: seen 'bert'; allowed: bert-base"),
        (["--layers", "3"], "--layers: --hidden is missing"),
        (["--layers", "3", "--hidden", "10", "--heads", "3"], "not divisible by num_attention_heads 3"),
        ([*SIZES, "--rate", "0"], "rate_rps: seen 0.0"),
        ([*SIZES, "--rate", "14", "--capacity", "nowhere.json"], "nowhere.json: cannot be read"),
        ([*SIZES, "--disk-mb-s", "0"], "disk_bytes_s: seen 0; a number above 0"),
        ([*SIZES, "--devices", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["--onnx", "README.md"], "README.md: not an ONNX file"),
        (["--onnx", "nowhere.onnx"], "nowhere.onnx: cannot be read"),
        (["--onnx", "x.onnx", "--axis", "length"], "--axis: seen 'length'; NAME=SIZE"),
        (["--model", "recommender"], "not built; build it with: make engine MODEL=recommender"),
        (["--model", "nosuch"], "no model 'nosuch'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_one_line_error_and_exit_2(arguments: list[str], says: str, plan: Run) -> None:
    run = plan(*arguments)
    assert run.returncode == 2
    assert says in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_device_of_1_gb_is_planned_and_says_what_does_not_fit(tmp_path: Path, plan: Run) -> None:
    text = 'name = "Small"\nmemory_gib = 1\nbandwidth_gb_s = 50\ncompute_units = 4\nrates = { fp32 = 1 }\nsource = "mine"\n'
    (tmp_path / "mine.toml").write_text(f"[small]\n{text}")
    run = plan("--preset", "gpt2-xl", "--devices", str(tmp_path / "mine.toml"), "--rate", "5")
    assert run.returncode == 0, run.stderr
    assert "does not fit" in run.stdout
    assert "small     single: needs more than 80 % of 1 GiB" in run.stdout


def test_a_graph_is_planned_at_deploy_tomls_sizes_and_measured_here(built: Path, tmp_path: Path, plan: Run) -> None:
    shutil.copytree(built / "build" / "text", tmp_path / "build" / "text")
    arguments = ("--model", "text", "--models", "tests/models", "--measure", "--device", THIS_MACHINE, "--rate", "5")
    run = plan(*arguments)
    assert run.returncode == 0, run.stderr
    assert "on this machine, one instance" in run.stdout
    assert load_devices()[THIS_MACHINE].rates.keys() == {"fp32", "int8"}
    found = planned(values_of("plan", *arguments))
    assert (there := found.devices[THIS_MACHINE]).calibrated
    assert there.capacity is not None
    assert there.capacity.batch == 8  # deploy.toml's largest, at 5/s within 50 ms
    with pytest.raises(InputError, match=r"model.onnx: axis: seen 'lenght'; allowed: length "):
        planned(values_of("plan", *arguments, "--axis", "lenght=8"))
    assert found.notes


def test_the_measured_capacity_is_shown_beside_the_predictions(tmp_path: Path, plan: Run) -> None:
    path = tmp_path / "capacity.json"
    path.write_text(json.dumps({"capacity_rps": 7.0, "objectives": ["p99_ms <= 20 ms"]}))
    asked = ["--rate", "14", "--p99-ms", "20", "--growth", "0", "--capacity", str(path), "--price", "0.5"]
    found = planned(values_of("plan", *SIZES, *asked))
    assert found.measured is not None
    assert found.measured.bill is not None
    assert (found.measured.bill.replicas, found.measured.bill.month_usd) == (3, 3 * 0.5 * 730)
    run = plan(*SIZES, *asked)
    assert re.search(r"as measured +7/s +- +3 +1,095 +\S+ measurement", run.stdout)
