"""The TensorRT names that the code uses exist in TensorRT 10.12, in 11 and in TensorRT for RTX.

The names are read from the source. Those of 10.12 and 11 are in `tests/tensorrt_api.json`, which
`tests/tensorrt_api.py` makes from the bindings that NVIDIA publishes; those of RTX come from the installed package.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tensorrt_api import API, CLASSES

trt = pytest.importorskip("tensorrt_rtx")

VERSIONS: dict[str, dict[str, Any]] = json.loads(API.read_text())
# The class of a variable's value; "" is the module.
ENGINE = {
    **{"trt": "", "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser"},
    **{"config": "IBuilderConfig", "profile": "IOptimizationProfile", "cache": "ITimingCache"},
    **{"error": "ParserError"},
}
LAYERS = {
    **{"trt": "", "network": "INetworkDefinition", "runtime": "Runtime", "engine": "ICudaEngine"},
    **{"context": "IExecutionContext", "inspector": "EngineInspector", "layer": "ILayer", "producer": "ILayer"},
    **{"tensor": "ITensor", "inputs": "ITensor"},
}
RUNNER = {"trt": "", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext"}
# The class that a method returns, if the code uses its attributes.
RETURNS = {
    ("INetworkDefinition", "get_input"): "ITensor",
    ("ILayer", "get_input"): "ITensor",
    ("ILayer", "get_output"): "ITensor",
    ("OnnxParser", "get_error"): "ParserError",
    ("IBuilderConfig", "get_timing_cache"): "ITimingCache",
}


def class_of(node: ast.expr, variables: dict[str, str]) -> str | None:
    """The TensorRT class of an expression; None if it is not TensorRT's."""
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


def sources() -> list[tuple[ast.AST, dict[str, str]]]:
    """The code that uses TensorRT, with the classes of its variables."""
    runners = ast.parse(Path("export/runtimes/tensorrt_predictor.py").read_text())
    layers = ast.parse(Path("export/runtimes/engine_layers.py").read_text())
    functions = {getattr(node, "name", ""): node for tree in (runners, layers) for node in ast.walk(tree)}
    of_trt = [functions[name] for name in ("_inspected", "network_layers", "_layer_type")]
    engine = ast.parse(Path("export/runtimes/tensorrt_engine.py").read_text())
    of_runner = [functions[name] for name in ("_loaded", "_bound", "_execute")]
    return [(engine, ENGINE), *((each, RUNNER) for each in of_runner), *((each, LAYERS) for each in of_trt)]


def names() -> set[tuple[str, str]]:
    """All TensorRT names that the project uses."""
    return {name for tree, variables in sources() for name in used(tree, variables)}


def calls() -> list[tuple[str, str, ast.Call]]:
    """Class, name and call of every method or class of TensorRT that the code calls."""
    found = []
    for tree, variables in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = class_of(node.func.value, variables)
                if owner is not None and not node.func.attr.startswith("_"):
                    found.append((owner, node.func.attr, node))
    return found


def fits(call: ast.Call, signature: str) -> bool:
    """Whether a call passes arguments that the signature allows: `(self: X, flag: Y, value: bool = True)`."""
    listed = re.findall(r"(\w+): .*?(?=, \w+: |\)$)", signature)
    parts = dict(zip(listed, re.split(r", (?=\w+: )", signature.strip("()")), strict=True))
    parts.pop("self", None)
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return len(parts) >= len(call.args)
    given = [*list(parts)[: len(call.args)], *(keyword.arg for keyword in call.keywords)]
    needed = [name for name, text in parts.items() if " = " not in text]
    return len(call.args) <= len(parts) and set(needed) <= set(given) <= set(parts)


def test_the_names_are_found_in_the_source() -> None:
    found = names()
    assert {("", "Builder"), ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"), ("ITensor", "dtype")} <= found
    assert {("Builder", "build_serialized_network"), ("ITimingCache", "serialize"), ("ParserError", "desc")} <= found
    assert {("Runtime", "engine_host_code_allowed"), ("Runtime", "deserialize_cuda_engine")} <= found
    assert {("IBuilderConfig", "add_optimization_profile"), ("IExecutionContext", "execute_async_v3")} <= found
    assert {("IBuilderConfig", "profiling_verbosity"), ("EngineInspector", "get_engine_information")} <= found
    assert {owner for owner, _ in found} >= {*ENGINE.values(), *RUNNER.values()} - {"ILayer", "ITensor"}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_used_exists_in_tensorrt_10_12_and_11(version: str) -> None:
    missing = [(owner, name) for owner, name in names() if name not in VERSIONS[version]["names"][owner].split()]
    assert missing == []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_fits_a_signature_of_tensorrt_10_12_and_11(version: str) -> None:
    signatures = VERSIONS[version]["signatures"]
    for owner, name, call in calls():
        known = signatures[f"{owner}.{name}".strip(".")]
        assert any(fits(call, each) for each in known), f"{ast.unparse(call)}: {known}"


def test_every_name_used_exists_in_tensorrt_for_rtx() -> None:
    def owner_of(name: str) -> Any:
        return getattr(trt, name) if name else trt

    assert [(owner, name) for owner, name in names() if not hasattr(owner_of(owner), name)] == []
