"""The TensorRT names that the code uses exist in TensorRT 10.12, in 11 and in TensorRT for RTX.

Which names it uses is read off its source. Those of 10.12 and 11 are in `tests/tensorrt_api.json`, which
`tests/tensorrt_api.py` reads off the bindings that NVIDIA publishes; those of RTX are the installed package's.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tensorrt_api import API, CLASSES

trt = pytest.importorskip("tensorrt_rtx")

VERSIONS: dict[str, dict[str, str]] = json.loads(API.read_text())
# The class of what a variable holds; "" is the module.
ENGINE = {
    **{"trt": "", "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser"},
    **{"config": "IBuilderConfig", "profile": "IOptimizationProfile", "cache": "ITimingCache"},
    **{"error": "ParserError", "layer": "ILayer", "producer": "ILayer", "tensor": "ITensor", "inputs": "ITensor"},
}
RUNNER = {"trt": "", "engine": "ICudaEngine", "context": "IExecutionContext"}
# The class of what a method returns, where more is asked of it.
RETURNS = {
    ("INetworkDefinition", "get_input"): "ITensor",
    ("ILayer", "get_input"): "ITensor",
    ("ILayer", "get_output"): "ITensor",
    ("OnnxParser", "get_error"): "ParserError",
    ("IBuilderConfig", "get_timing_cache"): "ITimingCache",
}


def class_of(node: ast.expr, variables: dict[str, str]) -> str | None:
    """The TensorRT class that an expression has, None where it is not TensorRT's."""
    if isinstance(node, ast.Name):
        return variables.get(node.id)
    if isinstance(node, ast.Subscript):
        return class_of(node.value, variables)
    function = node.func if isinstance(node, ast.Call) else node
    if not isinstance(function, ast.Attribute):
        return None
    owner = class_of(function.value, variables)
    if owner == "":
        return function.attr if function.attr in CLASSES else None
    return RETURNS.get((owner or "", function.attr))


def used(tree: ast.AST, variables: dict[str, str]) -> set[tuple[str, str]]:
    """Class and name of every TensorRT attribute that the code takes."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    owners = [(class_of(node.value, variables), node.attr) for node in attributes]
    return {(owner, name) for owner, name in owners if owner is not None and not name.startswith("_")}


def names() -> set[tuple[str, str]]:
    """All that the project uses of TensorRT."""
    runners = ast.parse(Path("export/runners.py").read_text())
    runner = next(node for node in ast.walk(runners) if getattr(node, "name", "") == "tensorrt_runner")
    return used(ast.parse(Path("export/engine.py").read_text()), ENGINE) | used(runner, RUNNER)


def test_the_names_are_found_in_the_source() -> None:
    found = names()
    assert {("", "Builder"), ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"), ("ITensor", "dtype")} <= found
    assert {("Builder", "build_serialized_network"), ("ITimingCache", "serialize"), ("ParserError", "desc")} <= found
    assert {("Runtime", "deserialize_cuda_engine"), ("IExecutionContext", "execute_async_v3")} <= found
    assert {owner for owner, _ in found} >= {*ENGINE.values(), *RUNNER.values()}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_used_exists_in_tensorrt_10_12_and_11(version: str) -> None:
    missing = [(owner, name) for owner, name in names() if name not in VERSIONS[version][owner].split()]
    assert missing == []


def test_every_name_used_exists_in_tensorrt_for_rtx() -> None:
    def owner_of(name: str) -> Any:
        return getattr(trt, name) if name else trt

    assert [(owner, name) for owner, name in names() if not hasattr(owner_of(owner), name)] == []


def test_the_list_knows_what_11_removed() -> None:
    first, *later = VERSIONS.values()
    assert "FP16" in first["BuilderFlag"].split()
    assert all("FP16" not in version["BuilderFlag"].split() for version in later)
    assert all("STRONGLY_TYPED" in version["NetworkDefinitionCreationFlag"].split() for version in VERSIONS.values())
