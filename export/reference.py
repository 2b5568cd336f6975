"""The fp32 PyTorch model as the reference that what was made of it is held against.

Contract: outputs are checked against the signature; `check_corners` runs what was made (the ONNX graph, the TorchScript
module) on real inputs at the corners of the profile, none of them where it was traced: a size or a value that was
baked in is found there. Of a profile with one shape it is that one, with other inputs than it was traced with.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from deepseek.spec import BATCH, Axis, DeploymentSpec, GateFailed, InputError, build_dir
from export.artifact import Row, human_bytes, join
from export.runners import module_runner, outputs_by_batch
from export.source import Predict, folder_of, in_order, user_code

# Of the largest magnitude of an output: both sides compute in fp32, a float16 output rounds to 11 bits.
TOLERANCES = {"float32": 1e-3, "float16": 2e-3}
ROW_TOLERANCE = 0.01  # of the largest magnitude: a batch may run other kernels than a row
_WIDENED = "; load()'s 16-bit weights were widened to float32, so cast to the weights' dtype, not to a fixed one"
# How much farther from what float64 gives a result may be than PyTorch's own in fp32: sums run in another order.
AS_NEAR = 4.0
INTEGER_AGREEMENT = 0.99  # equal entries of an integer output: ties may fall either way


def traced_sizes(spec: DeploymentSpec) -> dict[str, int]:
    """Sizes that the graph is traced at: opt, or near it where that is an end and there is room between the ends.

    Never 1, which torch.export would bake in, unless it is the only one.
    """
    return {name: _traced_size(axis) for name, axis in spec.axes.items()}


def _traced_size(axis: Axis) -> int:
    between = range(max(axis.min + 1, 2), axis.max)
    return min(max(axis.opt, between[0]), between[-1]) if between else min(max(axis.opt, 2), axis.max)


def checked_sizes(spec: DeploymentSpec) -> list[dict[str, int]]:
    """Smallest, largest and one between, as far as there are such besides the traced sizes; else those alone.

    Between, no two axes have the same size where there is room for it: else one may be taken for the other.
    """
    traced = traced_sizes(spec)
    between: dict[str, int] = {}
    for name, axis in spec.axes.items():
        middle = (axis.min + axis.max) // 2
        sizes = itertools.chain(range(middle, axis.max + 1), range(middle - 1, axis.min - 1, -1))
        free = (size for size in sizes if size != traced[name] and size not in between.values())
        between[name] = next(free, middle)
    corners = [{name: getattr(axis, end) for name, axis in spec.axes.items()} for end in ("min", "max")]
    found = [sizes for sizes in [*corners, between] if sizes != traced]
    return [sizes for place, sizes in enumerate(found) if sizes not in found[:place]] or [traced]


def _checked_inputs(spec: DeploymentSpec, rows: list[Row]) -> Iterator[tuple[dict[str, int], Row]]:
    """Real inputs at each of the checked sizes; at the traced ones the last rows, since tracing took the first."""
    for sizes in checked_sizes(spec):
        yield sizes, inputs_at(spec, rows[::-1] if sizes == traced_sizes(spec) else rows, sizes)


def inputs_at(spec: DeploymentSpec, rows: list[Row], sizes: dict[str, int]) -> Row:
    """Real inputs brought to `sizes`: rows follow one another along the batch, and within a row that is too short."""
    rows, inputs = _still_valid(spec, rows, sizes), {}
    for name, tensor in spec.inputs.items():
        fitted = []
        for first in range(sizes[BATCH]):
            following = (rows[(first + step) % len(rows)][name] for step in itertools.count())
            fitted.append(_at_sizes(following, tensor.shape, sizes))
        inputs[name] = np.concatenate(fitted)
    return inputs


def _still_valid(spec: DeploymentSpec, rows: list[Row], sizes: dict[str, int]) -> list[Row]:
    """Rows without those whose integers would point past an axis that is cut to `sizes`; all where none is left.

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
    """By axis within a row, an input that has it and at which place."""
    return {
        dim: (name, place)
        for name, tensor in spec.inputs.items()
        for place, dim in enumerate(tensor.shape)
        if isinstance(dim, str) and dim != BATCH
    }


