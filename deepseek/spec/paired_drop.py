"""Judges whether a candidate's metric stays inside the accuracy budget, from paired rows. One rule for every command.

The relative drop is mean(baseline - candidate) / mean(baseline) over the same rows. Its interval is Fieller's ("Some
Problems in Interval Estimation", 1954): a drop m is inside if Student's t of the rows' (baseline - candidate) - m *
baseline does not reject it. Rare losses are the trap: if no row of 100 changed, 3 % of all rows may still lose
everything. So t * t / 2 rows are added that lose (for the lower bound: gain) a whole row's value, as Agresti and Coull
add them to a share ("Approximate Is Better than Exact", 1998).

Each bound is one-sided. Its confidence is 95 % over all candidates of `deploy.toml` together (Bonferroni). The number
of candidates comes from `deploy.toml`, so that build, parity and release judge alike. `tests/test_paired_drop.py`
measures how often a candidate beyond the budget is called inside.

Example:
    paired = PairedRows.of([1, 0, 1, 1], [1, 0, 1, 0])
    judge_drop(1 / 3, paired, max_drop=0.01, candidates=2).verdict     # "undecided"
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Literal

Verdict = Literal["inside", "outside", "not distinguishable from no loss", "undecided"]
CONFIDENCE = 0.95
LEAST_ROWS = 10  # with fewer, the interval is unbounded
_MOST_MORE = 10_000  # times the rows: beyond, the drop is too close to the budget to be decided
_DIGITS = 9  # of drops: less is rounding, also at the budget


@dataclass(frozen=True, kw_only=True)
class PairedRows:
    """Moments of two metrics over the same rows, and the largest loss of a row."""

    rows: int
    baseline: float
    loss: float
    """Mean of baseline - candidate."""
    baseline_variance: float
    loss_variance: float
    covariance: float
    highest: float
    """The largest value of the baseline."""
    most_loss: float
    """Most that a row of the highest value can lose: all of it, or more if the lowest value is negative."""

    @property
    def drop(self) -> float:
        """The drop relative to the baseline; 0 if that is not positive."""
        return round(self.loss / self.baseline, _DIGITS) if self.baseline > 0 else 0.0

    @classmethod
    def of(cls, baseline: Sequence[float], candidate: Sequence[float], *, share: float = 1.0) -> "PairedRows":
        """The moments of two metrics over the same rows, all finite, at least one row.

        `share`: the candidate answered only this share of the rows, the baseline the rest, and the losses in
        `candidate` are already divided by it. `rows` and the variances are those of that share.
        """
        losses = [first - second for first, second in zip(baseline, candidate, strict=True)]
        mean, loss = fmean(baseline), fmean(losses)
        return cls(
            rows=max(1, round(len(losses) * share)),
            baseline=mean,
            loss=loss,
            baseline_variance=share * fmean((value - mean) ** 2 for value in baseline),
            loss_variance=share * fmean((value - loss) ** 2 for value in losses),
            covariance=share * fmean((a - mean) * (b - loss) for a, b in zip(baseline, losses, strict=True)),
            highest=max(baseline),
            most_loss=max(baseline) - min(0.0, *baseline),
        )


def values_text(values: Sequence[float]) -> str:
    """A metric row by row as one line, "nan" for a row without a value: a JSON array would take a line a row."""
    return " ".join(f"{value:.7g}" for value in values)


def values_of(text: str) -> list[float]:
    """The values of `values_text`."""
    return list(map(float, text.split()))


def pair_values(baseline: str | None, candidate: str | None) -> PairedRows | None:
    """Two lines of `values_text` as paired rows; None if one is missing, or they are not of the same rows."""
    if baseline is None or candidate is None:
        return None
    base, own = values_of(baseline), values_of(candidate)
    valued = [math.isfinite(value) for value in base]
    if valued != [math.isfinite(value) for value in own] or not any(valued):
        return None
    return PairedRows.of(*([each for each, has in zip(values, valued, strict=True) if has] for values in (base, own)))


@dataclass(frozen=True, kw_only=True)
class DropJudgement:
    """A drop against the accuracy budget. Drops are shares of the baseline's metric."""

    drop: float
    max_drop: float
    verdict: Verdict
    low: float | None = None
    """Lower bound of the drop; None without rows."""
    high: float | None = None
    confidence: float | None = None
    """Confidence of each bound."""
    rows: int | None = None
    """Rows with a value; None if the metric is one number."""
    rows_to_decide: int | None = None
    """About how many rows would decide, if the drop stays as measured; None if decided, or too close to the budget."""

    @property
    def accepted(self) -> bool:
        """Whether it may be served: inside, or not distinguishable from no loss."""
        return self.verdict in ("inside", "not distinguishable from no loss")

    @property
    def shown(self) -> str:
        finite = math.isfinite(self.drop)
        return f"drop {self.drop:.2%}" if finite else "drop infinite (NaN or Inf at other places than in fp32 PyTorch)"

    @property
    def reason(self) -> str:
        drop = self.shown
        if self.rows is None or self.low is None or self.high is None:
            sign = "inside" if self.accepted else "outside"
            return f"{drop}, {sign} the budget of {self.max_drop:.2%}"
        return f"{drop} ({interval_text(self.low, self.high)}), budget {self.max_drop:.2%}: {self.verdict}{self.more}"

    @property
    def doubt(self) -> str:
        """The end of a refusal if the interval leaves the verdict open; "" if the drop is outside."""
        return "" if self.verdict == "outside" else f" ({self.verdict}{self.more})"

    @property
    def more(self) -> str:
        """How many rows would decide, as the end of a line; "" if decided or judged by one number."""
        if self.rows is None or self.verdict in ("inside", "outside"):
            return ""
        if self.rows_to_decide is None:
            return f" on {self.rows:,} rows; too close to the budget for any number of rows"
        return f" on {self.rows:,} rows; about {self.rows_to_decide:,} would decide"


