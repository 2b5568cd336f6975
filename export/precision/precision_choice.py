"""Chooses the precision to serve, from the judgements of the accuracy budget and the seconds of each round."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek.precisions import PRECISIONS
from deepseek.spec import GateFailed
from deepseek.spec.paired_drop import DropJudgement
from export.runtimes.timing import compared


def choose(
    judged: Mapping[str, DropJudgement],
    candidates: Sequence[str],
    seconds: Mapping[str, list[float]],
    *,
    asked: bool = False,
) -> tuple[str, dict[str, str]]:
    """The precision to serve and, for each variant, why it was chosen or not.

    From the most accurate on, a candidate that the budget accepts is taken if it is faster than the one taken so far.
    If the difference is within the noise, the more accurate one stays. `asked`: the one candidate was asked for by
    name, and only the budget can refuse it. Raises GateFailed if not even fp32 is accepted.
    """
    reasons = {name: _standing(each) for name, each in judged.items()}
    reasons |= {
        name: "not a candidate" for name, each in judged.items() if each.accepted and name not in ("fp32", *candidates)
    }
    wanted = list(dict.fromkeys(candidates if asked else ["fp32", *candidates]))
    accepted = [name for name in wanted if judged[name].accepted]
    if not accepted:
        shown = {name: each for name, each in judged.items() if asked <= (name in candidates)}
        finite = {name: math.isfinite(each.drop) for name, each in shown.items()}
        texts = {name: f"{each.drop:.2%}" if finite[name] else "infinite" for name, each in shown.items()}
        drops = ", ".join(f"{name} {texts[name]}{each.doubt}" for name, each in shown.items())
        advice = "choose with PRECISION=auto" if asked else "not even fp32 is"
        if asked and any(finite.values()):
            advice = f"raise it, or {advice}"
        allowed = next(iter(judged.values())).max_drop
        raise GateFailed(f"no candidate is inside max_drop {allowed:.2%} (drops: {drops}); {advice}")
    chosen, *others = sorted(accepted, key=lambda name: (-_bits(name), judged[name].drop))
    for name in others:
        found = compared(seconds[name], seconds[chosen])
        if found.result == "faster":
            chosen = name
        else:
            how = "not faster than" if found.result == "slower" else "not distinguishable in speed from"
            but = ", but" if judged[name].verdict == "inside" else ";"
            reasons[name] = f"{_standing(judged[name])}{but} {how} {chosen} ({found.ratio:.2f}x)"
    best = judged[chosen]
    within = "inside the budget" if best.verdict == "inside" else f"accepted: {_standing(best)}"
    if asked:
        reasons[chosen] = f"chosen: asked for, {within}"
    elif chosen == "fp32":
        reasons[chosen] = "chosen: no candidate is faster inside the budget"
    else:
        reasons[chosen] = f"chosen: the fastest {within}"
    return chosen, reasons


def _standing(judged: DropJudgement) -> str:
    """How a variant stands to the budget."""
    if judged.verdict == "outside":
        return f"outside the budget: {judged.shown} > {judged.max_drop:.2%}"
    return f"{judged.verdict}{judged.more}"


def _bits(name: str) -> int:
    return next(row.bits for known, row in PRECISIONS.items() if known == name)


def add_speed(variants: dict[str, dict[str, Any]], seconds: dict[str, list[float]], rows: int) -> None:
    """Adds the speed of each variant, and its speedup over fp32."""
    for name, variant in variants.items():
        variant["rows_per_s"] = rows / statistics.median(seconds[name])
        variant["speedup"] = compared(seconds[name], seconds["fp32"]).ratio
