"""Parity through a real Triton: correct models pass and wrong ones are found, over both protocols."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement, Precision
from export.artifact import digests, read_manifest, write_manifest
from export.checks.parity import client_errors, compare_served, endpoints_of, what_is_served
from export.checks.parity_cases import MOST_CORNERS, apart, corners
from export.model_folder import ModelFolder
from export.rows import load_rows, save_rows
from export.stages.publish import publish_version
from export.stages.to_onnx import export_model
from serving.embedded.launcher import EmbeddedServer
from tests.add_one import replace_in
from tests.conftest import FREE, Refused, RunHere
from tests.tiny_model import FIXED, TOML, tiny

TEXT = DeploymentSpec.load("tests/models/text")
BODIES = {
    "seed": "return self.line(x)",
    "masked": "return torch.cat([x[:, :4].masked_fill(x[:, :4] < 0, -torch.inf), x[:, 4:].log()], 1)",
    "leaky": "return self.line(x) + x.mean(0)",
    "fixed": "return self.line(x) + x.mean(0)",
}
Compare = Callable[..., dict[str, Any]]


def own(path: Path) -> None:
    """Rewrites the manifest beside a graph, so that it matches the graph and the model's folder."""
    own = {"model": path.parent.parent.name, "files": digests(path.parent)}
    write_manifest(path.parent / "manifest.json", read_manifest(path).model_copy(update=own))


def copy_image(built: Path, folder: Path, name: str) -> Path:
    """The model `image` as built, under another name; returns its int8 graph."""
    shutil.copytree("tests/models/image", folder / "models" / name)
    replace_in(folder / "models" / name / "deploy.toml", 'name = "image"', f'name = "{name}"')
    shutil.copytree(built / "build" / "image", folder / "build" / name)
    path = folder / "build" / name / "int8" / "model.onnx"
    own(path)
    return path


def break_scale(path: Path) -> None:
    """Makes the activation scale of the last quantized layer eight times too large."""
    model = onnx.load(path)
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    dequantize = next(node for node in model.graph.node if quantize.output[0] in node.input)
    scale = next(each for each in model.graph.initializer if each.name == dequantize.input[1])
    wrong = numpy_helper.from_array(8 * numpy_helper.to_array(scale), "wrong_scale")
    model.graph.initializer.append(wrong)
    dequantize.input[1] = wrong.name
    onnx.save(model, path)
    own(path)


