"""Execution providers of ONNX Runtime: the one asked for, or a line that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime
import pytest

from deepseek import onnxruntime_session
from deepseek.onnxruntime_session import PROVIDERS, ProviderError, choose_provider, open_session
from deepseek.spec import DeploymentSpec, InputError, Provider
from export.runners import onnx_runner

IMAGE = DeploymentSpec.load("tests/models/image")


@pytest.fixture
def graph(built: Path) -> Path:
    """A small convolutional network."""
    return built / "build" / "image" / "fp32" / "model.onnx"


def test_auto_takes_what_package_and_machine_both_have_and_says_where_the_nodes_run(graph: Path) -> None:
    opened = open_session(graph, onnxruntime.SessionOptions())
    expected = {
        name for name in ("cuda", "migraphx", "cann") if PROVIDERS[name][0] in onnxruntime.get_available_providers()
    }
    assert opened.provider in expected | {"cpu"}
    assert sum(opened.nodes.values()) >= 4  # two convolutions, the mean, the head
    assert opened.nodes.get(PROVIDERS[opened.provider][0], 0) > 0
    assert f"provider {opened.provider}, nodes: " in str(opened)
    scores, _ = opened.session.run(None, {"pixels": np.zeros((2, 3, 32, 32), np.float32)})
    assert scores.shape == (2, 10)


def test_auto_leaves_a_provider_whose_device_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name for name, _ in PROVIDERS.values()])
    monkeypatch.setattr(onnxruntime_session, "_has_device", lambda provider: provider == "cann")
    assert choose_provider("auto") == "cann"
    monkeypatch.setattr(onnxruntime_session, "_has_device", lambda provider: False)
    assert choose_provider("auto") == "cpu"


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "migraphx", "cann"])
def test_a_missing_provider_says_what_there_is_and_which_package_has_it(provider: str, graph: Path) -> None:
    name, package = PROVIDERS[provider]
    if name in onnxruntime.get_available_providers():
        pytest.skip(f"this machine's ONNX Runtime has {name}")
    spec = IMAGE.model_copy(update={"onnxruntime": IMAGE.onnxruntime.model_copy(update={"provider": provider})})
    with pytest.raises(InputError, match=f"{provider!r} is not in .* has .*CPUExecutionProvider; install {package}"):
        onnx_runner(spec, graph, "onnxruntime")


def test_deploy_toml_takes_the_providers_that_there_are() -> None:
    assert get_args(Provider) == ("auto", *PROVIDERS)


def test_an_unknown_provider_lists_the_known_ones() -> None:
    with pytest.raises(ProviderError, match="'rocm' is not known; allowed: auto, cpu, cuda, tensorrt, migraphx, cann"):
        choose_provider("rocm")


def test_a_provider_that_takes_no_node_is_no_silent_cpu(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime has no second provider")
    # It is there and starts, but has no operator of its own: all nodes fall to the CPU.
    monkeypatch.setitem(PROVIDERS, "azure", ("AzureExecutionProvider", "onnxruntime"))
    with pytest.raises(ProviderError, match=r"'azure' takes no node of .*; CPUExecutionProvider would run them"):
        open_session(graph, onnxruntime.SessionOptions(), "azure")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_no_silent_cpu(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available = onnxruntime.get_available_providers()
    if "CANNExecutionProvider" in available:
        pytest.skip("this build of ONNX Runtime has CANN")
    # As a package that lists a provider whose libraries are not there.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CANNExecutionProvider", *available])
    with pytest.raises(ProviderError, match=r"'cann' did not start, ONNX Runtime took CPU.*onnxruntime-cann"):
        open_session(graph, onnxruntime.SessionOptions(), "cann")
