"""Measures how far outputs are from those of fp32 PyTorch: parity and the task metric."""

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deepseek.spec import BATCH, DeploymentSpec, InputError
from deepseek.spec.paired_drop import PairedRows
from export.model_folder import ModelFolder, Predict, check_inputs
from export.rows import Row, join
from export.runtimes.batching import within_batch

Pairs = list[tuple[np.ndarray, np.ndarray]]  # (value, reference) of one output, row by row
DROP_DIGITS = 9  # summing fp32 in another order moves a cosine by 1e-13: no loss, even if `max_drop` is 0
# Relative to the output's largest magnitude: up to this error a row of zeros counts as equal, and up to this variation
# single numbers count as constant.
NEGLIGIBLE = 1e-3
# A metric that grows by more than this factor in each trial if rows get the outputs of other rows, and by more than the
# trials differ from one another: that is not chance. The RMSE of a regression with an R² of 0.5 grows 1.7 times.
WORSE = 1.2
REPEATS = 1e-4  # by how much a metric may differ from call to call, relative to its value
DISTANCES = (5, 17, 31, 43, 59)  # by how many rows outputs are shifted, one trial each


def parity(spec: DeploymentSpec, variant: list[Row], reference: list[Row]) -> dict[str, dict[str, float]]:
    """By output: worst and mean error relative to the largest magnitude, cosine, and top agreement.

    If every row is a single number, the cosine is over all rows as one vector, minus the reference's mean.
    Integer and bool outputs have the share of common entries (`common`) and of equal first entries.
    A shape, NaN or Inf that PyTorch does not give is an infinite error and a cosine of -1; a NaN or Inf that PyTorch
    gives at the same place is no error.
    """
    report = {}
    for name, tensor in spec.outputs.items():
        rows = zip(variant, reference, strict=True)
        pairs = [(np.asarray(row[name]), np.asarray(expected[name])) for row, expected in rows]
        report[name] = _float_parity(pairs) if tensor.dtype.startswith("float") else _integer_parity(pairs)
    return report


def _float_parity(pairs: Pairs) -> dict[str, float]:
    scale = max((float(np.abs(ref[np.isfinite(ref)]).max(initial=0.0)) for _, ref in pairs), default=0.0) or 1.0
    worst, total, count = 0.0, 0.0, 0
    cosines: list[float] = []
    tops: list[float] = []
    numbers = all(value.size == ref.size == 1 for value, ref in pairs)
    for value, ref in [_as_vector(pairs)] if numbers else pairs:
        if not alike(value, ref):
            worst, cosines, tops = math.inf, [*cosines, -1.0], [*tops, 0.0]
            continue
        finite = np.isfinite(ref)
        value, ref = value[finite].astype(np.float64), ref[finite].astype(np.float64)
        error = np.abs(value - ref) / scale
        worst, total, count = max(worst, float(error.max(initial=0.0))), total + float(error.sum()), count + error.size
        if numbers:
            value, ref = _centred(value, ref)
        cosines.append(_cosine(value, ref) if ref.any() else float(error.max(initial=0.0) <= NEGLIGIBLE))
        tops.append(float(value.argmax() == ref.argmax()) if value.size else 1.0)
    return {
        "worst_error": worst,
        "mean_error": total / count if count else worst,
        "cosine": statistics.fmean(cosines),
        "worst_cosine": min(cosines),
        "top_agreement": statistics.fmean(tops) if len(tops) == len(pairs) else 1.0,  # a single number is its own top
    }


