"""`deepseek new`: each template builds unchanged and is served."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from deepseek_client import InferenceClient

from cli.main import values_of
from cli.model_folder.new import main as new
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import Refused, RunHere

KINDS = ("vision", "text", "ranking")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model from each template."""
    folder = tmp_path_factory.mktemp("new") / "my models"
    for kind in KINDS:
        with redirect_stdout(io.StringIO()) as said:
            new(values_of("new", f"my-{kind}", "--from", kind, "--models", str(folder)))
        assert f"make engine serve MODEL=my-{kind} MODELS='{folder}'" in said.getvalue()
    return folder


REQUESTS: dict[str, dict[str, np.ndarray]] = {
    "vision": {"pixels": np.zeros((2, 3, 64, 64), np.float32)},
    "text": {"input_ids": np.ones((2, 5), np.int64), "attention_mask": np.ones((2, 5), np.int64)},
    "ranking": {
        "user_id": np.ones(2, np.int64),
        "user_features": np.zeros((2, 16), np.float32),
        "item_ids": np.array([[1, 2, 3], [4, 5, 6]]),
    },
}
SHAPES = {"vision": (2, 10), "text": (2, 64), "ranking": (2, 3)}


@pytest.mark.slow
def test_each_template_builds_and_is_served_unchanged(models: Path, run_here: RunHere) -> None:
    repository = models.parent / "repository"
    for kind in KINDS:
        for stage in (("to-onnx",), ("publish", "--precision", "fp32", "--repository", str(repository))):
            which = ("--model", f"my-{kind}", "--models", str(models))
            run = run_here(*stage, *which, DEEPSEEK_BUILD=str(models.parent / "build"))
            assert run.returncode == 0, run.stderr
    with EmbeddedServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        client = InferenceClient(server.grpc_url)
        for kind, request in REQUESTS.items():
            (output,) = client.infer(f"my-{kind}", request).values()
            assert output.shape == SHAPES[kind]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("my-vision",), "my-vision: already exists; choose another name, or another folder with --models"),
        (("gateway",), "name: seen 'gateway', but build/gateway is reserved"),
        (("a b",), "name: seen 'a b'; a folder's name without blanks and slashes is needed"),
        (("x", "--from", "vison"), "--from: seen 'vison'; allowed: vision, text, ranking; did you mean vision?"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(
    models: Path, words: tuple[str, ...], told: str, refused: Refused
) -> None:
    before = sorted(models.iterdir())
    assert told in refused("new", *words, "--models", str(models))
    assert sorted(models.iterdir()) == before
