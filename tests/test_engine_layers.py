"""Types of an engine's compute layers. Without a GPU no engine can be loaded: the inspector here is a fake."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from export.runtimes import engine_layers
from export.runtimes.engine_layers import described, found_layers


def layer(kind: str, first: str, **more: Any) -> dict[str, Any]:
    """One layer of the inspector's JSON with ProfilingVerbosity.DETAILED."""
    return {"Name": "a", "LayerType": kind, "Inputs": [{"Name": "x", "Format/Datatype": first}], **more}


ATTENTION = [
    layer("Reformat", "Row major linear FP16 format"),
    layer("CaskConvolution", "Thirty-two wide channel vectorized row major Int8 format"),
    layer("gemm", "Int8"),
    layer("gemm", "Half", Weights={"Type": "Int8", "Count": 9}),
    layer("kgen", "Float"),
    layer("_gemm_mha_v2", "Half"),
    layer("MatrixMultiply", "BFloat16"),
]


def fake(layers: list[Any] | None) -> Any:
    """A fake of TensorRT's module: a runtime that loads a plan with these layers; None: it cannot load it."""
    context = SimpleNamespace(set_input_shape=lambda name, shape: True)
    told = json.dumps({"Layers": layers, "Bindings": []})
    inspector = SimpleNamespace(get_engine_information=lambda kind: told)
    engine = SimpleNamespace(create_execution_context=lambda: context, create_engine_inspector=lambda: inspector)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: None if layers is None else engine)
    logger = SimpleNamespace(INTERNAL_ERROR=0)
    return SimpleNamespace(
        Runtime=lambda _: runtime, Logger=type("Logger", (), {"INTERNAL_ERROR": 0, "__init__": lambda self, _: None}),
        LayerInformationFormat=SimpleNamespace(JSON=1), logger=logger,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine_layers, "network_layers", lambda trt, network: {"compute_layers": {"int8": 5}, "layers": 9}
    )


def test_with_a_fake_inspector_the_types_are_those_of_the_built_engine() -> None:
    found = found_layers(fake(ATTENTION), None, b"plan", {"x": (2, 3)})
    assert found["compute_layers"] == {"int8": 2, "int8_weights": 1, "fp16": 1, "bf16": 1}
    assert (found["read_from"], found["layers"]) == ("engine", 7)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (None, "the engine cannot be loaded here"),
        ([layer("Myelin", "Half"), "a layer by name only"], "the engine shows 0 of 5 compute layers"),
        (ATTENTION[:3], "the engine shows 2 of 5 compute layers"),
    ],
)
def test_with_a_fake_inspector_that_shows_too_little_the_network_is_read_and_the_report_says_why(
    layers: list[Any] | None, why: str
) -> None:
    found = found_layers(fake(layers), None, b"plan", {})
    assert (found["compute_layers"], found["read_from"], found["note"]) == ({"int8": 5}, "network", why)
    assert described(found, "int8") == f"5 in int8, read from the network ({why})"


@pytest.mark.parametrize(("tf32", "said"), [(True, "TF32 on"), (False, "TF32 off")])
def test_an_fp32_engine_says_whether_tf32_was_on(tf32: bool, said: str) -> None:
    found = {"compute_layers": {"fp32": 3}, "read_from": "engine", "tf32": tf32}
    assert described(found, "fp32") == f"3 in fp32, {said}, read from the engine"
