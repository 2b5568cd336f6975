"""The accuracy budget: what a variant loses against fp32 PyTorch, measured on the evaluation split.

Words: drop = (fp32 - variant) / fp32 of the metric, larger being better; without a metric it is
1 - the similarity of the outputs (mean cosine for floats, share of common entries for integers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deepseek.spec import build_dir
from export.accuracy import metric_drop, parity, similarity, task_metrics
from export.artifact import Row, load_rows
from export.runners import outputs_of, torch_runner
from export.source import Predict, Source


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """fp32 PyTorch over the evaluation split: what every variant is measured against."""

    source: Source
    predict: Predict
    rows: list[Row]
    outputs: list[Row]
    metrics: dict[str, float]

    @classmethod
    def of(cls, source: Source) -> Baseline:
        """Runs PyTorch over the evaluation rows, and over evaluate() where there is a metric."""
        rows = load_rows(build_dir(source.spec.name) / "evaluation.npz")
        predict = torch_runner(source.spec, source)
        return cls(
            source=source,
            predict=predict,
            rows=rows,
            outputs=outputs_of(source.spec, predict, rows),
            metrics=task_metrics(source, predict),
        )

    def measure(self, predict: Predict) -> dict[str, Any]:
        """"drop", "metrics" and "parity" of a variant; a NaN or Inf that PyTorch does not give is an infinite drop."""
        spec = self.source.spec
        report = parity(spec, outputs_of(spec, predict, self.rows), self.outputs)
        metrics = task_metrics(self.source, predict)
        metric = spec.precision.metric
        drop = 1 - similarity(report) if metric is None else metric_drop(metric, metrics[metric], self.metrics[metric])
        finite = all(math.isfinite(value) for output in report.values() for value in output.values())
        return {"drop": drop if finite and math.isfinite(drop) else math.inf, "metrics": metrics, "parity": report}
