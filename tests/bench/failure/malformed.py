"""Sends thousands of malformed requests through the gateway: each must be refused as the caller's fault, and no process ends.

Contract: the same seed sends the same requests. The table names a wrong answer by its mutation and the first request's
number. Straight to Triton, some of these requests end the server: docs/research/2026-11-malformed-requests.md.
"""

from __future__ import annotations

import http.client
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
import numpy as np
from deepseek_client import InferenceClient

from tests.bench.claims import Row
from tests.bench.failure.mutations import MUTATIONS, Draft, valid
from tests.bench.failure.setting import Service, Setting, Way, first_row
from tests.gateway import Gateway

SEED = 1
LONGEST_S = 20.0  # per answer
WAYS: tuple[Way, ...] = ("http by gateway", "grpc by gateway")
METHOD = "/inference.GRPCInferenceService/ModelInfer"
REFUSALS = {
    "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "UNIMPLEMENTED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
}  # fmt: skip
NO_ANSWER = "no answer"

Send = Callable[[Draft], tuple[str, str]]
"""Sends a request; returns the status and the reason of the answer."""


@dataclass
class Tally:
    """Counts of the answers on one way."""

    way: Way
    sent: int = 0
    refused: int = 0
    taken: int = 0
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By mutation and status."""
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, number: int, status: str, reason: str, *, mutation: str, may_pass: bool) -> None:
        self.sent += 1
        if status in REFUSALS or (status.isdigit() and 400 <= int(status) < 500):
            self.refused += 1
        elif status in ("OK", "200") and may_pass:
            self.taken += 1
        else:
            self.wrong[mutation, status] += 1
            self.reasons.setdefault((mutation, status), f"request {number}: {' '.join(reason.split())[:160]}")


def malformed_requests(setting: Setting) -> list[Row]:
    """Sends an equal share on both ways, to both models in turn."""
    with setting.service("malformed") as service:
        pids, before = _pids(service), _answers(setting, service)
        rows = [row for way in WAYS for row in _rows(_sent(setting, service, way))]
        ended = service.server.poll() is not None or _pids(service) != pids
        same = not ended and all(map(np.array_equal, before, _answers(setting, service)))
    return [
        *rows,
        Row(
            what="    processes of the server",
            asked="none ends",
            seen="one ended" if ended else "the same as before",
            holds=not ended,
        ),
        Row(
            what="    valid requests afterwards",
            asked="the same answers as before",
            seen="the same" if same else "different",
            holds=same,
        ),
    ]


def _answers(setting: Setting, service: Service) -> list[np.ndarray]:
    """The outputs of both models for a valid request."""
    with InferenceClient(service.server.http_url, "http", timeout_s=10, retries=0) as client:
        models = (setting.model, setting.other)
        return [array for model in models for array in client.infer(model.name, first_row(model)).values()]


def _sent(setting: Setting, service: Service, way: Way) -> Tally:
    """Sends the requests of one way, one after the other."""
    tally, protocol = Tally(way), way.partition(" ")[0]
    models = [(model.name, first_row(model)) for model in (setting.model, setting.other)]
    with _sender(service.gateway, protocol) as send:
        for number in range(setting.requests // len(WAYS)):
            random = Random(f"{SEED} {way} {number}")
            draft = valid(*random.choice(models), binary=random.random() < 0.5)
            mutation = random.choice([each for each in MUTATIONS if protocol in each.protocols])
            mutation.apply(random, draft)
            tally.add(number, *send(draft), mutation=mutation.name, may_pass=protocol in mutation.may_pass)
    return tally


def _pids(service: Service) -> set[int]:
    return {pid for pid, (place, _) in service.processes().items() if place != "gateway"}


def _rows(tally: Tally) -> Iterator[Row]:
    yield Row(
        what=f"{tally.sent} malformed requests over {tally.way}",
        asked="refused (4xx), none a 5xx",
        seen=f"{tally.refused} refused, {tally.taken} valid by chance, {tally.wrong.total()} answered wrongly",
        holds=not tally.wrong,
    )
    for (name, status), count in sorted(tally.wrong.items()):
        seen = f"{count} times {status}: {tally.reasons[name, status]}"
        yield Row(what=f"        {name}", asked="refused", seen=seen, holds=False)


# -- sending -------------------------------------------------------------------------------------


@contextmanager
def _sender(gateway: Gateway, protocol: str) -> Iterator[Send]:
    ca_cert, key = gateway.folder / "ca.crt", {"authorization": f"Bearer {gateway.key}"}
    if protocol == "http":
        context = ssl.create_default_context(cafile=str(ca_cert))
        yield lambda draft: _send_http(draft, gateway.port, context, key)
    else:
        credentials = grpc.ssl_channel_credentials(ca_cert.read_bytes())
        with grpc.secure_channel(f"localhost:{gateway.port}", credentials) as channel:
            call = channel.unary_unary(METHOD)
            yield lambda draft: _send_grpc(draft, call, tuple(key.items()))


def _send_grpc(draft: Draft, call: Any, metadata: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    try:
        call(draft.over_grpc(), timeout=LONGEST_S, metadata=metadata, wait_for_ready=True)
    except grpc.RpcError as error:
        status = error.code().name
        return NO_ANSWER if status == "DEADLINE_EXCEEDED" else status, error.details() or ""
    return "OK", ""


def _send_http(draft: Draft, port: int, context: ssl.SSLContext, key: dict[str, str]) -> tuple[str, str]:
    method, path, headers, body = draft.over_http()
    with closing(http.client.HTTPSConnection("localhost", port, timeout=LONGEST_S, context=context)) as connection:
        try:
            connection.request(method, path, body, headers | key)
            response = connection.getresponse()
            return str(response.status), response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return NO_ANSWER, repr(error)