def _at_sizes(arrays: Iterator[np.ndarray], shape: tuple[int | str, ...], sizes: dict[str, int]) -> np.ndarray:
    """The first array at `sizes`. Its last axis goes on with the next arrays, others with its own values again.

    With nothing but its own values an arg-max or top-k would meet equal scores, whose order is anybody's.
    """
    *others, last = [place for place, dim in enumerate(shape) if isinstance(dim, str)]

    def fitted(array: np.ndarray) -> np.ndarray:
        for place in others[1:]:
            array = np.take(array, np.arange(sizes[str(shape[place])]) % array.shape[place], axis=place)
        return array

    array = fitted(next(arrays))
    if last == 0:  # the batch is the only axis
        return array
    size = sizes[str(shape[last])]
    while array.shape[last] < size:
        array = np.concatenate([array, fitted(next(arrays))], axis=last)
    return np.take(array, np.arange(size), axis=last)


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(spec: DeploymentSpec) -> None:
    """Raises InputError where a quarter of this machine's memory does not hold the tensors of the largest corner."""
    needed, memory = _bytes_at_most(spec, [*spec.inputs, *spec.outputs]), memory_bytes()
    if needed > memory / 4:
        raise InputError(
            f"deploy.toml: axes: at {sizes_text({name: axis.max for name, axis in spec.axes.items()})} inputs and "
            f"outputs take {human_bytes(needed)}, this machine has {human_bytes(memory)}; lower the largest sizes"
        )


def check_rows_fit(spec: DeploymentSpec, rows: list[Row]) -> None:
    """Raises InputError where what later stages hold does not fit: outputs of all evaluation rows, and a batch.

    The outputs are PyTorch's and those of a variant, which are compared.
    """
    kept, memory = 2 * sum(_output_bytes(spec, row) for row in rows), memory_bytes()
    batches = 4 * _bytes_at_most(spec, [*spec.inputs, *spec.outputs])
    if kept + batches > memory:
        raise InputError(
            f"model.py: samples('evaluation'): the outputs of {len(rows)} rows, of PyTorch and of a variant, take "
            f"{human_bytes(kept)}, running the largest sizes of deploy.toml {human_bytes(batches)}, this machine has "
            f"{human_bytes(memory)}; let samples give fewer rows, or forward less, or lower the largest sizes"
        )


def _bytes_at_most(spec: DeploymentSpec, names: list[str]) -> int:
    tensors = {**spec.inputs, **spec.outputs}
    return sum(math.prod(spec.shape(name, "max")) * np.dtype(tensors[name].dtype).itemsize for name in names)


def _output_bytes(spec: DeploymentSpec, row: Row) -> int:
    """Of all outputs of a row."""
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
    """Outputs of the PyTorch model by name; raises InputError where forward fails or they are not the signature's."""
    arguments = ", ".join(f"{name}: {inputs[name].dtype} {list(inputs[name].shape)}" for name in spec.inputs)
    what = (
        f"forward({arguments}) on samples brought to these sizes{_WIDENED if getattr(model, 'widened', False) else ''}"
    )
    with _hinted(), user_code(folder_of(spec), what), torch.inference_mode():
        values = in_order(spec, model(*(torch.tensor(inputs[name]) for name in spec.inputs)))  # copies: it may write
        outputs = {name: value.numpy() for name, value in zip(spec.outputs, values, strict=True)}
    for name, tensor in spec.outputs.items():
        sizes = _sizes_of(spec, inputs)
        expected = _sized(tensor.shape, sizes)
        if outputs[name].shape != expected or outputs[name].dtype != tensor.dtype:
            raise InputError(
                f"model.py: output {name!r}: forward returned {outputs[name].dtype} {list(outputs[name].shape)}; "
                f"deploy.toml says {tensor.dtype} {list(tensor.shape)}, here {list(expected)}"
            )
    return outputs


def check_samples(spec: DeploymentSpec, model: torch.nn.Module, rows: dict[str, list[Row]]) -> None:
    """Runs every sample, since a later stage will: InputError names one that forward does not take."""
    predict = module_runner(spec, model)
    for split, found in rows.items():
        try:
            _run(spec, predict, found)
        except InputError:
            for place, row in enumerate(found):
                try:
                    _run(spec, predict, [row])
                except InputError as error:
                    kept = build_dir(spec.name) / f"{split}.npz"
                    raise InputError(f"{error} (row {place} of samples({split!r}) as {kept} has them)") from error
            raise


def _run(spec: DeploymentSpec, predict: Predict, rows: list[Row]) -> None:
    for _ in outputs_by_batch(spec, predict, rows):
        pass


@contextlib.contextmanager
def _hinted() -> Iterator[None]:
    """Says what to do where a sample that was cut still has the length, or positions, of its whole."""
    try:
        yield
    except InputError as error:
        if "out of bounds" not in str(error):
            raise
        raise InputError(
            f"{error}; if the index is an input's value that depends on a size, let samples() give some of these sizes "
            "or smaller, or clamp it in forward"
        ) from error


def run_in_float64(spec: DeploymentSpec, model: torch.nn.Module, inputs: Row) -> Row | None:
    """Outputs without fp32's rounding; None where forward does not run in float64 (it may cast to a fixed type)."""
    tensors = (torch.tensor(inputs[name]) for name in spec.inputs)
    try:
        with torch.inference_mode():
            wide = copy.deepcopy(model).double()
            values = in_order(spec, wide(*(each.double() if each.is_floating_point() else each for each in tensors)))
        return {name: value.numpy() for name, value in zip(spec.outputs, values, strict=True)}
    except Exception:  # whatever a user's forward raises for a type that it was not written for
        return None


