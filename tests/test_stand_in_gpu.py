"""From `make engine TARGET=tensorrt` to a verdict on a real Docker engine, through stand-ins for a GPU host and for NVIDIA's
images (tests/stand_ins/). No GPU and no image of NVIDIA can be had here; what they do with a plan stays unproved."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
import openai
import pytest
from deepseek_client import InferenceClient

from cli.gpu_steps import Where, steps
from deepseek.spec.machine.triton_release import TRITON_TAG
from tests.checkout import BUSY, Checkout
from tests.docker_engine import own_engine
from tests.gateway import free_port
from tests.stand_ins.images import HOST, build

PROJECT = f"deepseek-gpu-test-{os.getpid()}"
# Measurements, which may be inconclusive on a busy machine, each with the step that is then skipped.
MEASURED = {
    **{"load test text": "verdict text", "verdict text": "", "capacity text": "", "release": "rollback"},
    **{"dynamic batching and CUDA graphs, on and off": ""},
}
MISSED = ("failed", "exit code 1")  # the SLO, which a busy machine may miss too
pytestmark = pytest.mark.slow(minutes=8)


@pytest.fixture(scope="module")
def gpu_host() -> Iterator[dict[str, str]]:
    """Environment of a GPU host: its programs on PATH, and an engine of its own with the runtime and both images."""
    path = {"PATH": f"{HOST.resolve()}:{os.environ['PATH']}"}
    with own_engine("-gpu", **path) as engine:
        build({**path, **engine}, TRITON_TAG)
        yield {**path, **engine}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A fresh copy of the checkout with three tiny models."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("text", "sentence", "shop"):
        shutil.copytree(f"tests/models/{name}", folder / "models" / name)
    return Checkout.copied_to(folder)


def test_an_engine_is_built_served_and_judged_through_stand_ins_for_nvidias_images(
    gpu_host: dict[str, str], checkout: Checkout
) -> None:
    settings = {
        **{"DEEPSEEK_GATEWAY_PORT": str(free_port()), "DEEPSEEK_LOCAL_PORTS": ",".join(map(str, checkout.ports[:2]))},
        **{"DEEPSEEK_PROJECT": "deepseek-gpu-test", "COMPOSE_PROJECT_NAME": PROJECT},
    }
    environment = {**gpu_host, **settings, "PATH": f"{HOST.resolve()}:{checkout.environment['PATH']}"}
    lines = (
        *("make engine TARGET=tensorrt MODEL=sentence", "make engine TARGET=tensorrt MODEL=shop"),
        *("make doctor", "docker compose up --detach --wait"),
        *("make infer MODEL=sentence TEXT='A plane.'", "make parity MODEL=sentence"),
        *("make infer MODEL=shop HISTORY=SKU-1,SKU-4", "make parity MODEL=shop"),
        *("make loadtest verdict MODEL=sentence DURATION_S=30",),
    )
    try:
        for line in lines:
            done = checkout.sh(line, **environment)
            told = f"{line}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            assert done.returncode == 0 or ("verdict" in line and done.returncode in BUSY), told
        engine = json.loads(checkout.folder.joinpath("model_repository/sentence/1/manifest.json").read_text())
        assert (engine["target"], engine["compute_capability"], engine["found"]["read_from"]) == (
            "tensorrt",
            "8.9",
            "engine",
        )
        (judged,) = checkout.folder.glob("build/sentence/loadtests/*/run.json")
        assert judged.is_file()
        with InferenceClient(f"127.0.0.1:{checkout.ports[0]}", "http") as client:
            vector = client.infer("sentence", {"text": ["A plane."]})["embedding"][0]
        routes = openai.OpenAI(base_url=f"http://127.0.0.1:{checkout.ports[0]}/v1", api_key="none", max_retries=0)
        (answer,) = routes.embeddings.create(model="sentence", input="A plane.").data
        np.testing.assert_allclose(answer.embedding, vector, rtol=1e-5)
        stopped = checkout.sh("docker compose stop openai", **environment)
        assert stopped.returncode == 0, stopped.stderr
        state = checkout.sh("docker compose ps --all --format '{{.ExitCode}}' openai", **environment).stdout.strip()
        assert state == "0"  # it took SIGTERM and ended by itself
    finally:
        checkout.sh("docker compose down --volumes", **environment)


def test_the_gpu_check_runs_to_its_end_through_stand_ins(gpu_host: dict[str, str], checkout: Checkout) -> None:
    environment = {**gpu_host, "PATH": f"{HOST.resolve()}:{checkout.environment['PATH']}"}
    done = checkout.sh("make gpu-check MODEL=text", **environment)
    told = f"exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
    report = checkout.folder / "build/gpu-check/gpu-check"
    found = {step["name"]: step for step in json.loads(report.with_suffix(".json").read_text())["steps"]}
    where = Where(folder=Path(), models="models", triton_tag="26.10", gateway_port=1, http_port=2, grpc_port=3)
    assert list(found) == [step.name for step in steps(where, ["text"])], told
    page = report.with_suffix(".html").read_text()
    assert all(escape(name) in page for name in found)

    outcomes = {name: (each["outcome"], each["reason"]) for name, each in found.items()}
    expected = dict.fromkeys(outcomes, ("passed", ""))
    without_cuda = (
        *("PyTorch, torch.compile, ONNX Runtime CUDA: text", "nsys profile"),
        "mixed precision and checkpointing against fp32",
    )
    expected |= dict.fromkeys(without_cuda, ("skipped", f"PyTorch {importlib.metadata.version('torch')} sees no GPU"))
    for name, after in MEASURED.items():
        if outcomes[name][0] == "inconclusive" or (name == "verdict text" and outcomes[name] == MISSED):
            expected |= {name: outcomes[name]} | ({after: outcomes[after]} if after else {})
    wrong = {name: (found[name], log(found[name])) for name in found if outcomes[name] != expected[name]}
    assert not wrong, f"{wrong}\n{told}"
    assert done.returncode == 2  # of make; some steps were skipped


def log(step: dict[str, str]) -> str:
    """The end of a step's log; "" if it did not run."""
    return Path(step["log"]).read_text()[-2000:] if step["log"] else ""
