"""Models that this project did not build: calls and load tests with all of Triton's types, on a real Triton."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from deepseek_client import InferenceClient
from deepseek_client.metadata import DTYPES

from deepseek.spec import TRITON_DTYPES, DeploymentSpec, InputError
from deepseek.spec.tables import DType
from loadtests.load.inputs import rows_of
from loadtests.load.preflight import check
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE, RunHere
from tests.failing_servers import url_of
from tests.saved_runs import load_settings

NUMBERS = [name for name in get_args(DType) if name != "string"]
ECHO = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            tensors = [(f"y{tensor.name()[1:]}", tensor.to_dlpack()) for tensor in request.inputs()]
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(*each) for each in tensors]))
        return answers
"""
UPPER = """
import os
import sys

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(os.path.dirname(__file__))
from numpy1_stub import fix_strings


class TritonPythonModel:
    def initialize(self, args):
        fix_strings(pb_utils)

    def execute(self, requests):
        texts = [request.inputs()[0].as_numpy() for request in requests]
        upper = [np.array([each.upper() for each in array.flat], object).reshape(array.shape) for array in texts]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("upper", array)]) for array in upper]
"""


def write_model(folder: Path, name: str, code: str, most: int, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A model of `tensors`, type and dimensions after the batch by name, in repository/, and its deploy.toml in models/.

    The names of outputs begin with y or u. `most`: the largest batch; 0: the model does not batch.
    """
    version, models = folder / "repository" / name / "1", folder / "models" / name
    version.mkdir(parents=True)
    models.mkdir(parents=True)
    (version / "model.py").write_text(code)
    shutil.copy("serving/backend/numpy1_stub.py", version)
    config = [f'name: "{name}" backend: "python" max_batch_size: {most} instance_group {{ kind: KIND_CPU count: 1 }}']
    spec = [f'name = "{name}"\naxes.batch = {{ min = 1, opt = 1, max = 8 }}\nslo = {{ p99_ms = 500, rate_rps = 20 }}']
    for tensor, (dtype, dims) in tensors.items():
        kind = "output" if tensor[0] in "yu" else "input"
        place = dims if most else [-1, *dims]
        config.append(f'{kind} {{ name: "{tensor}" data_type: TYPE_{TRITON_DTYPES[dtype]} dims: {place} }}')
        spec.append(f"{kind}s.{tensor} = {{ dtype = {dtype!r}, shape = {['batch', *dims]} }}")
    (version.parent / "config.pbtxt").write_text("\n".join(config))
    (models / "deploy.toml").write_text("\n".join(spec))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedServer, Path]]:
    """A Triton with models of strings and one of all other types; a folder with their deploy.toml and inputs."""
    folder = tmp_path_factory.mktemp("others")
    pairs = {f"{side}_{name}": (name, [2]) for name in NUMBERS for side in "xy"}
    write_model(folder, "echo", ECHO, 8, pairs)
    write_model(folder, "prompts", UPPER, 8, {"prompt": ("string", [1]), "upper": ("string", [1])})
    write_model(folder, "pairs", UPPER, 8, {"prompt": ("string", [2]), "upper": ("string", [2])})
    write_model(folder, "flat", UPPER, 0, {"text": ("string", []), "upper": ("string", [])})
    np.savez(folder / "echo.npz", **{f"00000/{name}": array for name, array in echoed().items()})  # type: ignore[arg-type]
    (folder / "texts.txt").write_text('{"prompt": "a"}\n\nü b\n')
    (folder / "pairs.tsv").write_text("a\tb\nü\tc\n")
    np.savez(folder / "flat.npz", **{"00000/text": np.array(["a", "b", "ü"])})  # type: ignore[arg-type]
    np.savez(folder / "prompts.npz", **{"00000/prompt": np.array([["a"]])})  # type: ignore[arg-type]
    with EmbeddedServer(folder / "repository", **FREE, log_path=folder / "triton.log") as server:
        yield server, folder


def echoed() -> dict[str, np.ndarray]:
    dtypes = {name: DTYPES[TRITON_DTYPES[name]] for name in NUMBERS}
    return {f"x_{name}": np.array([[1, 0]]).astype(dtype) for name, dtype in dtypes.items()}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_arrays_of_every_type_come_back_as_they_were_sent(
    others: tuple[EmbeddedServer, Path], protocol: Literal["grpc", "http"]
) -> None:
    server, _ = others
    with InferenceClient(url_of(server, protocol), protocol) as client:
        answer = client.infer("echo", echoed())
        assert client.infer("flat", {"text": ["a", "ü"]})["upper"].tolist() == [b"A", "ü".encode()]
    for name, sent in echoed().items():
        got = answer[f"y{name[1:]}"]
        assert (got.dtype, got.tolist()) == (sent.dtype, sent.tolist())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("echo", "echo.npz"),
        ("prompts", "texts.txt"),
        ("flat", "flat.npz"),
    ],
)
def test_a_load_test_takes_every_type(
    others: tuple[EmbeddedServer, Path], tmp_path: Path, run_here: RunHere, model: str, inputs: str
) -> None:
    server, folder = others
    what = ("--model", model, "--models", str(folder / "models"), "--inputs", str(folder / inputs))
    load = ("--rate", "20", "--duration-s", "1", "--warmup-s", "0", "--arrivals", "constant", "--json")
    done = run_here("loadtest", *what, "--url", server.grpc_url, *load, DEEPSEEK_BUILD=str(tmp_path))
    assert done.returncode in (0, 3), done.stderr  # 3: the machine was too busy to send in time
    found = json.loads(done.stdout)
    assert (found["answered"], found["errors"]) == (20, {})


@pytest.mark.parametrize(
    ("model", "inputs"), [("prompts", "prompts.npz"), ("pairs", "pairs.tsv"), ("flat", "texts.txt")]
)
def test_strings_of_every_file_and_shape_pass_the_check(
    others: tuple[EmbeddedServer, Path], model: str, inputs: str
) -> None:
    server, folder = others
    settings = load_settings(model=model, url=server.grpc_url, inputs=str(folder / inputs), rate_rps=10.0)
    assert check(settings, DeploymentSpec.of_model(model, folder / "models")).name == model


@pytest.mark.parametrize(
    ("model", "words", "answer"),
    [
        ("prompts", ["--text", "a b"], [["A B"]]),
        ("flat", ["--text", "a b"], ["A B"]),
        ("pairs", ["--text", "a", "--pair", "b"], [["A", "B"]]),
        ("pairs", ["--text", "a"], "--text: pairs takes pairs: give the second text with --pair"),
        ("prompts", ["--text", "a", "--pair", "b"], "--text: prompts takes single texts: leave --pair out"),
    ],
)
def test_one_text_is_sent_to_the_only_input_of_strings(
    others: tuple[EmbeddedServer, Path], run_here: RunHere, model: str, words: list[str], answer: Any
) -> None:
    server, folder = others
    what = ("--model", model, "--models", str(folder / "models"), "--url", server.grpc_url)
    done = run_here("infer", *what, *words, "--json")
    if isinstance(answer, str):
        assert (done.returncode, done.stderr) == (2, f"error: {answer}\n")
    else:
        assert json.loads(done.stdout)["outputs"]["upper"] == answer, done.stderr


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            "prompts",
            "pairs.tsv",
            r"pairs.tsv: a row has 2 text\(s\), but deploy.toml of prompts has prompt \['batch', 1\]",
        ),
        ("pairs", "texts.txt", r"texts.txt: a row has 1 text\(s\), but deploy.toml of pairs has prompt \['batch', 2\]"),
        ("echo", "texts.txt", r'has no \[text\], and not one input with dtype = "string"'),
        ("prompts", "flat.npz", "flat.npz: has texts, but deploy.toml of prompts has no"),
        ("pairs", "prompts.npz", "input 'prompt' has shape .1, 1.; dimension 1 must be 2"),
    ],
)
def test_texts_that_do_not_fit_are_one_line_before_any_load(
    others: tuple[EmbeddedServer, Path], model: str, inputs: str, message: str
) -> None:
    server, folder = others
    settings = load_settings(model=model, url=server.grpc_url, inputs=str(folder / inputs), rate_rps=10.0)
    with pytest.raises(InputError, match=message):
        check(settings, DeploymentSpec.of_model(model, folder / "models"))


def test_a_route_gets_texts_as_they_are(others: tuple[EmbeddedServer, Path]) -> None:
    _, folder = others
    spec, path = DeploymentSpec.of_model("flat", folder / "models"), folder / "texts.txt"
    assert [rows_of(path, spec, on_route=on_route)[0]["text"].shape for on_route in (True, False)] == [(1, 1), (1,)]