def _loses_digits(
    spec: DeploymentSpec, model: torch.nn.Module, rows: list[Row], inputs: Row, name: str, value: np.ndarray
) -> bool:
    """Whether an output's value is about as near to the exact one as PyTorch's in fp32 is, at the worst of the corners.

    So it is where large numbers are subtracted, and sums run in another order. A baked-in size is far from it.
    """
    exact = run_in_float64(spec, model, inputs)
    return exact is not None and error_of(value, exact[name]) <= AS_NEAR * own_errors(spec, model, rows).get(name, 0.0)


def own_errors(spec: DeploymentSpec, model: torch.nn.Module, rows: list[Row]) -> dict[str, float]:
    """By output, `error_of` PyTorch's fp32 against float64 at the worst of the checked sizes.

    Empty where forward does not run in float64.
    """
    worst: dict[str, float] = {}
    for _, inputs in _checked_inputs(spec, rows):
        exact = run_in_float64(spec, model, inputs)
        if exact is not None:
            own = run_torch(spec, model, inputs)
            worst |= {name: max(worst.get(name, 0.0), error_of(own[name], exact[name])) for name in exact}
    return worst


def check_repeatable(spec: DeploymentSpec, model: torch.nn.Module, inputs: Row) -> None:
    """Raises InputError where two calls with the same inputs differ: no graph can do the same."""
    first, second = (run_torch(spec, model, inputs) for _ in range(2))
    for name, value in second.items():
        error = error_of(value, first[name])
        if not error <= tolerance_of(value):
            raise InputError(
                f"model.py: forward called twice with the same inputs gives another output {name!r} (off by "
                f"{error:.3g}): it draws at random or keeps state from call to call; a served graph must do neither"
            )


def check_rows_independent(spec: DeploymentSpec, model: torch.nn.Module, inputs: Row) -> None:
    """Raises InputError where a row's outputs depend on its neighbours, which Triton takes from other callers.

    Float outputs tell; an integer one may differ by a tie.
    """
    together = run_torch(spec, model, inputs)
    rows = len(next(iter(inputs.values())))
    if rows == 1 or spec.axes[BATCH].min > 1:
        return
    alone = join([run_torch(spec, model, row) for row in _one_by_one(inputs)])
    for name, value in alone.items():
        error = error_of(value, together[name])
        if value.dtype.kind == "f" and not error <= ROW_TOLERANCE:
            if _differ_by_rounding(spec, model, inputs, name):
                continue
            raise InputError(
                f"model.py: output {name!r} of a row alone is off by {error:.3g} from the same in a batch of {rows}: "
                "rows influence one another, but Triton batches requests of different callers; compute each row by "
                "itself, or set [axes.batch] to min = opt = max = 1"
            )


def _one_by_one(inputs: Row) -> list[Row]:
    rows = len(next(iter(inputs.values())))
    return [{name: array[at : at + 1] for name, array in inputs.items()} for at in range(rows)]


def _differ_by_rounding(spec: DeploymentSpec, model: torch.nn.Module, inputs: Row, name: str) -> bool:
    """Whether rows alone and in a batch give the same in float64."""
    together = run_in_float64(spec, model, inputs)
    alone = [run_in_float64(spec, model, row) for row in _one_by_one(inputs)]
    if together is None or None in alone:
        return False
    return error_of(join([row for row in alone if row is not None])[name], together[name]) <= ROW_TOLERANCE


def tolerance_of(reference: np.ndarray) -> float:
    """What `error_of` may be at most."""
    return TOLERANCES.get(reference.dtype.name, 1 - INTEGER_AGREEMENT)


def check_corners(
    spec: DeploymentSpec, model: torch.nn.Module, predict: Predict, what: str, rows: list[Row]
) -> list[dict[str, Any]]:
    """Worst error of `predict` by output at each checked shape; raises GateFailed past the tolerance."""
    checks = []
    for sizes, inputs in _checked_inputs(spec, rows):
        expected = run_torch(spec, model, inputs)
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
            if not worst[name] <= tolerance_of(reference):
                if _loses_digits(spec, model, rows, inputs, name, value):
                    continue
                raise GateFailed(
                    f"{what}: output {name!r} at {sizes_text(sizes)} is off by {worst[name]:.3g} relative to PyTorch; "
                    f"allowed {tolerance_of(reference):.2g}"
                    + (" of the entries" if reference.dtype.kind != "f" else "")
                )
        checks.append({"sizes": sizes, "worst_error": worst})
    return checks


def checked_at(spec: DeploymentSpec, checks: list[dict[str, Any]]) -> str:
    """Where `check_corners` looked, for messages."""
    only = [check["sizes"] for check in checks] == [traced_sizes(spec)]
    return "at its only shape" if only else f"at {len(checks)} other shape{'s' if len(checks) > 1 else ''}"


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
