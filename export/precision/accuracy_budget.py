"""The accuracy budget: how much accuracy a variant loses against fp32 PyTorch on the evaluation split.

Definition: drop = (fp32 - variant) / fp32 of the metric, where larger is better. Without a metric, or if fp32 PyTorch
scores 0, drop = 1 - similarity of the outputs. Similarity is, for floats, the mean cosine of the rows (for one number
per row, the cosine over all rows minus fp32's mean); for integers, the share of common entries; for flags, the mean of
that share over True and over False.

If the sensitivity pass chose layers by the drop, it did so on one half of the rows, and the other half judges.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek.spec import GateFailed, Precision, build_dir
from deepseek.spec.files.folders import scratch_in
from export.artifact import pruning_of
from export.cache import fill, refined, stage_key
from export.model_folder import ModelFolder, Predict
from export.precision.accuracy import metric_drop, parity, similarity, task_metrics, too_small
from export.rows import Row, load_rows
from export.runtimes.batching import outputs_of
from export.runtimes.pytorch_predictor import module_predictor, torch_predictor


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """fp32 PyTorch over the evaluation split: the reference for every variant.

    For a pruned module, parity is against the pruned module and the drop against the unpruned one: pruning and
    precision together have to stay inside the budget.
    """

    source: ModelFolder
    predict: Predict
    rows: list[Row]
    outputs: list[Row]
    unpruned_outputs: list[Row]
    metrics: dict[str, float]
    """Metrics of the unpruned module."""

    @classmethod
    def of(cls, source: ModelFolder, predict: Predict | None = None) -> Baseline:
        """Runs PyTorch (or `predict`) over the evaluation rows, and over evaluate() if there is a metric."""
        rows = load_rows(build_dir(source.spec.name) / "evaluation.npz")
        predict = predict or torch_predictor(source.spec, source)
        outputs = unpruned_outputs = outputs_of(source.spec, predict, rows)
        unpruned = predict
        if pruning_of(source.spec.name):
            unpruned = module_predictor(source.spec, source.unpruned())
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
        return {
            "drop": drop if _finite(report) and math.isfinite(drop) else math.inf,
            "metrics": metrics,
            "parity": report,
        }

    def drop_on_half(self, predict: Predict, *, choosing: bool) -> float:
        """The drop on one half of the rows: `choosing` is the half on which layers are chosen, the other one judges.

        evaluate() cannot be given a half: it runs over all rows, PyTorch answers those of the other half, and the drop
        is divided by the share of rows that the variant answered.
        """
        places = [place for place, row in enumerate(self.rows) if _chooses(row) == choosing]
        part = dataclasses.replace(
            self,
            rows=[self.rows[place] for place in places],
            outputs=[self.outputs[place] for place in places],
            unpruned_outputs=[self.unpruned_outputs[place] for place in places],
        )
        if not 0 < len(places) < len(self.rows):
            raise _too_few_rows()
        metric = self.source.spec.precision.metric
        if metric is None or too_small(self.source.spec, self.metrics):
            return float(part.measure(predict)["drop"])
        mixed = _Mixed(predict, self.predict, choosing)
        drop = metric_drop(metric, task_metrics(self.source, mixed)[metric], self.metrics[metric])
        if not _finite(parity(self.source.spec, outputs_of(self.source.spec, predict, part.rows), part.outputs)):
            return math.inf
        own = 0.0  # the drop of pruning alone
        if pruning_of(self.source.spec.name):
            own = metric_drop(metric, task_metrics(self.source, self.predict)[metric], self.metrics[metric])
        if not 0 < mixed.share < 1:
            raise _too_few_rows()
        found = own + (drop - own) / mixed.share
        return found if math.isfinite(found) else math.inf

    def half_sizes(self) -> dict[str, int]:
        """Evaluation rows on which layers are chosen, and on which the choice is judged."""
        chosen_on = sum(map(_chooses, self.rows))
        return {"chosen_on": chosen_on, "judged_on": len(self.rows) - chosen_on}


def _finite(report: dict[str, dict[str, float]]) -> bool:
    return all(math.isfinite(value) for output in report.values() for value in output.values())


def _too_few_rows() -> GateFailed:
    """Layers must not be chosen on the rows that judge them."""
    return GateFailed(
        "too few different evaluation rows to choose layers on one half and judge them on the other: give more in "
        "samples('evaluation'), or set precision.keep_high in deploy.toml"
    )


def _chooses(row: Row) -> bool:
    """Whether layers are chosen on a row; by its content, so that equal rows are in one half."""
    return zlib.crc32(b"".join(np.ascontiguousarray(array).tobytes() for array in row.values())) % 2 == 0


class _Mixed:
    """A predictor whose rows of one half the variant answers, the others PyTorch."""

    def __init__(self, variant: Predict, reference: Predict, choosing: bool) -> None:
        self._variant, self._reference, self._choosing = variant, reference, choosing
        self._rows = self._answered = 0

    def __call__(self, inputs: Row) -> Row:
        rows = range(len(next(iter(inputs.values()))))
        own = np.array([_chooses({name: each[row] for name, each in inputs.items()}) == self._choosing for row in rows])
        self._rows, self._answered = self._rows + own.size, self._answered + int(own.sum())
        outputs, others = self._variant(inputs), self._reference(inputs)
        return {
            name: np.where(own.reshape(-1, *[1] * (array.ndim - 1)), array, others[name])
            for name, array in outputs.items()
        }

    @property
    def share(self) -> float:
        """Share of the rows that the variant answered."""
        return self._answered / max(1, self._rows)


def accuracy_key(source: ModelFolder, precision: Precision, weights: str) -> str | None:
    """The cache key of a variant's accuracy; None if no fingerprint covers the data that evaluate() reads.

    `weights` is the digest of the reference module.
    """
    if source.spec.precision.metric is not None and source.fingerprint() is None:
        return None
    return refined(stage_key(f"accuracy {precision}"), weights=weights)


def measured(key: str | None, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `measure`, from the cache if it was measured under this key before."""
    with scratch_in(build_dir(name)) as scratch:
        fill(scratch, key, lambda folder: (folder / "accuracy.json").write_text(json.dumps(measure())))
        found: dict[str, Any] = json.loads((scratch / "accuracy.json").read_text())
    return found
