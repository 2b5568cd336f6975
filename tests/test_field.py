"""Models as users bring them, through the chain and the real server: types, branches, large weights, 16-bit weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from deepseek_client import InferenceClient, InvalidInput

from deepseek.quantization import QuantConfig
from deepseek.spec import DeploymentSpec, InputError
from export.graphs import graph_file
from export.model_folder import ModelFolder
from export.rows import batches, load_rows
from export.runtimes.pytorch_reference import module_predictor
from export.stages.publish import publish_version
from export.stages.quantize import quantize_model
from export.stages.to_onnx import export_model
from loadtests.results.run import Run, latest_run
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE, RunHere, run_module
from tests.tiny_model import TOML, tiny

CPU = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",))
FP16 = QuantConfig.of_precision("fp16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`build/` and `repository/` of `ranker` (fp32, its weights in a file of their own) and `branch` (fp16)."""
    folder = tmp_path_factory.mktemp("field")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(folder / "build"))
        patch.setattr(graph_file, "EXTERNAL_DATA_BYTES", 1 << 10)  # stands in for 1 GiB
        for name in ("ranker", "branch"):
            export_model(ModelFolder(name, "tests/models"))
        quantize_model(DeploymentSpec.load("tests/models/branch"), FP16)
        publish_version(DeploymentSpec.load("tests/models/ranker"), "fp32", "onnxruntime", folder / "repository")
        publish_version(DeploymentSpec.load("tests/models/branch"), "fp16", "onnxruntime", folder / "repository")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[EmbeddedServer]:
    """Both models, served."""
    log = folder / "triton.log"
    with EmbeddedServer(folder / "repository", **FREE, log_path=log) as running:
        yield running


def test_a_branch_is_served_in_fp16_as_pytorch_computes_it(server: EmbeddedServer, folder: Path) -> None:
    source = ModelFolder("branch", "tests/models")
    reference = module_predictor(source.spec, source.load())
    with InferenceClient(server.grpc_url) as client:
        for row in load_rows(folder / "build" / "branch" / "evaluation.npz"):
            served = client.infer("branch", row)
            for output, expected in reference(row).items():
                np.testing.assert_allclose(served[output], expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_callers_send_one_number_per_row_with_or_without_its_dimension(
    server: EmbeddedServer, folder: Path, protocol: Literal["grpc", "http"]
) -> None:
    row = load_rows(folder / "build" / "ranker" / "evaluation.npz")[0]
    assert row["user_id"].shape == (1,)
    batch = {name: np.concatenate([array] * 3) for name, array in row.items()}
    columns = {**batch, "user_id": batch["user_id"][:, None], "weekday": batch["weekday"][:, None]}
    with InferenceClient(getattr(server, f"{protocol}_url"), protocol=protocol) as client:
        answers = [client.infer("ranker", inputs) for inputs in (batch, columns)]
        with pytest.raises(InvalidInput, match="batch sizes disagree"):
            client.infer("ranker", {**batch, "user_id": np.zeros(2, np.int64)})
    assert [answer["best"].shape for answer in answers] == [(3, 1)] * 2
    np.testing.assert_array_equal(answers[0]["scores"], answers[1]["scores"])


def test_parity_doctor_and_load_test_pass_on_a_model_with_one_number_per_row(
    server: EmbeddedServer, folder: Path, monkeypatch: pytest.MonkeyPatch, run_here: RunHere
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(folder / "build"))
    model = ("--models", "tests/models", "--model", "ranker")
    ran = run_here("parity", *model, "--url", server.grpc_url, "--http-url", server.http_url)
    assert ran.returncode == 0, ran.stderr
    found = examine(server.repository, CPU)[1]
    assert [finding for finding in found if finding.level == "mismatch"] == []
    load = ("--url", server.grpc_url, "--rate", "20", "--duration-s", "1", "--warmup-s", "0")
    ran = run_module("cli", "loadtest", *model, *load)
    assert ran.returncode == 0, ran.stderr
    assert Run.load(latest_run("ranker")).window.ok == 20


def test_the_doctor_says_how_one_number_per_row_is_configured(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "repository" / "ranker", tmp_path / "ranker")
    config = tmp_path / "ranker" / "config.pbtxt"
    config.write_text(re.sub(r"  reshape \{\s+\}\n", "", config.read_text(), count=1))
    found = [str(finding) for finding in examine(tmp_path, CPU)[1] if finding.level == "mismatch"]
    assert len(found) == 1
    assert "input 'user_id' has dims [1]: " in found[0]
    assert "set dims: [1] and reshape: { shape: [ ] }" in found[0]


def test_large_weights_are_quantized_and_replaced_by_small_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    shutil.copytree(folder / "build" / "ranker", tmp_path / "ranker")
    source = ModelFolder("ranker", "tests/models")
    int8 = QuantConfig.of_precision("int8", calibration_data=tmp_path / "ranker" / "calibration.npz")
    weights = tmp_path / "ranker" / "int8" / "model.onnx.data"
    with monkeypatch.context() as patch:
        patch.setattr(graph_file, "EXTERNAL_DATA_BYTES", 1 << 10)
        quantize_model(source.spec, int8, source)
        assert weights.is_file()
    quantize_model(source.spec, int8, source)
    assert not weights.exists()


def test_large_weights_go_with_the_graph_into_the_repository(folder: Path) -> None:
    version = folder / "repository" / "ranker" / "1"
    weights = version / "model.onnx.data"
    assert weights.stat().st_size > 50_000 > (version / "model.onnx").stat().st_size
    assert weights.stat().st_mode & 0o044, "the server may run as another user"
    assert (folder / "build" / "ranker" / "fp32" / "model.onnx.data").stat().st_mode & 0o044


def test_both_sides_of_a_branch_survive_fp16(folder: Path) -> None:
    path = folder / "build" / "branch" / "fp16" / "model.onnx"
    assert [node.op_type for node in onnx.load(path).graph.node].count("If") == 1
    session = onnxruntime.InferenceSession(path)
    source = ModelFolder("branch", "tests/models")
    reference = module_predictor(source.spec, source.load())
    for shift in (-1.0, 1.0):
        inputs = {"x": np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32) + np.float32(shift)}
        np.testing.assert_allclose(session.run(["linear"], inputs)[0], reference(inputs)["linear"], atol=5e-3)


