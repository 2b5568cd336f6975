"""The accuracy budget: how much accuracy a variant loses against fp32 PyTorch on the evaluation split.

Definition: drop = (fp32 - variant) / fp32 of the metric, where larger is better. Without a metric, or if fp32 PyTorch
scores 0, drop = 1 - similarity of the outputs. Similarity is, for floats, the mean cosine of the rows (for one number
per row, the cosine over all rows minus fp32's mean); for integers, the share of common entries; for flags, the mean of
that share over True and over False.

If evaluate() returns the metric row by row, the drop has an interval (`deepseek.spec.paired_drop`), and `judged`
decides by it; else by the number alone. If the sensitivity pass chose layers by the drop, it did so on one half of the
rows, and the other half judges.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek.precisions import EIGHT_BITS
from deepseek.spec import DeploymentSpec, GateFailed, InputError, Precision, build_dir
from deepseek.spec.files.folders import scratch_in
from deepseek.spec.paired_drop import DropJudgement, PairedRows, judge_drop, values_text
from export.artifact import onnx_path, pruning_of, read_manifest
from export.cache import fill, refined, stage_key
from export.model_folder import ModelFolder, Predict
from export.precision.accuracy import (
    Evaluated,
    evaluated,
    metric_drop,
    paired_drop,
    parity,
    similarity,
    too_small,
)
from export.rows import Row, load_rows
from export.runtimes.batching import outputs_of
from export.runtimes.pytorch_reference import module_predictor


class EvaluateFailed(GateFailed):
    """evaluate() fails at a variant's outputs, which it did not with PyTorch's."""


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
    evaluated: Evaluated
    """Metrics of the unpruned module."""

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluated.metrics

    @classmethod
    def of(cls, source: ModelFolder, predict: Predict | None = None) -> "Baseline":
        """Runs PyTorch (or `predict`) over the evaluation rows, and over evaluate() if there is a metric."""
        rows = load_rows(build_dir(source.spec.name) / "evaluation.npz")
        predict = predict or module_predictor(source.spec, source.load())
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
            evaluated=evaluated(source, unpruned),
        )

    def measure(self, predict: Predict) -> dict[str, Any]:
        """A variant's drop, metrics and parity, ready for JSON; `rows` says how many rows each number is of.

        A NaN or Inf that PyTorch does not give is an infinite drop. `rows` has None for a metric of one number.
        """
        outputs = outputs_of(self.source.spec, predict, self.rows)
        report = parity(self.source.spec, outputs, self.outputs)
        found = self._evaluated(predict)
        if self.by_similarity:
            same = parity(self.source.spec, outputs, self.unpruned_outputs)
            drop, paired = metric_drop("similarity", similarity(same), 1.0), None
        else:
            drop, paired = paired_drop(self.source, found, self.evaluated)
        if not _finite(report) or not math.isfinite(drop):
            drop, paired = math.inf, None
        rows = {
            "drop": len(self.rows) if self.by_similarity else None if paired is None else paired.rows,
            "metric": None if found.values is None else int(np.isfinite(found.values).sum()),
            "parity": len(self.rows),
        }
        return {
            "drop": drop,
            "paired": None if paired is None else dataclasses.asdict(paired),
            "rows": rows,
            "metrics": found.metrics,
            "values": None if found.values is None else values_text(found.values),
            "parity": report,
        }

    def _evaluated(self, predict: Predict) -> Evaluated:
        """A variant's metrics; raises EvaluateFailed."""
        try:
            return evaluated(self.source, predict)
        except InputError as error:
            raise EvaluateFailed(str(error)) from error

    @property
    def by_similarity(self) -> bool:
        """Whether the outputs are judged, not the task metric."""
        spec = self.source.spec
        return spec.precision.metric is None or bool(too_small(spec, self.metrics))

    def drop_on_half(self, predict: Predict, *, choosing: bool) -> tuple[float, PairedRows | None]:
        """The drop on one half of the rows: `choosing` is the half on which layers are chosen, the other one judges.

        evaluate() cannot be given a half: it runs over all rows, PyTorch answers those of the other half, and the
        losses are divided by the share of rows that the variant answered.
        """
        places = [place for place, row in enumerate(self.rows) if _chooses(row) == choosing]
        if not 0 < len(places) < len(self.rows):
            raise _too_few_rows()
        outputs = outputs_of(self.source.spec, predict, [self.rows[place] for place in places])
        if not _finite(parity(self.source.spec, outputs, [self.outputs[place] for place in places])):
            return math.inf, None
        if self.by_similarity:
            unpruned = [self.unpruned_outputs[place] for place in places]
            return metric_drop("similarity", similarity(parity(self.source.spec, outputs, unpruned)), 1.0), None
        mixed = _Mixed(predict, self.predict, choosing)
        try:
            found = self._evaluated(mixed)
        except EvaluateFailed:
            return math.inf, None
        if not 0 < mixed.share < 1:
            raise _too_few_rows()
        pruned = evaluated(self.source, self.predict) if pruning_of(self.source.spec.name) else self.evaluated
        drop, paired = paired_drop(
            self.source, _rescaled(found, pruned, mixed.share), self.evaluated, share=mixed.share
        )
        return (drop, paired) if math.isfinite(drop) else (math.inf, None)

    def judge(self, predict: Predict) -> DropJudgement:
        """The judgement of a variant over all rows; its drop is infinite if evaluate() fails at its outputs."""
        try:
            return judged_variant(self.source.spec, self.measure(predict))
        except EvaluateFailed:
            return judged(self.source.spec, math.inf, None)

    def half_sizes(self) -> dict[str, int]:
        """Evaluation rows on which layers are chosen, and on which the choice is judged."""
        chosen_on = sum(map(_chooses, self.rows))
        return {"chosen_on": chosen_on, "judged_on": len(self.rows) - chosen_on}


