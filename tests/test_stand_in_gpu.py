"""From `make engine TARGET=tensorrt` to a verdict on a real Docker engine, through stand-ins for a GPU host and for NVIDIA's
images (tests/stand_ins/). No GPU and no image of NVIDIA can be had here; what they do with a plan stays unproved."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

import pytest

from deepseek.spec.triton_release import TRITON_TAG
from tests.checkout import BUSY, Checkout
from tests.docker_engine import own_engine
from tests.gateway import free_port
from tests.stand_ins.images import HOST, build

PROJECT = f"deepseek-gpu-test-{os.getpid()}"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gpu_host() -> Iterator[dict[str, str]]:
    """Environment of a GPU host: its programs on PATH, and an engine of its own with the runtime and both images."""
    path = {"PATH": f"{HOST.resolve()}:{os.environ['PATH']}"}
    with own_engine("-gpu", **path) as engine:
        build({**path, **engine}, TRITON_TAG)
        yield {**path, **engine}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A fresh copy of the checkout with a tiny model."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree("tests/models/text", folder / "models" / "text")
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
        *("make engine TARGET=tensorrt MODEL=text", "make doctor", "docker compose up --detach --wait"),
        *("make infer MODEL=text", "make parity MODEL=text", "make loadtest verdict MODEL=text DURATION_S=30"),
    )
    try:
        for line in lines:
            done = checkout.sh(line, **environment)
            told = f"{line}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            assert done.returncode == 0 or ("verdict" in line and done.returncode in BUSY), told
        engine = json.loads(checkout.folder.joinpath("model_repository/text/1/manifest.json").read_text())
        assert (engine["target"], engine["compute_capability"], engine["found"]["read_from"]) == (
            "tensorrt",
            "8.9",
            "engine",
        )
        (judged,) = checkout.folder.glob("build/text/loadtests/*/run.json")
        assert judged.is_file()
    finally:
        checkout.sh("docker compose down --volumes", **environment)
