"""The fp32 PyTorch model as the reference for the graphs and modules made from it.

Contract: outputs are checked against the signature. `check_corners` runs an artifact (ONNX graph, TorchScript module)
on real inputs at the corners of the profile, none of them traced sizes: this finds sizes and values that tracing baked
in. A profile with only one shape is checked there, with other inputs than those that were traced.
"""

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from deepseek.spec import BATCH, Axis, DeploymentSpec, GateFailed, InputError, one_line
from deepseek.spec.machine.cpu import memory_bytes
from export.artifact import human_bytes
from export.model_folder import Predict, folder_of, in_order, model_py, user_code
from export.rows import Row, join

# Relative to the largest magnitude of an output.
HALF_TOLERANCE = 2e-3  # a float16 output rounds to 11 bits
ROW_TOLERANCE = 0.01  # a batch may run other kernels than a single row
_WIDENED = "; load()'s 16-bit weights were widened to float32, so cast to the weights' dtype, not to a fixed one"
_TIES = "; if nearly equal scores are ranked, set common in [parity.fp32] of deploy.toml, or return the scores too"


def traced_sizes(spec: DeploymentSpec) -> dict[str, int]:
    """Sizes to trace the graph at: opt, or next to it if opt is an end and there are sizes between the ends.

    Never 1, which torch.export would bake in, unless it is the only size.
    """
    return {name: _traced_size(axis) for name, axis in spec.axes.items()}


def _traced_size(axis: Axis) -> int:
    between = range(max(axis.min + 1, 2), axis.max)
    return min(max(axis.opt, between[0]), between[-1]) if between else min(max(axis.opt, 2), axis.max)


def checked_sizes(spec: DeploymentSpec) -> list[dict[str, int]]:
    """Smallest, largest and one size between, without the traced sizes; the traced sizes if there are no others.

    Between, all axes get different sizes if possible: otherwise one axis could be mistaken for another. Each is an odd
    number away from the traced size: forward may pad odd sizes, and tracing keeps only the path that it took.
    """
    traced = traced_sizes(spec)
    between: dict[str, int] = {}
    for name, axis in spec.axes.items():
        middle = (axis.min + axis.max) // 2
        middle += (middle - traced[name]) % 2 == 0
        odd = itertools.chain(range(middle, axis.max + 1, 2), range(middle - 2, axis.min - 1, -2))
        sizes = itertools.chain(odd, range(axis.min, axis.max + 1))
        free = (size for size in sizes if size != traced[name] and size not in between.values())
        between[name] = next(free, traced[name])
    corners = [{name: getattr(axis, end) for name, axis in spec.axes.items()} for end in ("min", "max")]
    found = [sizes for sizes in [*corners, between] if sizes != traced]
    return [sizes for place, sizes in enumerate(found) if sizes not in found[:place]] or [traced]


def _checked_inputs(
    spec: DeploymentSpec, rows: list[Row], further: Sequence[dict[str, int]]
) -> Iterator[tuple[dict[str, int], Row]]:
    """Real inputs at each of the checked sizes; at the traced sizes the last rows, since tracing used the first."""
    for sizes in [*checked_sizes(spec), *further]:
        yield sizes, inputs_at(spec, rows[::-1] if sizes == traced_sizes(spec) else rows, sizes)


def inputs_at(spec: DeploymentSpec, rows: list[Row], sizes: dict[str, int]) -> Row:
    """Real inputs brought to `sizes`: rows are repeated along the batch, and the next rows extend short ones."""
    rows, inputs = _still_valid(spec, rows, sizes), {}
    for name, tensor in spec.inputs.items():
        fitted = []
        for first in range(sizes[BATCH]):
            following = (rows[(first + step) % len(rows)][name] for step in itertools.count())
            fitted.append(_at_sizes(following, tensor.shape, sizes))
        inputs[name] = np.concatenate(fitted)
    return inputs