def interval_text(low: float, high: float) -> str:
    if not math.isfinite(high - low):
        return "unbounded"
    return f"{low:+.2%} to {high:+.2%}"


def judge_drop(drop: float, paired: PairedRows | None, *, max_drop: float, candidates: int) -> DropJudgement:
    """Judges a drop; without `paired` by the number alone. `candidates`: how many precisions `deploy.toml` tries.

    Inside if the upper bound is within `max_drop`, outside if the lower bound is beyond it. Between the two, the
    candidate is accepted if the drop is within `max_drop` and the interval contains no loss.
    """
    drop = round(drop, _DIGITS)
    if paired is None or not math.isfinite(drop):
        return DropJudgement(drop=drop, max_drop=max_drop, verdict="inside" if drop <= max_drop else "outside")
    confidence = 1 - (1 - CONFIDENCE) / max(1, candidates)
    low, high = drop_interval(paired, confidence)
    decided, needed = _decided(low, high, max_drop), None
    verdict: Verdict = decided or "undecided"
    if decided is None:
        needed = _rows_to_decide(paired, max_drop, confidence)
        if drop <= max_drop and low <= 0:
            verdict = "not distinguishable from no loss"
    return DropJudgement(
        drop=drop,
        max_drop=max_drop,
        verdict=verdict,
        low=low,
        high=high,
        confidence=confidence,
        rows=paired.rows,
        rows_to_decide=needed,
    )


def _decided(low: float, high: float, max_drop: float) -> Literal["inside", "outside"] | None:
    return "inside" if high <= max_drop else "outside" if low > max_drop else None


def drop_interval(paired: PairedRows, confidence: float, rows: float | None = None) -> tuple[float, float]:
    """Bounds of the relative drop, each at `confidence`; infinite if the baseline itself is not clearly above 0.

    `rows`: as if that many rows had shown the same means and variances.
    """
    rows = rows or paired.rows
    if rows < LEAST_ROWS:
        return -math.inf, math.inf
    student = _student(confidence, rows - 1)
    return tuple(round(_bound(paired, rows, student, sign), _DIGITS) for sign in (-1, 1))  # type: ignore[return-value]


def _bound(paired: PairedRows, rows: float, student: float, sign: int) -> float:
    """One end of Fieller's interval after adding rows that lose (`sign` 1) or gain (-1) a whole value."""
    extra = student**2 / 2
    total = rows + extra
    own, added = rows / total, extra / total
    loss_gap, base_gap = sign * paired.most_loss - paired.loss, paired.highest - paired.baseline
    loss, base = paired.loss + added * loss_gap, paired.baseline + added * base_gap
    scale = student**2 / (total - 1)
    loss_variance = scale * own * (paired.loss_variance + added * loss_gap**2)
    base_variance = scale * own * (paired.baseline_variance + added * base_gap**2)
    covariance = scale * own * (paired.covariance + added * loss_gap * base_gap)
    lead = base**2 - base_variance
    if lead <= 0:
        return sign * math.inf
    middle = base * loss - covariance
    root = math.sqrt(max(0.0, middle**2 - lead * (loss**2 - loss_variance)))
    return (middle + sign * root) / lead


def _rows_to_decide(paired: PairedRows, max_drop: float, confidence: float) -> int | None:
    """The smallest number of rows that decides, to two digits; None if the drop is too close to the budget."""

    def decided(rows: float) -> bool:
        return _decided(*drop_interval(paired, confidence, rows), max_drop) is not None

    low, high = float(max(paired.rows, LEAST_ROWS)), float(max(paired.rows, LEAST_ROWS))
    while not decided(high):
        low, high = high, 2 * high
        if high > _MOST_MORE * paired.rows:
            return None
    while high - low > 0.01 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    step = 10 ** max(0, math.floor(math.log10(high)) - 1)
    return int(step * math.ceil(high / step))


def _student(confidence: float, freedom: float) -> float:
    """Quantile of Student's t by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5); 0.1 % off from 9 on."""
    z = NormalDist().inv_cdf(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