def _as_vector(numbers: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a single number as one vector: a single number has no direction."""
    return np.array([value.item() for value, _ in numbers]), np.array([ref.item() for _, ref in numbers])


def _centred(value: np.ndarray, ref: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both minus the reference's mean, if it varies: otherwise a constant answer would have a high cosine."""
    if ref.size and ref.std() > NEGLIGIBLE * np.abs(ref).max():
        return value - ref.mean(), ref - ref.mean()
    return value, ref


def alike(value: np.ndarray, ref: np.ndarray) -> bool:
    """Same shape, and NaN and Inf at the same places."""
    special = ~np.isfinite(ref)
    return (
        value.shape == ref.shape
        and np.array_equal(special, ~np.isfinite(value))
        and np.array_equal(value[special], ref[special], equal_nan=True)
    )


def _cosine(value: np.ndarray, ref: np.ndarray) -> float:
    if ref.any() and np.array_equal(value, ref):
        return 1.0  # the quotient may be off in the last digit
    norms = float(np.linalg.norm(value) * np.linalg.norm(ref))
    return float(value @ ref) / norms if norms else 0.0


def _integer_parity(pairs: Pairs) -> dict[str, float]:
    first = [float(np.array_equal(value.ravel()[:1], ref.ravel()[:1])) for value, ref in pairs]
    return {"common": common(pairs), **_by_flag(pairs), "top_agreement": float(np.mean(first))}


def common(pairs: Pairs) -> float:
    """For integers or flags: the share of the reference's entries that `value` also has.

    Distinct integers in a row are a ranking, whose entries count in any order; anything else (labels, masks) is
    compared position by position. True and False flags weigh the same, so that a rare flag is not outvoted.
    """
    flags = _by_flag(pairs)
    return statistics.fmean(flags.values() if flags else [float(_right(*pair).mean()) for pair in pairs])


def _by_flag(pairs: Pairs) -> dict[str, float]:
    """For a bool output: the share of the reference's True entries, and of its False ones, that `value` also has."""
    if any(ref.dtype.kind != "b" for _, ref in pairs):
        return {}
    right = np.concatenate([_right(*pair).ravel() for pair in pairs])
    flags = np.concatenate([ref.ravel() for _, ref in pairs])
    return {f"common_{flag}".lower(): float(right[flags == flag].mean()) for flag in np.unique(flags)}


def _right(value: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Mask of the reference's entries in one row that `value` also has."""
    if value.shape != ref.shape:
        return np.zeros(ref.shape, bool)
    ranking = ref.dtype.kind != "b" and ref.size > 1 and len(np.unique(ref)) == ref.size
    return np.asarray(np.isin(ref, value) if ranking else value == ref)


def similarity(report: dict[str, dict[str, float]]) -> float:
    """One number for parity without a task metric: the similarity of the least similar output."""
    return min(output.get("cosine", output.get("common", 0.0)) for output in report.values())


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What evaluate() returned for one predictor."""

    metrics: dict[str, float]
    """Each metric as one number; the mean of its rows, if it came row by row."""
    values: list[float] | None = None
    """The budget's metric row by row, NaN for a row without a value; None if evaluate() gave one number."""


def evaluated(source: ModelFolder, predict: Predict) -> Evaluated:
    """What model.py's evaluate() returns for `predict`; empty if deploy.toml names no metric.

    Raises InputError if evaluate() calls `predict` with inputs outside the signature, does not return a dict of
    numbers or of rows of numbers, or does not return the metric.
    """
    metric = source.spec.precision.metric
    if metric is None:
        return Evaluated(metrics={})
    if source.evaluate is None:
        raise InputError(
            f"{source.folder / 'deploy.toml'}: precision.metric: seen {metric!r}, but model.py has no "
            "evaluate(predict); write one or remove the key (outputs are then compared)"
        )
    file, limited = source.folder / "model.py", within_batch(predict, source.spec.axes[BATCH])

    def asked(inputs: Row) -> Row:
        if check_inputs(source.spec, inputs, f"{file}: evaluate(): argument of predict") == 0:
            raise InputError(f"{file}: evaluate(): calls predict with an empty batch")
        return limited(inputs)

    returned = source.evaluate(asked)
    try:
        arrays = {str(name): np.asarray(value, np.float64) for name, value in returned.items()}
    except (AttributeError, RuntimeError, TypeError, ValueError):  # RuntimeError: a tensor with a gradient
        seen = " ".join(str(returned).split())[:100]
        raise InputError(
            f"{file}: evaluate() returned {seen}; a dict of names and numbers is needed, such as "
            f"{{{metric!r}: 0.9}}, or of names and arrays with one number a row"
        ) from None
    for name, array in arrays.items():
        if array.ndim > 1 or (array.ndim == 1 and np.isnan(array).all()):
            seen = f"shape {list(array.shape)}" if array.ndim > 1 else f"none of {array.size} rows has a value"
            raise InputError(
                f"{file}: evaluate(): {name!r}: {seen}; a number is needed, or an array with one number a row (NaN for "
                "a row without a value)"
            )
    if metric not in arrays:
        raise InputError(
            f"{source.folder / 'deploy.toml'}: precision.metric: seen {metric!r}; evaluate() returns "
            f"{', '.join(arrays) or 'none'}"
        )
    return Evaluated(
        metrics={name: float(np.nanmean(array) if array.ndim else array) for name, array in arrays.items()},
        values=arrays[metric].tolist() if arrays[metric].ndim else None,
    )


def too_small(spec: DeploymentSpec, reference: Mapping[str, float]) -> str:
    """Why the metric cannot show a drop, for users; "" if it can, or if deploy.toml names none.

    A metric of 0 cannot drop. This happens if few rows are evaluated and the model gets none of them right.
    """
    metric = spec.precision.metric
    if metric is None or reference[metric] != 0:
        return ""
    return (
        f"{metric} of fp32 PyTorch is 0: evaluate() has too little data to judge by, or a mistake; the similarity of "
        "the outputs is judged instead"
    )


_LARGER = "larger must be better: if {metric} is an error, let evaluate() return for example 1 / (1 + {metric})"


def metric_drop(metric: str, value: float, reference: float) -> float:
    """Loss of the metric relative to fp32 PyTorch's, rounded; raises InputError if that is not positive and finite."""
    if not 0 < reference < math.inf:
        raise InputError(
            f"precision.metric: {metric} of fp32 PyTorch is {reference:g}; a relative drop needs a positive number"
            + (f", and {_LARGER.format(metric=metric)}" if reference <= 0 else "")
        )
    return round((reference - value) / reference, DROP_DIGITS)


def paired_drop(
    source: ModelFolder, found: Evaluated, baseline: Evaluated, *, share: float = 1.0
) -> tuple[float, PairedRows | None]:
    """The drop of the budget's metric, and what its rows say about it; None without rows.

    `share`: as in `PairedRows.of`. The drop is infinite if a row has a value in the baseline and none in `found`.
    Raises InputError if the rows cannot be paired, or if `metric_drop` does.
    """
    metric = str(source.spec.precision.metric)
    if found.values is None and baseline.values is None:
        return metric_drop(metric, found.metrics[metric], baseline.metrics[metric]), None
    own, base = (np.array(math.nan if each.values is None else each.values) for each in (found, baseline))
    valued = ~np.isnan(base)
    if own.shape != base.shape or not np.isnan(own[~valued]).all():
        seen = [_rows_text(each) for each in (found, baseline)]
        raise InputError(
            f"{source.folder / 'model.py'}: evaluate(): {metric!r}: {seen[0]} for one predict, {seen[1]} for fp32 "
            "PyTorch; which rows have a value must not depend on predict: give a row that fails its worst value"
        )
    if not np.isfinite(own[valued]).all() or not np.isfinite(base[valued]).all():
        return math.inf, None
    drop = metric_drop(metric, float(own[valued].mean()), float(base[valued].mean()))
    return drop, PairedRows.of(base[valued].tolist(), own[valued].tolist(), share=share)


def _rows_text(each: Evaluated) -> str:
    if each.values is None:
        return "one number"
    return f"{len(each.values)} rows, {int(np.isnan(each.values).sum())} of them without a value"


def check_metric(source: ModelFolder, predict: Predict) -> Evaluated:
    """`evaluated` of fp32 PyTorch; raises InputError if the metric is not positive, differs from call to call or does
    not depend on `predict`, or if smaller seems better.
    """
    metric, calls = source.spec.precision.metric, 0
    if metric is None:
        return Evaluated(metrics={})

    def counted(inputs: Row) -> Row:
        nonlocal calls
        calls += 1
        return predict(inputs)

    found = evaluated(source, counted)
    if not calls:
        raise InputError(
            f"{source.folder / 'model.py'}: evaluate() never calls predict, so {metric!r} is not of the served model; "
            "compute it from predict(inputs)"
        )
    _check_repeats(source, predict, metric, found)
    if not too_small(source.spec, found.metrics):
        metric_drop(metric, found.metrics[metric], found.metrics[metric])  # refuses a negative one
        _check_larger_is_better(source, predict, metric, found.metrics[metric])
    return found


def _check_repeats(source: ModelFolder, predict: Predict, metric: str, found: Evaluated) -> None:
    """Raises InputError if a second call of evaluate() gives other values."""
    again = evaluated(source, predict)
    one, other = (np.array(each.values or each.metrics[metric]) for each in (found, again))
    if one.shape != other.shape or not np.allclose(one, other, rtol=REPEATS, equal_nan=True):
        raise InputError(
            f"{source.folder / 'model.py'}: evaluate() called twice with the same predict gives another {metric!r} "
            f"({found.metrics[metric]:g} and {again.metrics[metric]:g}): it draws at random; seed it, or candidates "
            "win or lose by chance"
        )


def _check_larger_is_better(source: ModelFolder, predict: Predict, metric: str, own: float) -> None:
    """Raises InputError if rows that get other rows' outputs have a metric clearly above `own`."""
    dealt: list[float] = []
    for distance in DISTANCES:  # the first is usually enough
        try:
            dealt.append(evaluated(source, _dealt(predict, distance)).metrics[metric])
        except InputError:  # evaluate() needs outputs that match its rows
            return
        if not dealt[-1] > WORSE * own:
            return
    least, most = min(dealt), max(dealt)
    if least - own > most - least:
        raise InputError(
            f"{source.folder / 'deploy.toml'}: precision.metric: {metric} of fp32 PyTorch is {own:g}, and {least:g} or "
            f"more if rows get the outputs of other rows; {_LARGER.format(metric=metric)}; or the model is no better "
            "than chance"
        )


def _dealt(predict: Predict, distance: int) -> Predict:
    """The same function, but each row gets the outputs of a row of the same shapes, `distance` rows earlier."""
    earlier: defaultdict[tuple[tuple[int, ...], ...], deque[Row]] = defaultdict(lambda: deque(maxlen=distance + 1))

    def dealt(inputs: Row) -> Row:
        outputs, given = predict(inputs), []
        for row in range(len(next(iter(outputs.values())))):
            own = {name: array[row : row + 1].copy() for name, array in outputs.items()}
            hand = earlier[tuple(array.shape for array in own.values())]
            hand.append(own)
            given.append(hand[0])
        return join(given)

    return dealt
