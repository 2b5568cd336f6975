"""How far outputs are from those of fp32 PyTorch: what parity and the task metric mean, in numbers."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping

import numpy as np
from rich.console import Console

from deepseek.spec import BATCH, DeploymentSpec, InputError
from export.artifact import Row, join
from export.runners import within_batch
from export.source import Predict, Source, check_inputs

Pairs = list[tuple[np.ndarray, np.ndarray]]  # (value, reference) of one output, row by row
DROP_DIGITS = 9  # fp32 sums in another order move a cosine by 1e-13: no loss, even where `max_drop` is 0
# Of the output's largest magnitude: what a row of zeros may be off before it counts as one of others, and how little
# single numbers may vary before they count as constant.
NEGLIGIBLE = 1e-3
# Where rows get the outputs of others: so many times the metric, each of so many times, is worth a note; beyond
# FAR_WORSE times, and farther off than the times are from one another, it is no chance.
LEAST_WORSE, FAR_WORSE = 1.25, 2.0
DEALS = 3
HAND = 32  # outputs that are kept for other rows


def parity(spec: DeploymentSpec, variant: list[Row], reference: list[Row]) -> dict[str, dict[str, float]]:
    """By output: worst and mean error relative to the largest magnitude, cosine, and top agreement.

    Where a row is a single number, the cosine is of all of them as one vector, less the reference's mean.
    Integer and bool outputs have the share of common entries (`common`) and of equal first entries.
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
    numbers = all(value.size == ref.size == 1 for value, ref in pairs)
    for value, ref in [_as_vector(pairs)] if numbers else pairs:
        if not _alike(value, ref):
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
    """Rows of a single number, which has no direction, as one vector."""
    return np.array([value.item() for value, _ in numbers]), np.array([ref.item() for _, ref in numbers])


def _centred(value: np.ndarray, ref: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both less the reference's mean, where it varies: else one that always says the mean would point the same way."""
    if ref.size and ref.std() > NEGLIGIBLE * np.abs(ref).max():
        return value - ref.mean(), ref - ref.mean()
    return value, ref


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
    return {"common": common(pairs), **_by_flag(pairs), "top_agreement": float(np.mean(first))}


def common(pairs: Pairs) -> float:
    """Of integers or flags: the share of the reference's entries that `value` has, too.

    Integers of a row that all differ are a ranking, whose entries count in any order; all else (labels, masks) counts
    place by place. Of flags True and False weigh the same: one that is rare is not outvoted.
    """
    flags = _by_flag(pairs)
    return statistics.fmean(flags.values() if flags else [float(_right(*pair).mean()) for pair in pairs])


def _by_flag(pairs: Pairs) -> dict[str, float]:
    """Of a bool output the share of the True entries of the reference, and of the False, that `value` has, too."""
    if any(ref.dtype.kind != "b" for _, ref in pairs):
        return {}
    right = np.concatenate([_right(*pair).ravel() for pair in pairs])
    flags = np.concatenate([ref.ravel() for _, ref in pairs])
    return {f"common_{flag}".lower(): float(right[flags == flag].mean()) for flag in np.unique(flags)}


def _right(value: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Which of the reference's entries of one row `value` has, too."""
    if value.shape != ref.shape:
        return np.zeros(ref.shape, bool)
    ranking = ref.dtype.kind != "b" and ref.size > 1 and len(np.unique(ref)) == ref.size
    return np.asarray(np.isin(ref, value) if ranking else value == ref)


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


_LARGER = "larger has to be better: where {metric} is an error, let evaluate() return 1 / (1 + {metric}), say"


def metric_drop(metric: str, value: float, reference: float) -> float:
    """Loss of the metric relative to fp32 PyTorch's, without the last digits; InputError where that is not positive."""
    if not reference > 0:
        raise InputError(
            f"precision.metric: {metric} of fp32 PyTorch is {reference:g}; a relative drop needs a positive one, and "
            f"{_LARGER.format(metric=metric)}"
        )
    return round((reference - value) / reference, DROP_DIGITS)


def check_metric(source: Source, predict: Predict, log: Console) -> dict[str, float]:
    """`task_metrics` of fp32 PyTorch; InputError where less of the metric is better, or it is not positive.

    It is an error, not a merit, where it is far larger once rows get the outputs of others; where it is a little
    larger, that is noted, since a merit near chance may be, too.
    """
    metric, metrics = source.spec.precision.metric, task_metrics(source, predict)
    if metric is None or too_small(source.spec, metrics):
        return metrics
    own = metrics[metric]
    metric_drop(metric, own, own)
    dealt: list[float] = []
    for seed in range(DEALS):  # usually one is enough
        try:
            dealt.append(task_metrics(source, _dealt(predict, seed))[metric])
        except InputError:  # evaluate() needs outputs that go with its rows
            return metrics
        if not dealt[-1] > LEAST_WORSE * own:
            return metrics
    least, most = min(dealt), max(dealt)
    said = f"{metric} of fp32 PyTorch is {own:g}, and {least:g} or more where rows get the outputs of others"
    if least > FAR_WORSE * own and least - own > most - least:
        raise InputError(
            f"{source.folder / 'deploy.toml'}: precision.metric: {said}; {_LARGER.format(metric=metric)}; or the model "
            "is no better than chance"
        )
    log.print(f"note: {said}: the model is no better than chance, or less of it is better", soft_wrap=True)
    return metrics


def _dealt(predict: Predict, seed: int) -> Predict:
    """The same function, but each row gets what an earlier one of the same shapes had."""
    random = np.random.default_rng(seed)
    hands: dict[tuple[tuple[int, ...], ...], list[Row]] = {}
    seen: Counter[tuple[tuple[int, ...], ...]] = Counter()

    def swapped(own: Row) -> Row:
        shapes = tuple(array.shape for array in own.values())
        hand = hands.setdefault(shapes, [])
        other = hand[random.integers(len(hand))] if hand else own
        seen[shapes] += 1
        place = random.integers(seen[shapes])  # of all rows so far each is kept as likely
        if len(hand) < HAND:
            hand.append(own)
        elif place < HAND:
            hand[place] = own
        return other

    def dealt(inputs: Row) -> Row:
        outputs = predict(inputs)
        rows = len(next(iter(outputs.values())))
        owns = [{name: array[row : row + 1].copy() for name, array in outputs.items()} for row in range(rows)]
        return join([swapped(own) for own in owns])

    return dealt
