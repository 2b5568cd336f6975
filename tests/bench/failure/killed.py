"""Ends the server under load and starts it again: killed, and by an ordinary restart."""

from __future__ import annotations

import time
from collections.abc import Callable

from loadtests.load.request_log import RequestLog
from tests.bench.claims import Row
from tests.bench.failure.setting import Service, Setting, Way, counted, lost, told

RATE = 20  # requests/s of each stream
STARTED_S = 20.0
PATIENT: tuple[Way, ...] = ("grpc", "grpc by gateway", "http by gateway")


def server_killed(setting: Setting) -> list[Row]:
    """Kills the server and starts it again, as a container's restart policy does."""
    return _gone(setting, "killed", Service.kill)


def server_restarted(setting: Setting) -> list[Row]:
    return _gone(setting, "restarted", Service.end)


def _gone(setting: Setting, how: str, end: Callable[[Service], None]) -> list[Row]:
    shape = f"{RATE}x600"
    with setting.service(how) as service:
        patient = [setting.patient(service, way, shape) for way in PATIENT]
        plain = setting.stream(service, "grpc", shape, name="plain", retries=3)
        with setting.load(service, [*patient, plain]) as load:
            time.sleep(setting.watch_s)
            gone_s = time.perf_counter()
            end(service)
            ended_s = time.perf_counter() - gone_s
            started_s = service.start()
            away_s = time.perf_counter() - gone_s
            time.sleep(setting.watch_s)
            answers = load.stop()
    given_up = answers.pop("plain")
    sent = sum(len(each) for each in answers.values())
    return [
        Row(
            what=f"server {how} under load, started again: until it is ready",
            asked=f"{STARTED_S:g} s",
            seen=f"{away_s:.1f} s (ended after {ended_s:.1f} s, start {started_s:.1f} s)",
            holds=away_s <= STARTED_S,
        ),
        Row(
            what=f"    requests of a client that retries, over {', '.join(PATIENT)}",
            asked="none lost",
            seen=f"{lost(answers)} of {sent} lost; the longest took {_longest_s(answers):.1f} s{told(answers)}",
            holds=lost(answers) == 0,
        ),
        Row(
            what="    of a client with three retries, which gives up sooner",
            seen=f"{len(given_up.failed)} of {len(given_up)}: {counted(given_up.errors)}",
        ),
    ]


def _longest_s(streams: dict[str, RequestLog]) -> float:
    return max(each.answered.latency_ms(100) for each in streams.values()) / 1000
