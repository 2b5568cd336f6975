"""How far outputs are from those of fp32 PyTorch: what parity and the task metric mean, in numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import numpy as np

from deepseek.spec import BATCH, DeploymentSpec, InputError
from export.artifact import Row
from export.runners import within_batch
from export.source import Predict, Source, check_inputs

Pairs = list[tuple[np.ndarray, np.ndarray]]  # (value, reference) of one output, row by row
DROP_DIGITS = 9  # fp32 sums in another order move a cosine by 1e-13: no loss, even where `max_drop` is 0
NEGLIGIBLE = 1e-3  # of the output's largest magnitude: what a row of zeros may be off before it counts as one of others


def parity(spec: DeploymentSpec, variant: list[Row], reference: list[Row]) -> dict[str, dict[str, float]]:
    """By output: worst and mean error relative to the largest magnitude, cosine, and top agreement.

    Integer outputs have the share of common entries (`common_share`) and of equal first entries.
    A shape, a NaN or an Inf that PyTorch does not give is an infinite error and a cosine of -1; one that it gives, at
    the same place, is none.
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
    for value, ref in _vectors(pairs):
        if not _alike(value, ref):
            worst, cosines, tops = math.inf, [*cosines, -1.0], [*tops, 0.0]
            continue
        finite = np.isfinite(ref)
        value, ref = value[finite].astype(np.float64), ref[finite].astype(np.float64)
        error = np.abs(value - ref) / scale
        worst, total, count = max(worst, float(error.max(initial=0.0))), total + float(error.sum()), count + error.size
        cosines.append(_cosine(value, ref) if ref.any() else float(error.max(initial=0.0) <= NEGLIGIBLE))
        tops.append(float(value.argmax() == ref.argmax()) if value.size else 1.0)
    return {
        "worst_error": worst,
        "mean_error": total / count if count else worst,
        "cosine": statistics.fmean(cosines),
        "worst_cosine": min(cosines),
        "top_agreement": statistics.fmean(tops) if len(tops) == len(pairs) else 1.0,  # a single number is its own top
    }


def _vectors(pairs: Pairs) -> Pairs:
    """The rows; where each is a single number, which has no direction, all of them as one vector."""
    if all(value.size == ref.size == 1 for value, ref in pairs):
        return [(np.array([value.item() for value, _ in pairs]), np.array([ref.item() for _, ref in pairs]))]
    return pairs


def _alike(value: np.ndarray, ref: np.ndarray) -> bool:
    """Same shape, and NaN and Inf at the same places."""
    special = ~np.isfinite(ref)
    return (
        value.shape == ref.shape
        and np.array_equal(special, ~np.isfinite(value))
        and np.array_equal(value[special], ref[special], equal_nan=True)
    )


def _cosine(value: np.ndarray, ref: np.ndarray) -> float:
    if ref.any() and np.array_equal(value, ref):
        return 1.0  # the quotient is, up to its last digit
    norms = float(np.linalg.norm(value) * np.linalg.norm(ref))
    return float(value @ ref) / norms if norms else 0.0


def _integer_parity(pairs: Pairs) -> dict[str, float]:
    first = [float(np.array_equal(value.ravel()[:1], ref.ravel()[:1])) for value, ref in pairs]
    return {"common": float(np.mean([common_share(*pair) for pair in pairs])), "top_agreement": float(np.mean(first))}


def common_share(value: np.ndarray, ref: np.ndarray) -> float:
    """Of one row of integers or flags: the share of the reference's entries that `value` has, too.

    Integers of the reference that all differ are a ranking, whose entries count in any order; all else (labels,
    masks) counts place by place.
    """
    if value.shape != ref.shape:
        return 0.0
    ranking = ref.dtype.kind != "b" and ref.size > 1 and len(np.unique(ref)) == ref.size
    return float((np.isin(ref, value) if ranking else value == ref).mean())


def similarity(report: dict[str, dict[str, float]]) -> float:
    """One number for parity where there is no task metric: the least similar output."""
    return min(output.get("cosine", output.get("common", 0.0)) for output in report.values())


def task_metrics(source: Source, predict: Predict) -> dict[str, float]:
    """What model.py's evaluate() says of `predict`; empty where deploy.toml names no metric.

    Raises InputError where evaluate() asks for what the signature does not have, or returns no dict of numbers.
    """
    metric = source.spec.precision.metric
    if metric is None or source.evaluate is None:
        return {}
    file, limited = source.folder / "model.py", within_batch(predict, source.spec.axes[BATCH])

    def asked(inputs: Row) -> Row:
        if check_inputs(source.spec, inputs, f"{file}: evaluate(): what it gives predict") == 0:
            raise InputError(f"{file}: evaluate(): gives predict a batch of no rows")
        return limited(inputs)

    returned = source.evaluate(asked)
    try:
        found = {str(name): float(value) for name, value in returned.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"{file}: evaluate() returned {str(returned)[:100]}; a dict of names and numbers is needed, such as "
            f"{{{metric!r}: 0.9}}"
        ) from None
    if metric not in found:
        raise InputError(
            f"{source.folder / 'deploy.toml'}: precision.metric: seen {metric!r}; evaluate() returns {', '.join(found)}"
        )
    return found


def too_small(spec: DeploymentSpec, reference: Mapping[str, float]) -> str:
    """Why the metric cannot tell a drop, for people; "" where it can, or where deploy.toml names none.

    Of 0 nothing can be lost. So it is of a ranking where few rows are evaluated, none of which the model gets right.
    """
    metric = spec.precision.metric
    if metric is None or reference[metric] != 0:
        return ""
    return (
        f"{metric} of fp32 PyTorch is 0: evaluate() has too little data to judge by, or a mistake; the similarity of "
        "the outputs is judged instead"
    )


def metric_drop(metric: str, value: float, reference: float) -> float:
    """Loss of the metric relative to fp32 PyTorch's, without the last digits; InputError where that is not positive."""
    if not reference > 0:
        raise InputError(
            f"precision.metric: {metric} of fp32 PyTorch is {reference:g}; a relative drop needs a positive one"
        )
    return round((reference - value) / reference, DROP_DIGITS)
