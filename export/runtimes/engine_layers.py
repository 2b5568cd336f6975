"""The compute layers (matrix products, convolutions) of a TensorRT network or engine, by the type they run in.

Contract: `found_layers` reads the built engine with TensorRT's inspector if this machine can load it, since the builder
decides there which kernels run. Otherwise, or if the engine shows too few of them (fused regions hide layers), it reads
the network that was compiled. "read_from" and "note" say which, and why.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

# Types of layers in the inspector's JSON: convolutions ("correlation" in a fused region) and matrix products.
_COMPUTE = re.compile(r"conv|correlation|gemm|matrixmultiply|matmul|fullyconnected", re.IGNORECASE)
# Fused attention, which holds two products, by type, or by the name or kernel of a layer of the type "kgen".
_ATTENTION = re.compile(r"attention|(^|[\W_])f?mha([\W_]|$)", re.IGNORECASE)
_FUSED = re.compile(r"(^|\s)_*(mye\d+_)?(gem[mv]_)?f?mha_", re.IGNORECASE)
# A product fused with what follows it, such as bias and GELU: layers of these types, by name or by kernel.
_FUSED_TYPES = ("fusion", "kgen")
_WITH_PRODUCT = re.compile(r"__myl_\w*Fc(?![a-z])")
# Between the names of products that one kernel runs together, such as query, key and value. " + " joins other operators
# that follow a product, such as an activation.
_TOGETHER = re.compile(r"(?<=\S)\+(?=\S)| \|\| ")
# Words of a tensor's type, in this order: BFloat16 contains Float.
_TYPES = {
    "int8": ("int8",),
    "fp8": ("fp8", "float8", "e4m3"),
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("half", "fp16", "float16"),
    "fp32": ("float", "fp32"),
}
# An engine whose inspector shows a smaller share of the network's compute layers hides the others in fused regions.
LEAST_SHOWN = 0.5


def found_layers(trt: Any, network: Any, plan: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Counts the compute layers by type. `shapes` are the inputs' at opt; the inspector needs them for dynamic axes."""
    found = {**network_layers(trt, network), "read_from": "network"}
    layers, note = _inspected(trt, plan, shapes)
    counts = compute_layers(layers)
    shown, expected = sum(counts.values()) - counts["other"], sum(found["compute_layers"].values())
    if not note and shown < LEAST_SHOWN * expected:
        note = f"the engine shows the types of {shown} of {expected} compute layers"
    if note:
        return {**found, "note": note}
    return {"compute_layers": dict(counts), "layers": len(layers), "read_from": "engine"}


def _inspected(trt: Any, plan: bytes, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Any], str]:
    """The layers of the built engine, and why they cannot be read."""
    try:
        runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
        runtime.engine_host_code_allowed = True  # it was built here
        engine = runtime.deserialize_cuda_engine(plan)
    except TypeError:  # the bindings raise this for a null pointer
        engine = None
    if engine is None:
        return [], "the engine cannot be loaded here"
    context = engine.create_execution_context()
    if context is None:  # as for an engine of TensorRT for RTX on a GPU that it does not know
        return [], "the engine cannot run here"
    for name, shape in shapes.items():
        context.set_input_shape(name, shape)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    try:
        return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"], ""
    except (ValueError, KeyError):
        return [], "TensorRT's inspector does not answer with a list of layers"


def compute_layers(layers: list[Any]) -> Counter[str]:
    """The compute layers of an inspector's JSON by type; layers given by name only, without details, do not count."""
    counts = Counter[str]()
    for layer in layers:
        if isinstance(layer, dict) and (products := _products(layer)):
            counts[_engine_type(layer)] += products
    return counts


def _products(layer: dict[str, Any]) -> int:
    """The matrix products and convolutions in a layer."""
    kind = f"{layer.get('LayerType')} {layer.get('ParameterType')}"
    name, kernel = (str(layer.get(field)) for field in ("Name", "TacticName"))
    is_fused = layer.get("LayerType") in _FUSED_TYPES
    if _ATTENTION.search(kind) or (is_fused and _FUSED.search(f"{name} {kernel}")):
        return 2
    if _COMPUTE.search(kind) or (is_fused and (_WITH_PRODUCT.match(name) or _COMPUTE.search(kernel))):
        return 1 + len(_TOGETHER.findall(name))
    return 0


def _engine_type(layer: dict[str, Any]) -> str:
    """The type of the first input; `int8_weights` if only the weights have another, smaller type."""
    first = next(iter(_tensor_types(layer, "Inputs")), "other")
    weights = layer.get("Weights")
    stored = {*_tensor_types(layer, "Constants"), _type_of(weights.get("Type")) if isinstance(weights, dict) else first}
    narrow = next((name for name in ("int8", "fp8") if name in stored), "")
    return f"{narrow}_weights" if narrow and first not in ("int8", "fp8") else first


def _tensor_types(layer: dict[str, Any], field: str) -> list[str]:
    """The types of a layer's tensors: TensorRT 11 tells them as "Datatype", 10 together with the format."""
    tensors = [each for each in layer.get(field) or () if isinstance(each, dict)]
    return [_type_of(each.get("Datatype") or each.get("Format/Datatype")) for each in tensors]


def _type_of(text: object) -> str:
    words = str(text).lower()
    return next((name for name, signs in _TYPES.items() if any(sign in words for sign in signs)), "other")


def network_layers(trt: Any, network: Any) -> dict[str, Any]:
    """Counts the compute layers of a network before it is compiled."""
    names = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16", trt.int8: "int8", trt.fp8: "fp8"}
    compute = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    counts = Counter(_layer_type(trt, layer, producers, names) for layer in layers if layer.type in compute)
    return {"compute_layers": dict(counts), "layers": len(layers)}


def _layer_type(trt: Any, layer: Any, producers: dict[str, Any], names: dict[Any, str]) -> str:
    """The quantized type if every operand is dequantized, else the type of the first operand.

    `int8_weights` if only the second operand, a constant, is dequantized.
    """
    carriers = (trt.LayerType.SHUFFLE, trt.LayerType.CAST, trt.LayerType.IDENTITY)
    quantized = []
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    for tensor in inputs[:2]:
        producer = producers.get(tensor.name) if tensor is not None else None
        while producer is not None and producer.type in carriers:
            producer = producers.get(producer.get_input(0).name)
        if producer is not None and producer.type == trt.LayerType.DEQUANTIZE:
            quantized.append(names.get(producer.get_input(0).dtype, "other"))
    if len(quantized) == 2:
        return quantized[0]
    if quantized and producer is not None and producer.type == trt.LayerType.DEQUANTIZE:
        stored = producers.get(producer.get_input(0).name)
        if stored is not None and stored.type == trt.LayerType.CONSTANT:
            return f"{quantized[0]}_weights"
    return names.get(inputs[0].dtype, "other")


def described(found: Mapping[str, Any], precision: str) -> str:
    """The compute layers in words, where they were read, and for fp32 whether TF32 was allowed."""
    counts = ", ".join(f"{count} in {name}" for name, count in found["compute_layers"].items()) or "none"
    tf32 = f", TF32 {'on' if found['tf32'] else 'off'}" if precision == "fp32" else ""
    note = f" ({found['note']})" if "note" in found else ""
    return f"{counts}{tf32}, read from the {found['read_from']}{note}"
