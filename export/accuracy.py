"""How far outputs are from those of fp32 PyTorch: what parity means, in numbers."""

from __future__ import annotations

import math
import statistics

import numpy as np

from deepseek.spec import DeploymentSpec
from export.artifact import Row


def parity(spec: DeploymentSpec, variant: list[Row], reference: list[Row]) -> dict[str, dict[str, float]]:
    """By output: worst and mean error relative to the largest magnitude, cosine, and top agreement.

    Integer outputs have the share of entries in common (in any order) and of equal first entries.
    A NaN or Inf that PyTorch does not give is an infinite error and a cosine of -1.
    """
    report = {}
    for name, tensor in spec.outputs.items():
        pairs = [(row[name], expected[name]) for row, expected in zip(variant, reference, strict=True)]
        report[name] = _float_parity(pairs) if tensor.dtype.startswith("float") else _integer_parity(pairs)
    return report


def _float_parity(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    scale = max((float(np.abs(ref[np.isfinite(ref)]).max(initial=0.0)) for _, ref in pairs), default=0.0) or 1.0
    worst, total, count = 0.0, 0.0, 0
    cosines: list[float] = []
    tops: list[float] = []
    for value, ref in pairs:
        value, ref = value.astype(np.float64).ravel(), ref.astype(np.float64).ravel()
        finite = np.isfinite(ref)
        if not np.array_equal(finite, np.isfinite(value)) or not np.array_equal(
            value[~finite], ref[~finite], equal_nan=True
        ):
            worst, cosines, tops = math.inf, [*cosines, -1.0], [*tops, 0.0]
            continue
        value, ref = value[finite], ref[finite]
        error = np.abs(value - ref) / scale
        worst, total, count = max(worst, float(error.max(initial=0.0))), total + float(error.sum()), count + error.size
        norms = float(np.linalg.norm(value) * np.linalg.norm(ref))
        cosines.append(float(value @ ref) / norms if norms else float(np.array_equal(value, ref)))
        tops.append(float(value.argmax() == ref.argmax()) if value.size else 1.0)
    return {
        "worst_error": worst,
        "mean_error": total / count if count else math.inf,
        "cosine": statistics.fmean(cosines),
        "worst_cosine": min(cosines),
        "top_agreement": statistics.fmean(tops),
    }


def _integer_parity(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    common = [np.isin(value, ref).mean() if ref.size > 1 else float(np.array_equal(value, ref)) for value, ref in pairs]
    first = [float(np.array_equal(value.ravel()[:1], ref.ravel()[:1])) for value, ref in pairs]
    return {"common": float(np.mean(common)), "top_agreement": float(np.mean(first))}


def similarity(report: dict[str, dict[str, float]]) -> float:
    """One number for parity where there is no task metric: the least similar output."""
    return min(output.get("cosine", output.get("common", 0.0)) for output in report.values())
