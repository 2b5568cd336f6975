"""A graph in ONNX Runtime as a function from a dict of arrays to a dict of arrays."""

from pathlib import Path

import onnx
import onnxruntime

from deepseek.onnxruntime_session import ProviderError, choose_provider, cores, open_session
from deepseek.spec import DeploymentSpec, GateFailed, InputError, Target, one_line
from deepseek.spec.tables import OnnxRuntimeSpec
from export.model_folder import Predict

# Optimizers of ONNX Runtime to disable for graphs with values of a type.
_FAULTY = {
    # It moves a Transpose past the Cast to fp32 that a CPU needs and leaves a node without a definition; the layout
    # optimizer then reads a null pointer (microsoft/onnxruntime#28392; happens with vision Transformers).
    onnx.TensorProto.FLOAT16: ("MatmulTransposeFusion",),
    # They mistake fp8 for uint8. The first drops a Relu before QuantizeLinear as implied by the range: negative values
    # pass. The others, up to 1.31.1 (the newest onnxruntime-gpu), make integer operators that do not take fp8.
    onnx.TensorProto.FLOAT8E4M3FN: ("ReluQuantRewrite", "QDQPropagationTransformer", "QDQSelectorActionTransformer"),
}


def optimizers_left_out(path: Path) -> list[str]:
    """Optimizers of ONNX Runtime to disable for the graph at `path`, here and in the server."""
    graph = onnx.load(path, load_external_data=False).graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info]}
    types |= {attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute}
    return [optimizer for type_, optimizers in _FAULTY.items() if type_ in types for optimizer in optimizers]


def provider_of(spec: DeploymentSpec) -> str:
    """The execution provider that serves the graph here; raises InputError if ONNX Runtime lacks it."""
    try:
        return choose_provider(spec.onnxruntime.provider)
    except ProviderError as error:
        raise InputError(str(error)) from None


def on_host(spec: DeploymentSpec, target: Target) -> DeploymentSpec:
    """The spec with ONNX Runtime on the CPU if another target serves: the build then needs no CUDA in ONNX Runtime."""
    if target == "onnxruntime":
        return spec
    return spec.model_copy(update={"onnxruntime": OnnxRuntimeSpec(provider="cpu")})


def onnx_predictor(spec: DeploymentSpec, path: Path, target: Target) -> Predict:
    """A predictor of the graph with the threads of one served instance.

    Raises InputError if the execution provider is missing, GateFailed if the graph cannot be loaded.
    """
    spec = on_host(spec, target)
    batching = spec.for_target(target).batching
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = batching.threads or max(1, cores() // batching.instances)
    options.log_severity_level = 4  # its errors are raised
    options.add_session_config_entry("session.force_spinning_stop", "1")  # otherwise idle threads slow the next variant
    session = opened(path, options, spec.onnxruntime.provider, spec.provider_options)
    return lambda inputs: dict(zip(spec.outputs, session.run(list(spec.outputs), inputs), strict=True))


def opened(
    path: Path,
    options: onnxruntime.SessionOptions,
    provider: str = "cpu",
    provider_options: dict[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """A session on a provider, without the optimizers that break the graph; raises as `onnx_predictor`."""
    try:
        left_out = optimizers_left_out(path)
        return open_session(path, options, provider, provider_options, left_out=left_out).session
    except ProviderError as error:
        raise InputError(str(error)) from None
    except Exception as error:
        raise GateFailed(f"{path}: ONNX Runtime cannot load it: {one_line(error)}") from None
