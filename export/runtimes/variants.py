"""Picks the predictor and the timers for a precision on a target."""

from deepseek.spec import DeploymentSpec, Precision, Target, variables_for
from export.artifact import engine_path, need, onnx_path, read_manifest
from export.model_folder import Predict
from export.rows import Row
from export.runtimes.onnxruntime_predictor import onnx_predictor
from export.runtimes.tensorrt_predictor import tensorrt_predictor, tensorrt_timers
from export.runtimes.timing import Timer, wall
from export.runtimes.torchscript_predictor import torchscript_predictor


def variant_predictor(spec: DeploymentSpec, precision: Precision, target: Target) -> Predict:
    """The predictor for a precision on a target. RTX engines need their GPU, so their graph runs instead."""
    hint = f"make engine {variables_for(spec.name)} PRECISION={precision}"
    if target == "torchscript":
        path = need(engine_path(spec.name, precision, target), f"{hint} TARGET=torchscript")
        return torchscript_predictor(spec, path, read_manifest(path).settings["device"])
    if target == "tensorrt":
        return tensorrt_predictor(spec, need(engine_path(spec.name, precision, target), hint))
    return onnx_predictor(spec, need(onnx_path(spec.name, precision), hint), target)


def variant_timers(
    spec: DeploymentSpec, precision: Precision, target: Target, predict: Predict, inputs: Row
) -> tuple[Timer, Timer | None]:
    """Timers of a run, and of its copies to and from the GPU; elsewhere copies are part of the run."""
    if target == "tensorrt":
        return tensorrt_timers(spec, engine_path(spec.name, precision, target), inputs)
    return wall(lambda: predict(inputs)), None