def judged(spec: DeploymentSpec, drop: float, paired: PairedRows | None) -> DropJudgement:
    """The judgement of a drop against deploy.toml's budget."""
    budget = spec.precision
    return judge_drop(drop, paired, max_drop=budget.max_drop, candidates=len(budget.candidates))


def judged_variant(spec: DeploymentSpec, measured: Mapping[str, Any]) -> DropJudgement:
    """The judgement of a drop and its rows as `Baseline.measure` returns them."""
    return judged(spec, measured["drop"], PairedRows(**measured["paired"]) if measured["paired"] else None)


def sensitivity_of(spec: DeploymentSpec, name: Precision) -> dict[str, Any] | None:
    """The sensitivity report and the precision of the layers kept high; None if there was no sensitivity pass.

    If it has "judged", layers were chosen on one half of the rows, and only the other half may judge the drop.
    """
    path = onnx_path(spec.name, name)
    report = path.with_name("sensitivity.json")
    if name not in EIGHT_BITS or not report.is_file():
        return None
    return {**json.loads(report.read_text()), "high": read_manifest(path).settings["high_precision"]}


def _rescaled(mixed: Evaluated, reference: Evaluated, share: float) -> Evaluated:
    """Metrics with the losses against `reference` divided by the share of rows in which there may be one."""

    def scaled(value: float, base: float) -> float:
        return base - (base - value) / share

    values = mixed.values
    if values is not None and reference.values is not None and len(values) == len(reference.values):
        values = list(map(scaled, values, reference.values))
    metrics = {name: scaled(value, reference.metrics[name]) for name, value in mixed.metrics.items()}
    return Evaluated(metrics=metrics, values=values)


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
    told = source.data_digest()
    return None if told is None else refined(stage_key(f"accuracy {precision}"), weights=weights, fingerprint=told)


def measured(key: str | None, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `measure`, from the cache if it was measured under this key before."""
    with scratch_in(build_dir(name)) as scratch:
        fill(scratch, key, lambda folder: (folder / "accuracy.json").write_text(json.dumps(measure())))
        found: dict[str, Any] = json.loads((scratch / "accuracy.json").read_text())
    return found
