"""Processes are killed under load: those that run a model, the server outright, and the server as a restart ends it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from deepseek_client import InferenceError

from tests.bench.failure.load import Answers, Load
from tests.bench.failure.setting import Row, Service, Setting, Way, counted, lost, told

RATE = 20  # requests/s of each stream
BACK_S = 20.0  # in which a model whose processes were killed answers again
STARTED_S = 20.0
FAST_MS = 5000.0  # no failure takes longer: the caller's deadline
PATIENT: tuple[Way, ...] = ("grpc", "grpc by gateway", "http by gateway")


def backend_killed(setting: Setting) -> list[Row]:
    """All processes of one model, beside another one."""
    shape = f"{RATE}x600"
    with setting.service("backend") as service:
        streams = [setting.stream(service, "grpc", shape), setting.stream(service, "grpc", shape, setting.other)]
        with Load(streams) as load:
            time.sleep(setting.watch_s)
            killed_s = time.perf_counter()
            stubs = service.stubs(setting.model.name)
            for stub in stubs:
                stub.kill()
            back_s = _back_s(service, setting.model.name, killed_s)
            time.sleep(setting.watch_s)
            answers = load.stop()
    victim, other = (answers[stream.name] for stream in streams)
    last_s = float((victim.failed.planned - killed_s).max(initial=0.0))
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
            seen=f"last failure after {last_s:.1f} s; {counted(victim.kinds)}, of {len(victim)}",
            holds=back_s <= BACK_S and last_s <= BACK_S,
        ),
        Row(
            what="    its failed requests",
            asked=f"are told within {FAST_MS / 1000:g} s",
            seen=f"slowest after {slowest_ms:.0f} ms" if len(victim.failed) else "none",
            holds=not len(victim.failed) or slowest_ms <= FAST_MS,
        ),
    ]


def _back_s(service: Service, model: str, killed_s: float) -> float:
    """Seconds until the model runs in new processes and is ready; inf where it does not in time."""
    while time.perf_counter() < killed_s + BACK_S:
        service.bring_back()
        with service.client() as client, contextlib.suppress(InferenceError):
            if service.stubs(model) and client.ready(model):
                return time.perf_counter() - killed_s
        time.sleep(0.1)
    return float("inf")


def server_killed(setting: Setting) -> list[Row]:
    """Killed outright, and started again as a container's restart policy does."""
    return _gone(setting, "killed", Service.kill)


def server_restarted(setting: Setting) -> list[Row]:
    """Told to end, and started again."""
    return _gone(setting, "restarted", Service.end)


def _gone(setting: Setting, how: str, end: Callable[[Service], None]) -> list[Row]:
    shape = f"{RATE}x600"
    with setting.service(how) as service:
        patient = [setting.stream(service, way, shape).patient() for way in PATIENT]
        plain = setting.stream(service, "grpc", shape, name="plain", retries=3)
        with Load([*patient, plain]) as load:
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
            seen=f"{len(given_up.failed)} of {len(given_up)}: {counted(given_up.kinds)}",
        ),
    ]


def _longest_s(streams: dict[str, Answers]) -> float:
    return max(each.kept.latency_ms(100) for each in streams.values()) / 1000
