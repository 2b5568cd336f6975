"""Checks the load generator of a run: the requests it sent, their delay, and its CPU use."""

from collections.abc import Iterator
from dataclasses import replace

from deepseek.spec import Objective, SloSpec
from loadtests.results.run import Run
from loadtests.results.stretch import NO_FILE, NO_PORT, Stretch
from loadtests.slo.judged_objectives import value_of
from loadtests.slo.slo_demands import largest_limit_s, rate_of

LEAST_ATTEMPTED = 0.99  # of the planned requests, started in time
# Sending delay as a share: its p99 of the SLO's largest latency limit; the figure of each objective of its limit. Or of
# what the service itself takes, if that is longer: such an objective is violated without the lag.
LARGEST_LAG = 0.05
# The same if every latency limit holds and nothing was refused: intended latency includes the lag, and a queue answers
# no request later if all come on time. More lag could spread a burst that the service would refuse.
INCLUDED_LAG = 0.25
MOST_CPU = 0.90  # of one core, for the thread that sends
ALLOW = ", or give it real-time priority (--priority, PRIORITY=1)"  # in a closed loop it changes nothing
OWN_LIMITS = {
    NO_FILE: "requests failed because the generator ran out of open files: raise its ulimit -n, or use more "
    "workers (WORKERS=)",
    NO_PORT: "requests failed because the generator ran out of local ports: widen its "
    "net.ipv4.ip_local_port_range, or send from several machines (--remote-workers)",
}


def generator_problems(run: Run, slo: SloSpec, *, compared: bool = False) -> list[str]:
    """Why the load generator was the limit of this run; empty if it was not.

    `compared`: its latencies will be compared with those of another run, so a lag inside the SLO matters too.
    """
    problems = []
    if lost := run.generator.get("workers_lost"):
        problems.append(f"{lost} of {run.generator['workers']} workers were lost with their results: measure again")
    if run.window.unsent:
        problems.append(f"{run.window.unsent} of {run.window.planned} planned requests were never sent")
    problems += _lateness(run, slo, compared)
    thread_cpu = run.generator.get("thread_cpu", 0)
    if thread_cpu > MOST_CPU:
        problems.append(f"the generator's thread was {thread_cpu:.0%} busy, at most {MOST_CPU:.0%} is allowed")
    if problems and not lost:
        lower, allow = ("lower the rate, ", ALLOW) if run.settings.open_loop else ("", "")
        allow = "" if run.generator.get("precedence") else allow
        problems.append(f"{lower}use more workers (WORKERS=), or give the generator a machine with free cores{allow}")
    errors, timeout_s = run.window.errors, run.settings.timeout_s
    problems += [f"{errors[kind]} {why}" for kind, why in OWN_LIMITS.items() if errors[kind]]
    if (given_up := errors["DeadlineExceeded"]) and largest_limit_s(slo) > timeout_s:  # made for another SLO
        problems.append(
            f"{given_up} requests timed out after {timeout_s:g} s, but the SLO allows longer answers: measure again"
        )
    return problems


def _lateness(run: Run, slo: SloSpec, compared: bool) -> list[str]:
    """Problems with late requests in the whole window, or else in the parts that are judged on their own."""
    judged: dict[float | None, list[Objective]] = {None: []}
    for line in slo.all_objectives():
        if line.facts.of_load:
            judged.setdefault(rate_of(line, run.settings, slo), []).append(line)
    # Limits that the intended latency breaks, or all if it is not judged.
    broken = {
        rate: [line for line in lines if line.kind == "ms" and not _holds(run, rate, line, compared)]
        for rate, lines in judged.items()
    }
    latencies = [line for lines in judged.values() for line in lines if line.kind == "ms"]
    holds = bool(latencies) and not any(broken.values()) and not _refused(run.window)
    share = INCLUDED_LAG if holds and not compared else LARGEST_LAG
    largest_ms = largest_limit_s(slo) * 1000
    whole, *parts = (list(_late_at(run, rate, lines, largest_ms, share)) for rate, lines in broken.items())
    return whole or [problem for part in parts for problem in part]


def _late_at(run: Run, rate: float | None, lines: list[Objective], largest_ms: float, share: float) -> Iterator[str]:
    """Problems at a rate (None: the whole window): too few requests were started, or so late that it matters.

    The p99 of the lag may be this share of the largest limit, and the figure of each of these objectives of its own.
    """
    stretch = run.at_rate(rate)
    if stretch is None or not run.settings.open_loop:
        return
    at = "" if rate is None else f" at {rate:g}/s"
    if stretch.attempted_share < LEAST_ATTEMPTED:
        yield (
            f"the generator started {stretch.attempted_share:.1%} of the planned requests{at} in time; "
            f"{LEAST_ATTEMPTED:.0%} is needed"
        )
    lag, service = stretch.latency("lag"), stretch.latency("service")
    # The server may refuse a burst that was sent late. Other failures are its own, and count with the time-out.
    service = replace(service, failed=service.failed - _refused(stretch))
    timeout_ms = run.settings.timeout_s * 1000
    bounds = [("p99", lag.percentile_ms(99), largest_ms, service.percentile_ms(99))] if largest_ms else []
    bounds += [
        (line.measure.removesuffix("_ms"), value_of(lag, line), line.limit, value_of(service, line)) for line in lines
    ]
    for figure, lag_ms, limit_ms, service_ms in bounds:
        whose, most_ms = "the SLO's", limit_ms
        if limit_ms < service_ms:
            whose, most_ms = "the service's", min(service_ms, timeout_ms)
        if lag_ms > share * most_ms:
            yield (
                f"the generator sent late{at}: {figure} of the lag is {lag_ms:.2f} ms, "
                f"at most {share:.0%} of {whose} {most_ms:.4g} ms is allowed "
                f"(its machine was busy for {run.generator.get('machine_cpu', 0):.0%} of the time)"
            )
            return


def _holds(run: Run, rate: float | None, line: Objective, compared: bool) -> bool:
    """Whether a latency limit holds in spite of the lag, which intended latency includes."""
    stretch = run.at_rate(rate)
    if stretch is None or run.judged != "intended" or (compared and line.percent is not None):
        return False
    return line.holds(value_of(stretch.latency("intended"), line))


def _refused(stretch: Stretch) -> int:
    return stretch.errors["ServerBusy"] + stretch.errors["dropped"]
