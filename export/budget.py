"""The accuracy budget: what a variant loses against fp32 PyTorch, measured on the evaluation split.

Words: drop = (fp32 - variant) / fp32 of the metric, larger being better; without a metric it is
1 - the similarity of the outputs: of floats the mean cosine of the rows (of one number a row: that of all rows, less
fp32's mean); of integers the share of common entries; of flags that share over True and over False, averaged. So it is
where fp32 PyTorch has 0 of the metric, of which nothing can be lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.spec import Target, build_dir
from deepseek.spec.folders import scratch_in
from export.accuracy import metric_drop, parity, similarity, task_metrics, too_small
from export.artifact import Row, load_rows, pruning_of, sha256
from export.cache import alone_with, cpu, fetch, key_of, store
from export.runners import gpu_name, module_runner, outputs_of, torch_runner
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
    def of(cls, source: Source, predict: Predict | None = None) -> Baseline:
        """Runs PyTorch (`predict`, if given) over the evaluation rows, and over evaluate() where there is a metric."""
        rows = load_rows(build_dir(source.spec.name) / "evaluation.npz")
        predict = predict or torch_runner(source.spec, source)
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
        if metric is None or too_small(spec, self.metrics):
            drop = metric_drop("similarity", similarity(parity(spec, outputs, self.unpruned_outputs)), 1.0)
        else:
            drop = metric_drop(metric, metrics[metric], self.metrics[metric])
        finite = all(math.isfinite(value) for output in report.values() for value in output.values())
        return {"drop": drop if finite and math.isfinite(drop) else math.inf, "metrics": metrics, "parity": report}


def accuracy_key(source: Source, weights: str, variant: Path, target: Target) -> str | None:
    """The cache's key of what `measure` says of a variant; not of its speed, which is this machine's at this hour.

    Take it before anything runs: what functions import on the way would change it. `weights` is the digest of the
    module that is the reference. None where nobody knows what evaluate() reads: then it is asked each time.
    """
    spec, reads = source.spec, source.reads()
    if spec.precision.metric is not None and reads["fingerprint"] is None:
        return None
    return key_of(
        "accuracy",
        variant={file.name: sha256(file) for file in sorted(variant.parent.glob(f"{variant.name}*"))},
        evaluation=sha256(build_dir(spec.name) / "evaluation.npz"),
        reference=[weights, pruning_of(spec.name)],
        reads=reads,
        spec=spec.model_dump(mode="json", include={"inputs", "outputs", "axes", "onnxruntime"}),
        metric=spec.precision.metric,
        device=[target, cpu(), gpu_name()],
    )


def measured(key: str | None, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, out of the cache where it has been measured under this key."""
    if key is None:
        return measure()
    with scratch_in(build_dir(name)) as scratch, alone_with(key):
        if not fetch(key, scratch):
            (scratch / "accuracy.json").write_text(json.dumps(measure()))
            store(key, scratch)
        found: dict[str, Any] = json.loads((scratch / "accuracy.json").read_text())
    return found
