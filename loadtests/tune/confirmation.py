"""Confirms the best candidate of a search: compares it with the default in interleaved pairs.

Contract: the best of many candidates may owe its rank to luck, so it and the default are measured again, in the order
ABBA, with both servers up. Each measurement is a short search for the highest rate around the known one, and the p99 at
the reference rate. If the best is proved better, the verdict then proves a rate of it, as in `make capacity`: in a
longer run that holds with confidence.

Example:
    concluded(search, search.run(), pairs=6)["conclusion"]
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any, Literal

from deepseek.spec import InvalidMeasurement
from loadtests.search.highest_rate import GENERATOR, LOWEST_RPS, SAMPLES, TIME, UNDECIDED, HighestRate, RateSearch
from loadtests.search.slo_at_rate import seconds_to_prove
from loadtests.slo.confidence import paired_ratio
from loadtests.tune.candidate_server import CandidateServer, TimeUp, candidate_server
from loadtests.tune.settings_search import LEAST_P99_GAIN, SettingsSearch
from loadtests.tune.tune_result import DefaultAndBest, Gain, MeasuredSettings

CONFIDENCE = 0.95  # of both gains together
GAINS = ("capacity_rps", "p99_ms")  # either counts
LEAST_PAIRS = 3
LEAST_GAIN = 1.02  # a smaller gain does not justify a change
NOT_WORSE = 0.95  # lowest ratio of the rates at which a better p99 counts as a gain
STEP = 1.4  # of a pair's bracket, up and down
UNPROVED = {
    TIME: "out of time: raise --max-s",
    SAMPLES: "too close to the limit",
    GENERATOR: "the load generator was the limit",
}
MOST_TRIES = 2  # of a pair whose runs are invalid


def confirm(
    search: SettingsSearch, best: MeasuredSettings, wanted: int
) -> tuple[list[DefaultAndBest], HighestRate | None]:
    """Measures up to `wanted` pairs in the time left; InvalidMeasurement if there are too few.

    Also the proof of a rate, if the best is better.
    """
    conditions, pairs = search.conditions, list[DefaultAndBest]()
    proof_s = seconds_to_prove(conditions.spec.slo, search.reference_rps)
    why = "out of time; raise --max-s"
    with (
        candidate_server(search.default, conditions, "default") as default_server,
        candidate_server(best.settings, conditions, "best") as best_server,
    ):
        for index in range(MOST_TRIES * wanted):
            kept_s = proof_s if len(pairs) >= LEAST_PAIRS else 0  # for the proof
            if len(pairs) == wanted or time.monotonic() > conditions.ends_at - kept_s:
                break
            try:
                pairs.append(measure_pair(search, default_server, best_server, index))
            except TimeUp:
                break
            except InvalidMeasurement as error:
                why = f"last dropped pair: {error}"
                conditions.console.print(f"pair dropped: {error}", soft_wrap=True)
            else:
                conditions.console.print(f"pair {len(pairs)} of {wanted}: {pairs[-1]}", soft_wrap=True)
        if len(pairs) < min(LEAST_PAIRS, wanted):
            raise InvalidMeasurement(f"{best.settings} was not confirmed ({len(pairs)} of {wanted} pairs): {why}")
        return pairs, proof(search, best_server, pairs) if gain_of(pairs)[1] else None


def proof(search: SettingsSearch, server: CandidateServer, pairs: Sequence[DefaultAndBest]) -> HighestRate:
    """Proves the mean rate of the pairs, or one a few steps lower."""
    mean_rps = math.exp(sum(math.log(pair.best_rps) for pair in pairs) / len(pairs))
    slo = search.conditions.spec.slo
    plan = server.plan(
        mean_rps / math.sqrt(search.resolution),  # the pairs' rates lie half a step above one that holds
        resolution=search.resolution,
        lowest_rps=LOWEST_RPS,
        proof_s=lambda rate_rps: seconds_to_prove(slo, rate_rps),
    )
    with search.conditions.console.status("proving the rate of the best"):
        try:
            return RateSearch(plan, server.runner).prove(plan.start_rps)
        except InvalidMeasurement as error:
            search.conditions.console.print(f"not proved: {error}", soft_wrap=True)
            return HighestRate(capacity_rps=None, first_failing_rps=None, confirmed=False, limited_by=str(error))


def measure_pair(
    search: SettingsSearch, default_server: CandidateServer, best_server: CandidateServer, index: int
) -> DefaultAndBest:
    """Measures one pair; every second pair in reverse order."""
    servers = [default_server, best_server]
    with search.conditions.console.status(f"default and best in turn, pair {index + 1}"):
        found = {
            server.settings: rate_and_p99(search, server, seed=100 * (index + 1))
            for server in (servers if index % 2 == 0 else reversed(servers))
        }
    (default_rps, default_p99), (best_rps, best_p99) = (found[each.settings] for each in servers)
    return DefaultAndBest(default_rps=default_rps, best_rps=best_rps, default_p99_ms=default_p99, best_p99_ms=best_p99)


def rate_and_p99(search: SettingsSearch, server: CandidateServer, seed: int) -> tuple[float, float | None]:
    """The highest rate that holds, and the p99 in ms at the reference rate.

    If no rate holds, the lowest that was tried counts. InvalidMeasurement if a run is invalid or inconclusive.
    """
    known = search.measured[server.settings]
    # Shifted at random by up to one step: the step error varies between pairs, so the interval of the gain includes it.
    moved = search.resolution ** random.Random(f"{seed} {server.settings}").uniform(-1, 1)
    start_rps = (known.capacity_rps or search.reference_rps) * moved
    plan = server.plan(
        start_rps,
        lowest_rps=LOWEST_RPS if known.capacity_rps else start_rps / STEP,
        step_up=STEP,
        step_down=STEP,
        resolution=search.resolution,
        repeat_failures=False,
        first_seed=seed,
    )
    rates = RateSearch(plan, server.runner)
    found = rates.run()
    if found.limited_by == TIME:
        raise TimeUp
    latency = server.try_rate(search.reference_rps, seed + 90)
    undecided = [each for each in (*rates.trials, latency) if each.outcome not in ("holds", "fails")]
    if found.limited_by in UNDECIDED or latency in undecided:
        last = undecided[-1] if undecided else rates.trials[-1]
        raise InvalidMeasurement(f"{server.settings} at {last.rate_rps:g}/s: {last.reason or found.limited_by}")
    assert found.first_failing_rps is not None
    low = found.capacity_rps or found.first_failing_rps
    return math.sqrt(low * found.first_failing_rps), latency.p99_ms


def gain_of(pairs: Sequence[DefaultAndBest]) -> tuple[Gain, bool]:
    """The gain that counts, and whether it is proved."""
    capacity = _gain("capacity_rps", [pair.best_rps / pair.default_rps for pair in pairs])
    if capacity.low >= LEAST_GAIN:
        return capacity, True
    latencies = [(pair.default_p99_ms, pair.best_p99_ms) for pair in pairs]
    ratios = [default_ms / best_ms for default_ms, best_ms in latencies if default_ms and best_ms]
    if len(ratios) == len(pairs) and capacity.low >= NOT_WORSE:
        p99 = _gain("p99_ms", ratios)
        if p99.low >= LEAST_P99_GAIN:
            return p99, True
    return capacity, False


def _gain(of: Literal["capacity_rps", "p99_ms"], ratios: Sequence[float]) -> Gain:
    interval = paired_ratio(ratios, 1 - (1 - CONFIDENCE) / len(GAINS))  # so that both hold together
    about = {"ratio": interval.ratio, "low": interval.low, "high": interval.high}
    return Gain(of=of, **about, confidence=CONFIDENCE, pairs=len(ratios))


def concluded(search: SettingsSearch, best: MeasuredSettings, wanted: int) -> dict[str, Any]:
    """Confirms the best candidate, unless it is the default; returns the fields of the result that depend on it."""
    end = "; out of time before all candidates were tried: raise --max-s" if search.cut_short else ""
    if best.settings == search.default:
        return {"conclusion": _default_is_best(search, best) + end}
    pairs, proved = confirm(search, best, wanted)
    gain, better = gain_of(pairs)
    said = f"{best.settings}: {gain}"
    if search.measured[search.default].capacity_rps is None:
        said += ", or more: no rate holds with the default"
    if proved is not None:
        said += f"; {_proof_said(proved, search.conditions.spec.slo.confidence)}"
    return {
        "proved_rps": proved and proved.capacity_rps,
        "pairs": tuple(pairs),
        "candidate": best.settings,
        "gain": gain,
        "best": best.settings if better else None,
        "conclusion": (said if better else f"nothing is proved better than the default; nearest: {said}") + end,
    }


def _proof_said(proved: HighestRate, confidence: float) -> str:
    if proved.capacity_rps is not None:
        return f"{proved.capacity_rps:g}/s hold with {confidence:.0%} confidence"
    why = UNPROVED.get(proved.limited_by, proved.limited_by)
    return f"no rate was proved to hold with {confidence:.0%} confidence ({why})"


def _default_is_best(search: SettingsSearch, best: MeasuredSettings) -> str:
    others = [each for each in search.measured.values() if each != best]
    if search.cut_short and not others:
        raise InvalidMeasurement("out of time before any candidate but the default was tried; raise --max-s")
    undecided = [each.settings for each in others if each.at_least]
    if best.at_least and undecided:
        raise InvalidMeasurement(
            f"the load generator was the limit: the default holds {best.capacity_rps:g}/s or more, and so may "
            f"{undecided[0]}; give the generator its own cores"
        )
    return f"nothing better than the default was found ({len(others)} other settings tried)"