@pytest.fixture(scope="module")
def folder(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`models/`, `build/` (as $DEEPSEEK_BUILD) and `repository/` of correct and wrong models."""
    folder = tmp_path_factory.mktemp("parity")
    models, repository = folder / "models", folder / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(folder / "build"))
        for name, body in BODIES.items():
            with patch.context() as unchecked:  # otherwise the export refuses "leaky"
                unchecked.setattr("export.stages.to_onnx.check_rows_independent", lambda *_: None)
                export_model(tiny(models, name=name, body=body, toml=FIXED if name == "fixed" else TOML))
        replace_in(models / "seed" / "model.py", "manual_seed(0)", "manual_seed(1)")  # retrained and not published
        copy_image(built, folder, "image8")
        break_scale(copy_image(built, folder, "broken"))
        for name in (*BODIES, "image8", "broken"):
            precision: Precision = "int8" if name in ("image8", "broken") else "fp32"
            publish_version(DeploymentSpec.of_model(name, models), precision, "onnxruntime", repository)
        for name in ("image", "text"):
            shutil.copytree(f"tests/models/{name}", models / name)
            shutil.copytree(built / "build" / name, folder / "build" / name)
            publish_version(DeploymentSpec.of_model(name, models), "fp32", "onnxruntime", repository)
        yield folder


@pytest.fixture(scope="module")
def triton(folder: Path) -> Iterator[EmbeddedServer]:
    """A Triton that serves all of them."""
    with EmbeddedServer(folder / "repository", log_path=folder / "triton.log", **FREE) as running:
        yield running


@pytest.fixture(scope="module")
def compare(folder: Path, triton: EmbeddedServer) -> Compare:
    """Runs the stage on a model, or on another folder of the same model; each combination once."""

    @functools.cache
    def compare(name: str, models: Path = folder / "models") -> dict[str, Any]:
        return compare_served(ModelFolder(name, models), triton.grpc_url, triton.http_url)

    return compare


def flags(folder: Path, triton: EmbeddedServer, model: str) -> tuple[str, ...]:
    """Flags of the command line."""
    urls = ("--url", triton.grpc_url, "--http-url", triton.http_url)
    return ("--models", str(folder / "models"), "--model", model, *urls)


def verdicts(result: dict[str, Any], at: str) -> set[str]:
    return {check["verdict"] for check in result["checks"] if check["at"] == at}


def test_corners_are_all_combinations_of_smallest_opt_and_largest() -> None:
    found = corners(TEXT)
    assert len(found) == 9
    assert {"batch": 8, "length": 1} in found
    assert {"batch": 1, "length": 64} in found
    assert {"batch": 4, "length": 16} in found


def test_with_many_axes_corners_stay_few_and_hold_the_extremes() -> None:
    data = TEXT.model_dump(mode="json")
    names = ["b", "c", "d"]
    data["inputs"]["input_ids"]["shape"] += names
    data["axes"] |= {name: {"min": 1, "opt": 2, "max": 3} for name in names}
    spec = DeploymentSpec.model_validate_json(json.dumps(data))
    found = corners(spec)
    assert len(found) <= MOST_CORNERS
    for end in ("min", "opt", "max"):
        assert {name: getattr(axis, end) for name, axis in spec.axes.items()} in found
    assert len({tuple(sizes.values()) for sizes in found}) == len(found)


def test_a_correct_served_model_passes_over_both_protocols(
    folder: Path, triton: EmbeddedServer, run_here: RunHere
) -> None:
    with (folder / "models" / "text" / "model.py").open("a") as model:
        model.write("\nprint('which is not part of the JSON')\n")
    run = run_here("parity", *flags(folder, triton, "text"), "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result == json.loads((folder / "build" / "text" / "parity.json").read_text())
    assert result["served"] == {"version": "1", "precision": "fp32", "platform": "python"}
    places = {(check["at"], check["protocol"]) for check in result["checks"]}
    assert len(places) == 2 * (1 + 9 + 1)  # evaluation, corners, requests at once
    assert {check["verdict"] for check in result["checks"]} == {"holds"}
    assert result["metric"]["served"]["http"] == result["metric"]["served"]["grpc"]
    assert result["metric"]["served"]["http"]["drop"] == 0


def test_triton_batches_concurrent_requests_and_splits_the_outputs_correctly(compare: Compare) -> None:
    result = compare("image")
    assert result["failures"] == []
    found = [result["batching"][protocol] for protocol in ("http", "grpc")]
    assert all(each["requests"] >= 24 and each["requests"] % 8 == 0 for each in found)
    assert all(
        each["executions"] < each["requests"] for each in found
    )  # rounds repeat until some requests meet in the queue


def test_nan_and_inf_pass_through_and_affect_no_other_row(compare: Compare) -> None:
    result = compare("image")
    for word in ("NaN", "+Inf", "-Inf"):
        assert verdicts(result, f"a row with {word}") == {"holds"}
        assert verdicts(result, f"rows beside {word}") == {"holds"}


def test_nan_or_inf_outputs_that_match_pytorch_pass(compare: Compare, folder: Path) -> None:
    rows = load_rows(folder / "build" / "masked" / "evaluation.npz")
    assert any((row["x"] < 0).any() for row in rows)  # so that outputs are -inf or NaN there
    assert compare("masked")["failures"] == []


def test_int8_has_its_own_tolerance_and_its_nan_is_only_reported(compare: Compare) -> None:
    result = compare("image8")
    assert result["served"]["precision"] == "int8"
    assert result["tolerance"]["cosine"] == 0.98
    assert result["failures"] == []
    assert any(verdict.startswith("reported: ") for verdict in verdicts(result, "a row with NaN"))
    assert verdicts(result, "rows beside NaN") == {"holds"}


def check_evaluation_fails(result: dict[str, Any]) -> None:
    for protocol in ("http", "grpc"):
        assert any(failure.startswith(f"evaluation split over {protocol}") for failure in result["failures"])


def test_a_wrong_quantized_model_is_found_over_both_protocols(compare: Compare) -> None:
    check_evaluation_fails(compare("broken"))


def test_rows_that_influence_one_another_are_found_when_triton_batches(compare: Compare) -> None:
    result = compare("leaky")
    assert verdicts(result, "batch 9") == {"holds"}  # the same batch leaks in PyTorch, too
    assert any("worst error" in verdict for verdict in verdicts(result, "small requests at once"))
    assert any("NaN" in verdict for verdict in verdicts(result, "rows beside NaN"))


def test_rows_of_a_fixed_batch_may_influence_one_another(compare: Compare) -> None:
    assert compare("fixed")["failures"] == []


def test_a_wrong_model_exits_1_and_reports_the_first_failure(
    folder: Path, triton: EmbeddedServer, run_here: RunHere
) -> None:
    run = run_here("parity", *flags(folder, triton, "seed"))
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "checks failed" in run.stderr
    assert "evaluation split over http, y: worst error" in run.stderr
    check_evaluation_fails(json.loads((folder / "build" / "seed" / "parity.json").read_text()))


@pytest.fixture
def edited(folder: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """A models folder whose `masked` differs from the served model."""

    def edit(old: str, new: str) -> Path:
        shutil.copytree(folder / "models" / "masked", tmp_path / "masked")
        replace_in(tmp_path / "masked" / "deploy.toml", old, new)
        return tmp_path

    return edit


def test_a_corner_that_the_server_refuses_is_a_failure(compare: Compare, edited: Callable[..., Path]) -> None:
    failures = compare("masked", edited("max = 9", "max = 10"))["failures"]
    assert len(failures) == 4  # largest corner and requests at once, over two protocols
    assert all("a batch of 10" in failure for failure in failures)


def test_another_signature_is_a_failed_gate(compare: Compare, edited: Callable[..., Path]) -> None:
    with pytest.raises(GateFailed, match=r"has the outputs .*'y': 'FP32'.* deploy.toml has .*'z': 'FP32'"):
        compare("masked", edited("outputs.y", "outputs.z"))


def test_without_a_server_parity_is_one_error_line_and_exit_2(folder: Path, refused: Refused) -> None:
    where = ("--url", "127.0.0.1:18458", "--http-url", "127.0.0.1:18459")
    said = refused("parity", "--models", str(folder / "models"), "--model", "masked", *where)
    assert said.startswith("error: nothing serves HTTP at 127.0.0.1:18459")


def test_a_server_without_the_model_is_an_input_error(folder: Path, server: EmbeddedServer) -> None:
    with pytest.raises(InputError, match="'masked' is not found"), client_errors():
        compare_served(ModelFolder("masked", folder / "models"), server.grpc_url, server.http_url)


def test_endpoints_of_two_servers_are_an_input_error(folder: Path, triton: EmbeddedServer) -> None:
    spec = DeploymentSpec.of_model("masked", folder / "models")
    with endpoints_of(spec, triton.http_url, triton.grpc_url, timeout_s=60) as endpoints:
        endpoints[1].version = "2"
        message = r"two endpoints serve different models: .*'version': '1'.*'version': '2'"
        with pytest.raises(InputError, match=message):
            what_is_served(spec, endpoints)


def test_a_server_that_does_not_report_the_precision_is_an_input_error(
    folder: Path, server: EmbeddedServer, own_build: Path
) -> None:
    source = ModelFolder("masked", folder / "models")
    source.spec = add_one_spec("add_one")
    save_rows(own_build / "add_one" / "evaluation.npz", [{"x": np.zeros((1, 2, 2), np.float32)}])
    with pytest.raises(InputError, match=r"add_one at .* does not report its precision"):
        compare_served(source, server.grpc_url, server.http_url)


def add_one_spec(name: str) -> DeploymentSpec:
    """The spec of a model that the fixture `server` serves: y = x + 1."""
    x = {"dtype": "float32", "shape": ["batch", 2, "n"]}
    axis = {"min": 1, "opt": 2, "max": 8}
    data = {"name": name, "inputs": {"x": x}, "outputs": {"y": x}, "axes": {"batch": axis, "n": axis}}
    return DeploymentSpec.model_validate_json(json.dumps(data))


def test_a_full_queue_is_retried(server: EmbeddedServer) -> None:
    spec, x = add_one_spec("slow"), np.arange(32, dtype=np.float32).reshape(8, 2, 2)
    with endpoints_of(spec, server.http_url, server.grpc_url, timeout_s=60) as endpoints:
        for endpoint in endpoints:  # 8 requests at a queue of 2
            found = apart(endpoint, {"x": x}, least=1)
            np.testing.assert_array_equal(np.stack([row["y"] for row in found]), x + 1)


def test_a_server_that_is_too_slow_is_an_invalid_measurement(server: EmbeddedServer) -> None:
    x = np.zeros((1, 2, 2), np.float32)
    with endpoints_of(add_one_spec("slow"), server.http_url, server.grpc_url, timeout_s=0.1) as endpoints:
        for endpoint in endpoints:
            with pytest.raises(InvalidMeasurement, match=r"did not answer within timeout_s=0\.1"), client_errors():
                endpoint({"x": x})


def test_tolerances_of_deploy_toml_apply(compare: Compare, edited: Callable[..., Path]) -> None:
    assert DeploymentSpec.load("tests/models/image").parity.of("int8").worst_error == 0.25
    strict = edited("[axes", "[parity.fp32]\nworst_error = 0.5\n[axes")
    assert compare("masked", strict)["tolerance"] == {"worst_error": 0.5, "cosine": 0.9999, "common": 0.99}
