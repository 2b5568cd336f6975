"""Reading deploy.toml: its values, and the one-line error for each mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from deepseek.precisions import PRECISIONS, Precision
from deepseek.spec import DeploymentSpec, InputError, Objective, SloSpec, TunedBatching, TunedFile, TunedTarget
from deepseek.spec.deployment import NO_MODELS
from deepseek.spec.files.folders import write_whole
from deepseek.spec.tables import BUILT_DTYPES
from deepseek.targets import PROVIDERS, TARGETS, Provider, Target
from tests.conftest import Refused, RunHere

GOOD = Path("models/recommender/deploy.toml").read_text()

MISTAKES = {
    "unknown key": ("p99_ms = 50", "p9_ms = 50", "slo.p9_ms: unknown key (seen 50); allowed:", "did you mean p99_ms?"),
    "a table in capitals": ("[slo]", "[SLO]", "SLO: unknown key", "did you mean slo?"),
    "misspelt required key": ('dtype = "int64"', 'dtipe = "int64"', "inputs.item_ids.dtipe: unknown key", "dtype"),
    "min above opt": ("min = 1", "min = 17", "axes.batch: seen min 17, opt 16, max 64", "min <= opt <= max"),
    "an undeclared axis": ('["batch", 50]', '["batch", "length"]', "inputs.item_ids.shape: seen 'length'; axes are batch", "add [axes.length]"),
    "an output's own axis": ('["batch", 20]', '["batch", "top"]', "outputs.items.shape: seen 'top'; allowed: a number, or an axis of an input (batch)", "return its true size"),
    "an unused axis": ("[precision]", "[axes.time]\nmin = 1\nopt = 1\nmax = 1\n[precision]", "axes.time: no input has this axis", ""),
    "batch not first": ('["batch", 50]', '[50, "batch"]', "inputs.item_ids.shape", 'the first dimension must be the axis "batch"'),
    "dtype": ("int64", "int65", "inputs.item_ids.dtype: seen 'int65'", "'int64'"),
    "text for a number": ("opt = 16", 'opt = "16"', "axes.batch.opt: seen '16'", "a whole number is needed"),
    "true for a number": ("p99_ms = 50", "p99_ms = true", "slo.p99_ms: seen true; a number is needed", ""),
    "a candidate twice": ('["fp16", "int8"]', '["int8", "int8"]', "precision.candidates: seen ['int8', 'int8']", "name each precision once"),
    "unknown override": ("p99_ms = 80", "p98_ms = 80", "targets.onnxruntime.slo.p98_ms: unknown key", "p99_ms"),
    "wrong objective of a target": ("p99_ms = 80", 'objectives = ["p99_ms > 80"]', "targets.onnxruntime.slo.objectives: seen 'p99_ms > 80'", "needs an upper limit"),
    "a number for a target's objectives": ("p99_ms = 80", "objectives = 3", "targets.onnxruntime.slo.objectives: seen 3", "a list is needed"),
    "a reserved name": ('name = "recommender"', 'name = "gateway"', "name: seen 'gateway', but build/gateway is reserved", "serving, site, stack"),
    "unknown target": ("targets.onnxruntime", "targets.onnx", "targets.onnx", "'onnxruntime'"),
    "unbounded queue": ("max_queue_delay_us = 1000", "max_queue_size = 0", "batching.max_queue_size: seen 0", "greater than"),
    "input named as an output": ("outputs.items", "outputs.item_ids", "outputs.item_ids", "same name"),
    "CUDA graph batches without CUDA graphs": ("[slo]", "[tensorrt]\ncuda_graph_batches = [1]\n[slo]", "tensorrt.cuda_graph_batches: seen [1]", "cuda_graphs is not true"),
    "a CUDA graph batch past the axis": ("[slo]", "[tensorrt]\ncuda_graphs = true\ncuda_graph_batches = [65]\n[slo]", "tensorrt.cuda_graph_batches: seen 65", "1 to 64"),
    "missing name": ('name = "recommender"', "", "name: missing", ""),
    "an infinite rate": ("rate_rps = 100", "rate_rps = inf", "slo.rate_rps: seen inf", "finite"),
    "a delay past the timeout": ("max_queue_delay_us = 1000", "max_queue_delay_us = 200000\nqueue_timeout_ms = 25", "batching.max_queue_delay_us: seen 200000", "less than queue_timeout_ms (25 ms)"),
    "a delay past the timeout of a target": ("max_queue_delay_us = 0 ", "max_queue_delay_us = 50000\nqueue_timeout_ms = 20 ", "targets.onnxruntime.batching.max_queue_delay_us: seen 50000", "less than queue_timeout_ms (20 ms)"),
    "an axis that is not a Python identifier": ("axes.batch", 'axes."x²"', "axes.x²: seen 'x²'", "a Python identifier"),
    "a slash in a tensor": ("inputs.item_ids", 'inputs."item/ids"', "inputs.item/ids: seen 'item/ids'", "no space or slash"),
    "true for a size": ('["batch", 50]', '["batch", true]', "inputs.item_ids.shape: seen ['batch', True]", "sizes from 1"),
    "text for a list": ('["fp16", "int8"]', '"int8"', "precision.candidates: seen 'int8'", "a list is needed"),
    "a path for a name": ('name = "recommender"', 'name = "../x"', "name: seen '../x'", ""),
    "options without a provider": ("[slo]", "[onnxruntime.options]\ndevice_id = 1\n[slo]", "onnxruntime.options: provider is auto", "name an accelerator"),
    "AMD with Triton's own backend": ("[slo]", '[onnxruntime]\nprovider = "migraphx"\nbackend = "onnxruntime"\n[slo]', "onnxruntime.backend: ", "no migraphx"),
    "another name of strings": ('dtype = "int64"', 'dtype = "BYTES"', "inputs.item_ids.dtype: seen 'BYTES'", "or 'string'"),
    "an optional input": ('dtype = "int64"', 'dtype = "int64"\noptional = true', "inputs.item_ids: seen optional", "every input is sent with each request"),
    "a batch too large for Triton": ("max = 64", "max = 3000000000", "axes.batch.max: seen 3000000000", "less than or equal to 2147483647"),
    "tuned values in deploy.toml": ('tuned = "tuned.toml"', 'tuned = "deploy.toml"', "tuned: seen 'deploy.toml'", "name a separate file for tuned values"),
    "an unknown tolerance": ("[slo]", "[parity.int8]\ncosin = 0.9\n[slo]", "parity.int8.cosin: unknown key (seen 0.9)", "allowed: common, cosine, worst_error"),
    "a negative tolerance": ("[slo]", "[parity.fp32]\nworst_error = -1\n[slo]", "parity.fp32.worst_error: seen -1", ""),
    "a tolerance of NaN": ("[slo]", "[parity.fp8]\ncommon = nan\n[slo]", "parity.fp8.common: seen nan", "it must be a finite number"),
    "NaN inputs neither a gate nor a report": ("[slo]", '[parity]\nnonfinite_inputs = "no"\n[slo]', "parity.nonfinite_inputs: seen 'no'", "it must be 'gate' or 'report'"),
    "not TOML": ('name = "recommender"', "name = /", "not valid TOML", "line 2"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "rows", "where"),
    [
        (Precision, PRECISIONS, "Precision and PRECISIONS of deepseek/precisions.py"),
        (Target, TARGETS, "Target and TARGETS of deepseek/targets.py"),
        (Provider, ["auto", *PROVIDERS], "Provider of deepseek/targets.py, PROVIDERS of onnxruntime_session.py"),
    ],
)
def test_each_name_that_deploy_toml_accepts_has_a_row(names: Any, rows: Any, where: str) -> None:
    assert list(get_args(names)) == list(rows), where


@pytest.mark.parametrize(("old", "new", "key", "hint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_the_file_the_key_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, key: str, hint: str
) -> None:
    assert old in GOOD
    path = tmp_path / "deploy.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(InputError) as caught:
        DeploymentSpec.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert key in message
    assert hint in message


@pytest.mark.parametrize("command", ["engine", "publish"])
@pytest.mark.parametrize(
    ("tensor", "dtype", "advice"),
    [
        ("inputs.pixels", "string", "let callers send token ids or category ids (int64)"),
        ("outputs.scores", "float64", "use one of these, and cast in forward"),
    ],
)
def test_a_type_that_is_only_for_load_tests_is_not_built(
    tmp_path: Path, refused: Refused, command: str, tensor: str, dtype: str, advice: str
) -> None:
    path = tmp_path / "image" / "deploy.toml"
    path.parent.mkdir()
    before, table, after = Path("tests/models/image/deploy.toml").read_text().partition(f"[{tensor}]")
    path.write_text(before + table + re.sub('dtype = "[a-z0-9]+"', f'dtype = "{dtype}"', after, count=1))
    assert DeploymentSpec.load(path)
    said = refused(command, "--model", "image", "--models", str(tmp_path))
    assert f"{path}: {tensor}.dtype: seen '{dtype}', which is only for load tests" in said
    assert f"a build takes {', '.join(BUILT_DTYPES)}: {advice}" in said


def test_every_key_is_listed_with_its_type_default_and_meaning(run_here: RunHere) -> None:
    keys = {key["name"]: key for key in json.loads(run_here("spec", "--keys", "--json").stdout)}
    assert keys["batching.instances"]["takes"] == "a whole number from 1 to 1024"
    assert keys["precision.candidates"]["default"] == '["fp16", "int8"]'
    assert keys["axes.<axis>.opt"]["default"] is None
    assert [name for name, key in keys.items() if not key["meaning"]] == []


def test_a_target_overrides_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "deploy.toml"
    path.write_text(GOOD.replace("p99_ms = 80", 'p99_ms = 80\nobjectives = ["p99.9_ms < 80"]'))
    spec = DeploymentSpec.load(path)
    onnxruntime = spec.for_target("onnxruntime")
    assert (spec.slo.p99_ms, onnxruntime.slo.p99_ms) == (50, 80)
    assert onnxruntime.slo.rate_rps == spec.slo.rate_rps == 100
    assert (spec.batching.max_queue_delay_us, onnxruntime.batching.max_queue_delay_us) == (1000, 0)
    assert onnxruntime.batching.instances == spec.batching.instances
    assert (spec.slo.objectives, onnxruntime.slo.objectives) == ((), ("p99.9_ms < 80",))
    assert spec.for_target("tensorrt") == spec


def test_every_other_folder_in_build_is_a_reserved_name() -> None:
    code = "".join(file.read_text() for room in ("cli", "serving") for file in Path(room).rglob("*.py"))
    of_build = r'build_dir\(|build_dir\(""\) / |(?:args|options)\.build / |folder\.with_name\('
    found = set(re.findall(rf'(?:{of_build})"([\w-]+)"', code))
    assert {"gateway", "gpu-check", "serving", "site"} <= found <= NO_MODELS


def test_shapes_come_from_the_corners_of_the_profile() -> None:
    spec = DeploymentSpec.load("tests/models/text")
    assert spec.shape("input_ids", "min") == (1, 1)
    assert spec.shape("input_ids", "max") == (8, 64)
    assert spec.shape("embedding", "opt") == (4, 32)
    assert spec.shape("input_ids", "opt", length=5) == (4, 5)


def test_a_model_is_found_by_the_name_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "deploy.toml").write_text(GOOD)
    with pytest.raises(InputError, match=r"no model 'nosuch' .* has shop"):
        DeploymentSpec.of_model("nosuch", tmp_path)
    with pytest.raises(InputError, match="name: seen 'recommender'; it must equal the folder's name, 'shop'"):
        DeploymentSpec.of_model("shop", tmp_path)


def test_importing_the_library_loads_neither_torch_nor_onnx() -> None:
    code = """if True:
        import sys; from deepseek import DeploymentSpec, QuantConfig, TransformerConfig
        sys.exit(bool({'torch', 'onnx', 'onnxruntime', 'numpy'} & sys.modules.keys()))"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("p99_ms < 50", {"measure": "p99_ms", "relation": "<", "limit": 50, "kind": "ms"}),
        ("p99.9_ms<=80 ms @ 200 rps", {"percent": 99.9, "limit": 80, "rate_rps": 200, "kind": "ms"}),
        ("error_rate < 0.1%", {"limit": 0.001, "kind": "error_rate"}),
        ("throughput >= 150", {"limit": 150, "relation": ">=", "kind": "throughput"}),
        ("ndcg@10 >= 0.99 * baseline", {"measure": "ndcg@10", "of_baseline": True, "kind": "quality"}),
    ],
)
def test_an_objective_is_parsed_from_one_line(line: str, expected: dict[str, object]) -> None:
    objective = Objective.parse(line)
    assert {name: getattr(objective, name) for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fast", "an objective is <measure> <relation> <limit>"),
        ("p99_ms > 50", "needs an upper limit"),
        ("throughput < 50", "needs a lower limit"),
        ("p99 < 50", "did you mean p99_ms?"),
        ("p100_ms < 50", "between 0 and 100"),
        ("p99_ms < 5%", "does not take the unit %"),
        ("p99_ms < 0", "a latency limit must be above 0"),
        ("error_rate < 1", "a share must be below 1, or 100%; one per cent is 1%"),
        ("error_rate < 0%", "a share cannot be below 0; to allow no errors: error_rate <= 0"),
        ("p99_ms < 1 * baseline", "only a quality metric"),
        ("p99_ms < 5 @ 0 rps", "a rate must be above 0"),
        ("throughput >= 150 @ 100 rps", "cannot exceed the request rate: set the rate to 150 rps or more"),
        ("accuracy > 0.9", "unknown measure 'accuracy'; known: p<percent>_ms, mean_ms, max_ms, error_rate,"),
    ],
)
def test_a_wrong_objective_is_one_line_before_any_load(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "deploy.toml"
    path.write_text(GOOD.replace('metric = "ndcg@10"', "").replace("[slo]", f'[slo]\nobjectives = ["{line}"]'))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        DeploymentSpec.load(path)
    assert f"{path}: slo.objectives" in str(caught.value)


def test_an_error_rate_line_replaces_the_default_limit() -> None:
    names = [line.name for line in SloSpec(objectives=("error_rate < 5%",)).all_objectives()]
    assert names == ["error_rate"]
    both = SloSpec(max_error_rate=0.01, objectives=("error_rate < 5%",)).all_objectives()
    assert [line.name for line in both] == ["max_error_rate", "error_rate"]


def test_a_full_disk_and_a_file_where_a_folder_should_be_are_one_line_and_exit_2(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "cli", "spec", "models/recommender", "--json"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    places = "(BUILD=, REPOSITORY=, MODELS=, CACHE=, ENV_FILE=, TMPDIR=)"
    assert f"No space left on device; free some space, or use another disk {places}" in run.stderr
    (tmp_path / "file").touch()
    environment, where = os.environ | {"DEEPSEEK_BUILD": str(tmp_path / "file")}, tmp_path / "file" / "gateway"
    command = [sys.executable, "-m", "cli", "keys", "--name", "shop"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stderr == f"error: {where}: Not a directory; use another path {places}\n"


def test_a_file_that_cannot_be_written_is_named_by_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)  # its draft has a longer name, which no file system takes
    with pytest.raises(OSError, match="File name too long") as error:
        write_whole(path, "")
    assert error.value.filename == str(path)


TUNED = '[targets.onnxruntime]\nmeasured = "here"\n[targets.onnxruntime.batching]\nmax_batch = 8\nthreads = 1\n'


def test_tuned_values_override_those_of_their_target(tmp_path: Path) -> None:
    (tmp_path / "deploy.toml").write_text(GOOD)
    before = DeploymentSpec.load(tmp_path).for_target("onnxruntime")
    assert (before.max_served_batch, before.batching.threads) == (64, None)
    (tmp_path / "tuned.toml").write_text(TUNED)
    after = DeploymentSpec.load(tmp_path)
    batching = after.for_target("onnxruntime").batching
    assert (batching.max_batch, batching.threads) == (8, 1)
    assert batching.max_queue_delay_us == before.batching.max_queue_delay_us
    assert after.for_target("tensorrt").max_served_batch == 64
    assert after.max_batch == 64  # the profile is unchanged
    assert DeploymentSpec.load(tmp_path, tuned=os.devnull).for_target("onnxruntime") == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_batch = 8", "max_batch = 65", "targets.onnxruntime.batching.max_batch: seen 65; axis batch allows 1 to 64"),
        ("threads", "treads", "targets.onnxruntime.batching.treads: unknown key (seen 1); allowed: instances, max_batch,"),
        ("threads = 1", "p99_ms = 1", "p99_ms: unknown key"),
        ("onnxruntime.batching", "onnx.batching", "targets.onnx"),
        ("= 8", "=", "not valid TOML"),
    ],
    ids=["past the axis", "unknown key", "not a batching key", "unknown target", "not TOML"],
)  # fmt: skip
def test_a_mistake_in_the_tuned_values_is_one_line_that_names_their_file(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "deploy.toml").write_text(GOOD)
    (tmp_path / "tuned.toml").write_text(TUNED.replace(old, new))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        DeploymentSpec.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tuned.toml'}: ")


def test_writing_tuned_values_keeps_those_of_other_targets(tmp_path: Path) -> None:
    path = tmp_path / "tuned.toml"
    path.write_text(TUNED)
    values = TunedTarget(measured='"x" on 2 cores', batching=TunedBatching(instances=2), cuda_graphs=True)
    TunedFile.read(path).with_target("tensorrt", values).write(path)
    found = TunedFile.read(path).targets
    assert found["tensorrt"] == values
    assert found["onnxruntime"].batching == TunedBatching(max_batch=8, threads=1)
    assert path.read_text().startswith("# Written by `make tune`")
    assert [left.name for left in tmp_path.iterdir()] == ["tuned.toml"]


def test_a_server_that_takes_smaller_batches_has_a_smaller_profile() -> None:
    spec = DeploymentSpec.load("tests/models/text")
    cut = spec.with_batches_up_to(3)
    assert (cut.shape("input_ids", "max"), cut.shape("input_ids", "opt")) == ((3, 64), (3, 16))
    assert spec.with_batches_up_to(100) == spec
