"""The pages about the client: the examples run, and the tables match the code."""

from __future__ import annotations

import inspect
import json
import pydoc
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deepseek_client import AsyncInferenceClient, InferenceClient, ModelStatistics, Statistics, errors

from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE
from tests.failing_servers import Relay, make_certificate

PAGE, README = Path("docs/client.md"), Path("client/README.md")
MODEL = f"""
import sys

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append({str(Path("serving/backend").resolve())!r})
from numpy1_stub import fix_strings

fix_strings(pb_utils)


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            sent = pb_utils.get_input_tensor_by_name(request, "item_ids")
            ids = np.from_dlpack(sent) if sent else np.zeros((1, 50), np.int64)
            tensors = {{"items": ids[:, :20].copy(), "scores": ids[:, :20].astype(np.float32)}}
            made = [pb_utils.Tensor.from_dlpack(n, a) for n, a in tensors.items()]
            named = pb_utils.get_input_tensor_by_name(request, "history")
            made.append(pb_utils.Tensor("titles", named.as_numpy() if named else np.full((len(ids), 1), b"", object)))
            answers.append(pb_utils.InferenceResponse(made))
        return answers
"""
CONFIG = """
backend: "python" max_batch_size: 8
input { name: "item_ids" data_type: TYPE_INT64 dims: [50] optional: true }
input { name: "history" data_type: TYPE_STRING dims: [-1] optional: true }
output { name: "items" data_type: TYPE_INT64 dims: [20] }
output { name: "scores" data_type: TYPE_FP32 dims: [20] }
output { name: "titles" data_type: TYPE_STRING dims: [-1] }
instance_group { kind: KIND_CPU count: 1 }
"""


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A model with the recommender's signature; the titles are the names that were sent."""
    folder = tmp_path_factory.mktemp("docs")
    version = folder / "repository" / "recommender" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (version.parent / "config.pbtxt").write_text(f'name: "recommender"\n{CONFIG}')
    with EmbeddedServer(folder / "repository", **FREE, log_path=folder / "log") as server:
        yield server


def test_the_examples_run(recommender: EmbeddedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca_cert, context = make_certificate(tmp_path)
    gateway = Relay.to(recommender, "http", context)
    second = Relay.to(recommender, "grpc")
    real = {
        "127.0.0.1:8001": recommender.grpc_url,
        "127.0.0.1:9001": second.url,
        "localhost:8443": gateway.url,
        "build/gateway/ca.crt": str(ca_cert),
        '"…"': '"key"',
    }
    names: dict[str, object] = {}
    for page in (Path("README.md"), README, PAGE):
        for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            if "import torch" in example:  # a model, not a call
                continue
            for said, meant in real.items():
                example = example.replace(said, meant)
            if "client.prepare" in example:  # inside the `with` of the example before it
                example = f"client = InferenceClient({recommender.grpc_url!r})\n{example}client.close()\n"
            exec(compile(example, str(page), "exec"), names)
    answers = names["answers"]
    assert isinstance(answers, list)
    np.testing.assert_array_equal(answers[3]["items"], np.full((1, 20), 4))
    assert f"{{'{recommender.grpc_url}': True, '{second.url}': True}}" in capsys.readouterr().out
    client = names["client"]
    assert isinstance(client, InferenceClient)
    client.close()
    gateway.close()
    second.close()


def test_the_readmes_curl_is_answered(recommender: EmbeddedServer) -> None:
    (line,) = re.findall(r"^(curl -s localhost:8000/.*?\}')$", Path("README.md").read_text(), re.MULTILINE | re.DOTALL)
    line = line.replace("localhost:8000", recommender.http_url)
    run = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    (titles,) = json.loads(run.stdout)["outputs"]
    assert (titles["name"], titles["data"]) == ("titles", ["50", "181", "172"])


@pytest.mark.parametrize("kind", [InferenceClient, AsyncInferenceClient])
def test_the_page_lists_the_clients_options_and_defaults(kind: type) -> None:
    section = PAGE.read_text().partition("## Options")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE))
    parameters = inspect.signature(kind).parameters
    assert {name: eval(default) for name, default in told.items()} == {
        name: parameter.default for name, parameter in parameters.items()
    }
    for name in parameters:
        assert f" {name}: " in pydoc.render_doc(kind)


def test_the_page_and_the_errors_agree_on_what_is_retried() -> None:
    section = PAGE.read_text().partition("## What is safe to retry")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    said = {name: row for names, *row in rows for name in re.findall(r"`(\w+)`", names)}
    assert said.keys() == {
        name for name, kind in vars(errors).items() if type(kind) is type and not kind.__subclasses__()
    }
    for name, (request, retried) in said.items():
        error = getattr(errors, name)
        assert error.did_not_run == retried.startswith("yes"), name
        assert error.may_have_run == ("may have run" in request and not retried.startswith("no")), name


def test_the_page_names_every_statistic() -> None:
    section = PAGE.read_text().partition("## Statistics")[2].partition("\n## ")[0]
    for kind in (ModelStatistics, Statistics):
        for name in set(kind.__dataclass_fields__) - {"models"}:
            assert f"`{name}`" in section, name


def test_the_readme_has_the_packages_error_tree() -> None:
    assert errors.__doc__ is not None
    tree = re.search(r"    InferenceError .*?\n\n", errors.__doc__, re.DOTALL)
    assert tree is not None
    for line in tree[0].strip().splitlines():
        assert line.removeprefix("    ") in README.read_text()
