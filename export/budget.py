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
from export.artifact import Row, load_rows, pruning_of
from export.runners import module_runner, outputs_of, torch_runner
from export.source import Predict, Source


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """fp32 PyTorch over the evaluation split: what every variant is measured against.

    Where the module is pruned, parity is against the pruned module, the drop against the unpruned one: what
    pruning and precision lose together has to be inside the budget.
    """

    source: Source
    predict: Predict
    rows: list[Row]
    outputs: list[Row]
    unpruned_outputs: list[Row]
    metrics: dict[str, float]
    """Of the unpruned module."""

    @classmethod
    def of(cls, source: Source) -> Baseline:
        """Runs PyTorch over the evaluation rows, and over evaluate() where there is a metric."""
        rows = load_rows(build_dir(source.spec.name) / "evaluation.npz")
        predict = torch_runner(source.spec, source)
        outputs = unpruned_outputs = outputs_of(source.spec, predict, rows)
        unpruned = predict
        if pruning_of(source.spec.name):
            unpruned = module_runner(source.spec, source.unpruned())
            unpruned_outputs = outputs_of(source.spec, unpruned, rows)
        return cls(
            source=source,
            predict=predict,
            rows=rows,
            outputs=outputs,
            unpruned_outputs=unpruned_outputs,
            metrics=task_metrics(source, unpruned),
        )

    def measure(self, predict: Predict) -> dict[str, Any]:
        """The drop, metrics and parity of a variant; a NaN or Inf that PyTorch does not give is an infinite drop."""
        spec = self.source.spec
        outputs = outputs_of(spec, predict, self.rows)
        report = parity(spec, outputs, self.outputs)
        metrics = task_metrics(self.source, predict)
        metric = spec.precision.metric
        if metric is None:
            drop = 1 - similarity(parity(spec, outputs, self.unpruned_outputs))
        else:
            drop = metric_drop(metric, metrics[metric], self.metrics[metric])
        finite = all(math.isfinite(value) for output in report.values() for value in output.values())
        return {"drop": drop if finite and math.isfinite(drop) else math.inf, "metrics": metrics, "parity": report}