def _still_valid(spec: DeploymentSpec, rows: list[Row], sizes: dict[str, int]) -> list[Row]:
    """Rows without those whose integers would point past an axis that is cut to `sizes`; all if none remains.

    Integers that exceed an axis in no row are taken for lengths or positions along it.
    """
    for axis, (sized, place) in _sized_by(spec).items():
        for name in [name for name, tensor in spec.inputs.items() if tensor.dtype.startswith("int")]:
            beyond = [int(row[name].max(initial=-1)) - row[sized].shape[place] for row in rows]
            if max(beyond) <= 0:
                most = sizes[axis] - (max(beyond) < 0)  # positions count from 0
                rows = [row for row in rows if row[name].max(initial=-1) <= most] or rows
    return rows


def _sized_by(spec: DeploymentSpec) -> dict[str, tuple[str, int]]:
    """By axis within a row: an input that has it, and its dimension there."""
    return {
        dim: (name, place)
        for name, tensor in spec.inputs.items()
        for place, dim in enumerate(tensor.shape)
        if isinstance(dim, str) and dim != BATCH
    }


def _at_sizes(arrays: Iterator[np.ndarray], shape: tuple[int | str, ...], sizes: dict[str, int]) -> np.ndarray:
    """The first array at `sizes`: each axis within the row continues with the next arrays.

    If an axis repeated its own values, an arg-max or top-k would meet equal scores, whose order is undefined.
    """
    return _continued(
        arrays, [(place, sizes[dim]) for place, dim in enumerate(shape) if place and isinstance(dim, str)]
    )


def _continued(arrays: Iterator[np.ndarray], axes: list[tuple[int, int]]) -> np.ndarray:
    """An array with each of `axes`, a dimension and its size. Parts side by side are cut to the smallest of them."""
    if not axes:
        return next(arrays)
    (place, size), *within = axes
    parts: list[np.ndarray] = []
    while sum(part.shape[place] for part in parts) < size:
        parts.append(_continued(arrays, within))
    least = np.min([part.shape for part in parts], axis=0)
    least[place] = size
    cut = tuple(slice(each) for each in least)
    return np.concatenate([part[cut] for part in parts], axis=place)[cut]


def check_memory(spec: DeploymentSpec, rows: list[Row]) -> None:
    """Raises InputError if this machine has too little memory for later stages.

    They hold the outputs of all evaluation rows, of PyTorch and of a variant, and four times the largest batch.
    """
    kept, memory = 2 * sum(_output_bytes(spec, row) for row in rows), memory_bytes()
    batches = 4 * _bytes_at_most(spec, [*spec.inputs, *spec.outputs])
    if kept + batches > memory:
        raise InputError(
            f"{model_py(spec)}: samples('evaluation'): the outputs of {len(rows)} rows, of PyTorch and of a variant, "
            f"take {human_bytes(kept)}, running the largest sizes of deploy.toml {human_bytes(batches)}, this machine "
            f"has {human_bytes(memory)}; let samples give fewer rows, or forward less, or lower the largest sizes"
        )


def _bytes_at_most(spec: DeploymentSpec, names: list[str]) -> int:
    tensors = {**spec.inputs, **spec.outputs}
    return sum(math.prod(spec.shape(name, "max")) * np.dtype(tensors[name].dtype).itemsize for name in names)


def _output_bytes(spec: DeploymentSpec, row: Row) -> int:
    """Bytes of all outputs of a row."""
    sizes = _sizes_of(spec, row)
    return sum(
        math.prod(_sized(tensor.shape, sizes)) * np.dtype(tensor.dtype).itemsize for tensor in spec.outputs.values()
    )


def _sizes_of(spec: DeploymentSpec, inputs: Row) -> dict[str, int]:
    """The size of each axis in these inputs."""
    return {
        dim: size
        for name, tensor in spec.inputs.items()
        for dim, size in zip(tensor.shape, inputs[name].shape, strict=True)
        if isinstance(dim, str)
    }


