"""Kills processes under load: a model's backend processes, the server, and the server by an ordinary restart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from deepseek_client import InferenceError

from loadtests.load.background_load import BackgroundLoad
from loadtests.load.request_log import RequestLog
from tests.bench.failure.setting import Row, Service, Setting, Way, counted, lost, told

RATE = 20  # requests/s of each stream
BACK_S = 20.0  # a model whose processes were killed must answer again within this time
STARTED_S = 20.0
FAST_MS = 5000.0  # the longest that a failure may take: the caller's deadline
PATIENT: tuple[Way, ...] = ("grpc", "grpc by gateway", "http by gateway")


def backend_killed(setting: Setting) -> list[Row]:
    """Kills all backend processes of one model while another one is called too."""
    shape = f"{RATE}x600"
    with setting.service("backend") as service:
        streams = [setting.stream(service, "grpc", shape), setting.stream(service, "grpc", shape, setting.other)]
        with setting.load(service, streams) as load:
            time.sleep(setting.watch_s)
            killed_s = load.now_s
            stubs = service.stubs(setting.model.name)
            for stub in stubs:
                stub.kill()
            back_s = _back_s(service, setting.model.name, load, killed_s)
            time.sleep(setting.watch_s)
            answers = load.stop()
    victim, other = (answers[stream.name] for stream in streams)
    last_s = max((each.planned_s - killed_s for each in victim.failed.requests), default=0.0)
    slowest_ms = victim.failed.latency_ms(100)
    return [
        Row(
            what=f"all {len(stubs)} backend processes of {setting.model.name} killed: other models",
            asked="no request fails",
            seen=f"{len(other.failed)} of {len(other)} failed",
            holds=len(stubs) > 0 and not len(other.failed),
        ),
        Row(
            what="    the model",
            asked=f"answers again within {BACK_S:g} s",
            seen=f"last failure after {last_s:.1f} s; {counted(victim.errors)}, of {len(victim)}",
            holds=back_s <= BACK_S and last_s <= BACK_S,
        ),
        Row(
            what="    its failed requests",
            asked=f"fail within {FAST_MS / 1000:g} s",
            seen=f"slowest after {slowest_ms:.0f} ms" if len(victim.failed) else "none",
            holds=not len(victim.failed) or slowest_ms <= FAST_MS,
        ),
    ]


def _back_s(service: Service, model: str, load: BackgroundLoad, killed_s: float) -> float:
    """Seconds until the model runs in new processes and is ready; inf after BACK_S."""
    while load.now_s < killed_s + BACK_S:
        service.bring_back()
        with service.client() as client, contextlib.suppress(InferenceError):
            if service.stubs(model) and client.ready(model):
                return load.now_s - killed_s
        time.sleep(0.1)
    return float("inf")


def server_killed(setting: Setting) -> list[Row]:
    """Kills the server and starts it again, as a container's restart policy does."""
    return _gone(setting, "killed", Service.kill)


def server_restarted(setting: Setting) -> list[Row]:
    """Stops the server and starts it again."""
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
