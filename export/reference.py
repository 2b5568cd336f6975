"""The fp32 PyTorch model as the reference that what was made of it is held against.

Contract: outputs are checked against the signature; `check_corners` runs what was made (the ONNX graph, the TorchScript
module) on real inputs at the corners of the profile, none of them where it was traced: a size or a value that was
baked in is found there.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from deepseek.spec import BATCH, DeploymentSpec, GateFailed, InputError
from export.artifact import Row
from export.source import Predict

TOLERANCE = 1e-3  # of the largest magnitude of an output; both sides are fp32
INTEGER_AGREEMENT = 0.99  # equal entries of an integer output: ties may fall either way


def traced_sizes(spec: DeploymentSpec) -> dict[str, int]:
    """Sizes that the graph is traced at: opt, but never 1, which torch.export would bake in."""
    return {name: min(max(axis.opt, 2), axis.max) for name, axis in spec.axes.items()}


def checked_sizes(spec: DeploymentSpec) -> list[dict[str, int]]:
    """Smallest, largest and one between, the traced sizes left out."""
    traced = traced_sizes(spec)
    between = {}
    for name, axis in spec.axes.items():
        middle = (axis.min + axis.max) // 2
        between[name] = middle if middle != traced[name] else min(middle + 1, axis.max)
    corners = [{name: getattr(axis, end) for name, axis in spec.axes.items()} for end in ("min", "max")]
    return [sizes for sizes in [*corners, between] if sizes != traced]


def inputs_at(spec: DeploymentSpec, rows: list[Row], sizes: dict[str, int]) -> Row:
    """Real inputs brought to `sizes`: rows repeat along the batch, values along the other axes."""
    inputs = {}
    for name, tensor in spec.inputs.items():
        fitted = []
        for index in range(sizes[BATCH]):
            array = rows[index % len(rows)][name]
            for place, dim in enumerate(tensor.shape[1:], start=1):
                if isinstance(dim, str) and array.shape[place] != sizes[dim]:
                    array = np.take(array, np.arange(sizes[dim]) % array.shape[place], axis=place)
            fitted.append(array)
        inputs[name] = np.concatenate(fitted)
    return inputs


def run_torch(spec: DeploymentSpec, model: torch.nn.Module, inputs: Row) -> Row:
    """Outputs of the PyTorch model by name; raises InputError where they are not the signature's."""
    with torch.inference_mode():
        returned = model(*(torch.from_numpy(inputs[name]) for name in spec.inputs))
    values = list(returned) if isinstance(returned, tuple | list) else [returned]
    if len(values) != len(spec.outputs) or not all(isinstance(value, torch.Tensor) for value in values):
        seen = ", ".join(type(value).__name__ for value in values)
        raise InputError(
            f"model.py: forward returned {len(values)} value(s) ({seen}); deploy.toml names the outputs "
            f"{', '.join(spec.outputs)}: one tensor each, in that order"
        )
    outputs = {name: value.numpy() for name, value in zip(spec.outputs, values, strict=True)}
    for name, tensor in spec.outputs.items():
        sizes = {
            dim: size
            for each in spec.inputs
            for dim, size in zip(spec.inputs[each].shape, inputs[each].shape, strict=True)
        }
        expected = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
        if outputs[name].shape != expected or outputs[name].dtype != tensor.dtype:
            raise InputError(
                f"model.py: output {name!r}: forward returned {outputs[name].dtype} {list(outputs[name].shape)}; "
                f"deploy.toml says {tensor.dtype} {list(tensor.shape)}, here {list(expected)}"
            )
    return outputs


def check_corners(
    spec: DeploymentSpec, model: torch.nn.Module, predict: Predict, what: str, rows: list[Row]
) -> list[dict[str, Any]]:
    """Worst error of `predict` by output at each checked shape; raises GateFailed past the tolerance."""
    checks = []
    for sizes in checked_sizes(spec):
        inputs = inputs_at(spec, rows, sizes)
        try:
            expected = run_torch(spec, model, inputs)
        except RuntimeError as error:
            raise InputError(
                f"model.py: forward itself fails at {sizes_text(sizes)}, which the axes of deploy.toml allow: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        try:
            values = predict(inputs)
        except Exception as error:
            raise GateFailed(
                f"{what}: does not run at {sizes_text(sizes)}, though the profile allows it: "
                f"{' '.join(str(error).split())[:300]}; a size is baked into forward"
            ) from None
        worst = {}
        for name, value in values.items():
            reference = expected[name]
            if value.shape != reference.shape:
                raise GateFailed(
                    f"{what}: output {name!r} at {sizes_text(sizes)}: shape {value.shape}, "
                    f"PyTorch gives {reference.shape}"
                )
            worst[name] = error_of(value, reference)
            if not worst[name] <= (TOLERANCE if reference.dtype.kind == "f" else 1 - INTEGER_AGREEMENT):
                raise GateFailed(
                    f"{what}: output {name!r} at {sizes_text(sizes)} is off by {worst[name]:.3g} relative to PyTorch; "
                    f"allowed {TOLERANCE:g} (floats), {1 - INTEGER_AGREEMENT:.2g} of the entries (integers)"
                )
        checks.append({"sizes": sizes, "worst_error": worst})
    return checks


def error_of(value: np.ndarray, reference: np.ndarray) -> float:
    """Worst error relative to the largest magnitude (floats), or the share of unequal entries.

    NaN and Inf must stand at the same places in both; elsewhere they count as an infinite error.
    """
    if reference.dtype.kind != "f":
        return float(np.mean(value != reference))
    value, reference = value.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(reference)
    if not np.array_equal(
        np.where(finite, 0, reference), np.where(finite & np.isfinite(value), 0, value), equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(value - reference)[finite].max() / max(np.abs(reference[finite]).max(), 1e-6))


def sizes_text(sizes: dict[str, int]) -> str:
    """Sizes by axis, for messages and tables."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over names, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