def _sized(shape: tuple[int | str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)


def run_torch(spec: DeploymentSpec, model: torch.nn.Module, inputs: Row) -> Row:
    """Outputs of the PyTorch model by name; raises InputError if forward fails or they do not fit the signature."""
    arguments = ", ".join(f"{name}: {inputs[name].dtype} {list(inputs[name].shape)}" for name in spec.inputs)
    what = f"forward({arguments}) on samples at these sizes{_WIDENED if getattr(model, 'widened', False) else ''}"
    with _hinted(), user_code(folder_of(spec), what), torch.inference_mode():
        values = in_order(spec, model(*(torch.tensor(inputs[name]) for name in spec.inputs)))  # copies: it may write
    sizes = _sizes_of(spec, inputs)
    for (name, tensor), value in zip(spec.outputs.items(), values, strict=True):
        expected, dtype = _sized(tensor.shape, sizes), str(value.dtype).removeprefix("torch.")
        if value.shape != expected or dtype != tensor.dtype:
            raise InputError(
                f"{model_py(spec)}: output {name!r}: forward returned {dtype} {list(value.shape)}; deploy.toml says "
                f"{tensor.dtype} {list(tensor.shape)}, here {list(expected)}"
            )
    return {name: value.numpy(force=True) for name, value in zip(spec.outputs, values, strict=True)}


def module_predictor(spec: DeploymentSpec, model: torch.nn.Module) -> Predict:
    """`run_torch` of a module."""
    return functools.partial(run_torch, spec, model)


@contextlib.contextmanager
def _hinted() -> Iterator[None]:
    """Adds advice to an index error: a sample that was cut may still have the length or positions of the whole."""
    try:
        yield
    except InputError as error:
        if "out of bounds" not in str(error):
            raise
        raise InputError(
            f"{error}; if the index is an input's value that depends on a size, let samples() give some of these sizes "
            "or smaller, or clamp it in forward"
        ) from error


def check_repeatable(spec: DeploymentSpec, model: torch.nn.Module, inputs: Row) -> None:
    """Raises InputError if two calls with the same inputs differ, which no graph can reproduce."""
    first, second = (run_torch(spec, model, inputs) for _ in range(2))
    for name, value in second.items():
        error = error_of(value, first[name])
        if not error <= tolerance_of(spec, value):
            raise InputError(
                f"{model_py(spec)}: forward called twice with the same inputs gives another output {name!r} (off by "
                f"{error:.3g}): it draws at random or keeps state from call to call; a served graph must do neither"
            )


def check_rows_independent(spec: DeploymentSpec, model: torch.nn.Module, inputs: Row) -> None:
    """Raises InputError if the outputs of the smallest request depend on the rows that Triton adds from other callers.

    Compares the float outputs. Integers and flags count only in a model without floats: ranks of nearly equal scores
    may differ.
    """
    rows, least = len(next(iter(inputs.values()))), spec.axes[BATCH].min
    if rows < 2 * least:  # one request
        return
    together = run_torch(spec, model, inputs)
    alone = join(
        [
            run_torch(spec, model, {name: array[start:end] for name, array in inputs.items()})
            for start, end in itertools.pairwise([*range(0, rows - least + 1, least), rows])
        ]
    )
    floats = {name: value for name, value in alone.items() if value.dtype.kind == "f"}
    for name, value in (floats or alone).items():
        error = error_of(value, together[name])
        if not error <= max(ROW_TOLERANCE if floats else 0.0, tolerance_of(spec, value)):
            raise InputError(
                f"{model_py(spec)}: output {name!r} of {least} row(s) alone is off by {error:.3g} from the same in a "
                f"batch of {rows}: rows influence one another, but Triton batches requests of different callers; "
                "compute each row by itself, or set [axes.batch] to min = opt = max: each request is then one batch"
                f"{'' if floats else _TIES}"
            )


def tolerance_of(spec: DeploymentSpec, reference: np.ndarray, *, tf32: bool = False) -> float:
    """The largest allowed `error_of`: `[parity.fp32]` of deploy.toml, or more in TF32."""
    allowed = spec.parity.of_tf32() if tf32 else spec.parity.of("fp32")
    if reference.dtype.kind != "f":
        return 1 - allowed.common
    return max(allowed.worst_error, HALF_TOLERANCE if reference.dtype == np.float16 else 0.0)


def check_corners(
    spec: DeploymentSpec,
    model: torch.nn.Module,
    predict: Predict,
    what: str,
    rows: list[Row],
    branches: Sequence[dict[str, int]] = (),
    *,
    tf32: bool = False,
) -> list[dict[str, Any]]:
    """Worst error of `predict` by output at each checked shape; raises GateFailed past the tolerance.

    `branches`: further sizes, at which `forward` takes another path than the traced one. `tf32`: whether `predict`
    multiplies in it.
    """
    checks = []
    for sizes, inputs in _checked_inputs(spec, rows, branches):
        expected = run_torch(spec, model, inputs)
        try:
            values = predict(inputs)
        except Exception as error:
            raise GateFailed(
                f"{what}: does not run at {sizes_text(sizes)}, though the profile allows it: "
                f"{one_line(error)}; a size is baked into forward"
            ) from None
        worst = {}
        for name, value in values.items():
            reference = expected[name]
            if value.shape != reference.shape:
                raise GateFailed(
                    f"{what}: output {name!r} at {sizes_text(sizes)}: shape {value.shape}, "
                    f"PyTorch gives {reference.shape}; a size is baked into forward"
                )
            worst[name] = error_of(value, reference)
            if not worst[name] <= (allowed := tolerance_of(spec, reference, tf32=tf32)):
                raise GateFailed(
                    f"{what}: output {name!r} at {sizes_text(sizes)} is off by {worst[name]:.3g} relative to PyTorch; "
                    f"allowed {allowed:.2g}; {_why_off(spec, worst[name], reference)}"
                )
        checks.append({"sizes": sizes, "worst_error": worst})
    return checks


def _why_off(spec: DeploymentSpec, error: float, reference: np.ndarray) -> str:
    """Causes of an error beyond the tolerance, and what to do."""
    if math.isinf(error):
        return (
            "one of them is NaN or Inf where the other is not: in ONNX, attention of a row whose every key is masked "
            "is NaN; let each row keep one key"
        )
    causes = "if the cause is the order of sums, set [parity.fp32] in deploy.toml"
    if reference.dtype.kind != "f":
        causes = (
            "if equal values are ranked, whose order is undefined, sort with stable=True; if some may differ, set "
            "common in [parity.fp32] of deploy.toml"
        )
    return (
        f"if forward's code looks at a size, the graph has only the path of {sizes_text(traced_sizes(spec))}: compute "
        f"without that branch, or narrow [axes]; {causes}"
    )


def checked_at(spec: DeploymentSpec, checks: list[dict[str, Any]]) -> str:
    """Where `check_corners` compared, as text for messages."""
    only = [check["sizes"] for check in checks] == [traced_sizes(spec)]
    return "at its only shape" if only else f"at {len(checks)} other shape{'s' if len(checks) > 1 else ''}"


def error_of(value: np.ndarray, reference: np.ndarray) -> float:
    """Worst error relative to the largest magnitude (floats), or the share of unequal entries.

    NaN and Inf must be at the same places in both; otherwise the error is infinite.
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
    return float(np.abs(value[finite] - reference[finite]).max() / max(np.abs(reference[finite]).max(), 1e-6))


def sizes_text(sizes: dict[str, int]) -> str:
    """Sizes by axis, for messages and tables."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over names, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # a module's extra state
            digest.update(f"{name} {tensor!r}".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