PADDED = """
class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(x, src_key_padding_mask=x[..., 0] == 0)

def load():
    torch.manual_seed(0)
    return Tagger()

def samples(split):
    random = np.random.default_rng(len(split))
    for length in (5, 1, 3, 2, 4, 5):
        x = random.standard_normal((1, 5, 8)).astype(np.float32)
        x[:, length:] = 0
        yield {"x": x}
"""


def test_pytorchs_own_encoder_with_padding_is_what_its_graph_gives(tmp_path: Path, own_build: Path) -> None:
    source = tiny(tmp_path, toml=TOML.replace('["batch", 8]', '["batch", 5, 8]'), code=PADDED)
    session = onnxruntime.InferenceSession(export_model(source)["path"])
    _, inputs = next(batches(list(source.rows("evaluation", 6)), 4))
    reference = module_predictor(source.spec, source.load())(inputs)["y"]
    assert np.abs(reference[inputs["x"][..., 0] == 0]).min() > 0, "the fast path writes zeros where there is padding"
    np.testing.assert_allclose(session.run(["y"], inputs)[0], reference, atol=1e-5)


HALF = """
def load():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)).{cast}()

_own = samples
def samples(split):
    for row in _own(split):
        yield {{"x": row["x"].astype(np.{dtype})}}
"""


@pytest.mark.parametrize(("cast", "dtype"), [("half", "float32"), ("bfloat16", "float16")])
def test_sixteen_bit_weights_start_from_fp32_and_keep_the_signature(
    tmp_path: Path, own_build: Path, cast: str, dtype: str
) -> None:
    source = tiny(tmp_path, toml=TOML.replace("float32", dtype), code=HALF.format(cast=cast, dtype=dtype))
    graph = onnx.load(export_model(source)["path"]).graph
    assert {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2} == {onnx.TensorProto.FLOAT}
    kind = onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.FLOAT
    assert {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]} == {kind}


def test_a_cast_to_16_bits_in_forward_is_one_line(tmp_path: Path) -> None:
    code = "\n_own = load\ndef load():\n    return _own().half()\n"
    source = tiny(tmp_path, body="return self.line(x.half()).float()", code=code)
    with pytest.raises(InputError, match=r"model.py:11: forward\(x: float32 \[4, 8\]\).*16-bit weights were widened"):
        export_model(source)
