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


SHAPES = {"x": (2, 3)}


class Fake:
    """TensorRT's runtime, engine, context and inspector in one; `layers` None: the plan cannot be loaded.

    The plan contains code, which runs only if that is allowed. The inspector needs a context with the shapes.
    """

    engine_host_code_allowed, execution_context = False, None

    def __init__(self, layers: list[Any] | None) -> None:
        self.layers, self.shapes = layers, dict[str, tuple[int, ...]]()

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        """The engine, or None as TensorRT returns it."""
        return self if self.layers is not None and self.engine_host_code_allowed else None

    def create_execution_context(self) -> Any:
        """The context."""
        return self

    def create_engine_inspector(self) -> Any:
        """The inspector."""
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Sets the shape of an input."""
        self.shapes[name] = shape

    def get_engine_information(self, kind: int) -> str:
        """The layers as JSON."""
        ready = self.execution_context is self and self.shapes == SHAPES
        return json.dumps({"Layers": self.layers if ready else [], "Bindings": []})


def fake(layers: list[Any] | None) -> Any:
    """A fake of TensorRT's module."""
    return SimpleNamespace(
        Runtime=lambda _: Fake(layers),
        Logger=type("Logger", (), {"INTERNAL_ERROR": 0, "__init__": lambda self, _: None}),
        LayerInformationFormat=SimpleNamespace(JSON=1),
    )


@pytest.fixture(autouse=True)
def _network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine_layers, "network_layers", lambda trt, network: {"compute_layers": {"int8": 5}, "layers": 9}
    )


def test_with_a_fake_inspector_the_types_are_those_of_the_built_engine() -> None:
    found = found_layers(fake(ATTENTION), None, b"plan", SHAPES)
    assert found["compute_layers"] == {"int8": 2, "int8_weights": 1, "fp16": 1, "bf16": 1}
    assert (found["read_from"], found["layers"]) == ("engine", 7)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (None, "the engine cannot be loaded here"),
        ([], "the engine shows 0 of 5 compute layers"),
        ([layer("Myelin", "Half"), "a layer by name only"], "the engine shows 0 of 5 compute layers"),
        (ATTENTION[:3], "the engine shows 2 of 5 compute layers"),
    ],
)
def test_with_a_fake_inspector_that_shows_too_little_the_network_is_read_and_the_report_says_why(
    layers: list[Any] | None, why: str
) -> None:
    found = found_layers(fake(layers), None, b"plan", SHAPES)
    assert (found["compute_layers"], found["read_from"], found["note"]) == ({"int8": 5}, "network", why)
    assert described(found, "int8") == f"5 in int8, read from the network ({why})"


@pytest.mark.parametrize(("tf32", "said"), [(True, "TF32 on"), (False, "TF32 off")])
def test_an_fp32_engine_says_whether_tf32_was_on(tf32: bool, said: str) -> None:
    found = {"compute_layers": {"fp32": 3}, "read_from": "engine", "tf32": tf32}
    assert described(found, "fp32") == f"3 in fp32, {said}, read from the engine"
