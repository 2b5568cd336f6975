"""Sends thousands of malformed requests on every way: each must be refused as the caller's fault, and no process ends.

Contract: the same seed sends the same requests. The table names a wrong answer by its mutation and the request's number.
`KNOWN` lists wrong answers that this project cannot change, each with its reason; they are shown but do not count.
"""

from __future__ import annotations

import http.client
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import grpc
import numpy as np

from tests.bench.failure.mutations import MUTATIONS, Draft, valid
from tests.bench.failure.setting import WAYS, Model, Row, Service, Setting, Way, first_row, name_of

SEED = 1
LONGEST_S = 20.0  # per answer
MOST_CRASHES = 3  # after this many crashes by a known mutation, skip it: each costs a start of the server
LOOK_EVERY = 100  # requests between two checks of the processes
METHOD = "/inference.GRPCInferenceService/ModelInfer"
REFUSALS = {
    "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "UNIMPLEMENTED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
}  # fmt: skip
NO_ANSWER = "no answer"

Send = Callable[[Draft], tuple[str, str]]
"""Sends a request; returns the status and the reason of the answer."""


class Known(NamedTuple):
    """A wrong answer that is documented."""

    ways: tuple[Way, ...]
    statuses: tuple[str, ...]
    why: str
    mutations: tuple[str, ...] = ()
    """Empty: any."""
    says: tuple[str, ...] = ("",)
    """The answer's reason contains one of these."""

    def fits(self, way: Way, mutation: str, status: str, reason: str) -> bool:
        named = not self.mutations or mutation in self.mutations
        return way in self.ways and status in self.statuses and named and any(each in reason for each in self.says)


ENDS_IT = "Triton 2.51 crashes on JSON whose sizes exceed the memory; the gateway refuses it"
ENDS_IT_BY = ("sizes whose product overflows", "an impossible size", "nested far too deep")
KNOWN = (
    Known(
        ("http",), ("500",), "Triton 2.51 answers JSON that it cannot read so; the gateway refuses it with 400",
        says=("Unable to parse", "failed to parse", "failed to get request params", "unable to parse"),
    ),
    Known(
        ("http",), ("501",), "Triton answers unsupported features so; the gateway refuses them with 415 or 400",
        says=("Unsupported compression type", "correlation ID"),
    ),
    Known(("http",), (NO_ANSWER,), ENDS_IT, ENDS_IT_BY),
    Known(
        ("grpc",), ("INTERNAL",), "gRPC's library answers unreadable messages so; the gateway: INVALID_ARGUMENT",
        says=("Unable to parse request",),
    ),
    Known(
        ("http", "grpc", "grpc by gateway"), ("OK", "200"),
        "Triton counts rows in 32 bits and does not compare a count of 0 with other inputs; the data decide",
        ("a size of 0", "an impossible size"),
    ),
)  # fmt: skip


@dataclass
class Tally:
    """Counts of the answers on one way."""

    way: Way
    sent: int = 0
    refused: int = 0
    taken: int = 0
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By mutation and status."""
    known: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By status and documented reason."""
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    crashes: list[str] = field(default_factory=list)

    def add(self, number: int, status: str, reason: str, *, mutation: str, may_pass: bool) -> None:
        self.sent += 1
        if status in REFUSALS or (status.isdigit() and 400 <= int(status) < 500):
            self.refused += 1
        elif status in ("OK", "200") and may_pass:
            self.taken += 1
        elif known := next((each for each in KNOWN if each.fits(self.way, mutation, status, reason)), None):
            self.known[status, known.why] += 1
        else:
            self.wrong[mutation, status] += 1
            self.reasons.setdefault((mutation, status), f"request {number}: {' '.join(reason.split())[:160]}")


def malformed_requests(setting: Setting) -> list[Row]:
    """Sends an equal share on every way, to both models in turn."""
    with setting.service("malformed") as service:
        before = {model.name: _answer(service, model) for model in (setting.model, setting.other)}
        rows = [row for way in WAYS for row in _rows(_sent(setting, service, way))]
        after = {model.name: _answer(service, model) for model in (setting.model, setting.other)}
    same = all(np.array_equal(before[name][key], after[name][key]) for name in before for key in before[name])
    return [
        *rows,
        Row(
            what="    valid requests afterwards",
            asked="the same answers as before",
            seen="the same" if same else "different",
            holds=same,
        ),
    ]


def _answer(service: Service, model: Model) -> dict[str, np.ndarray]:
    with service.client() as client:
        return client.infer(model.name, first_row(model))


def _sent(setting: Setting, service: Service, way: Way) -> Tally:
    """Sends the requests of one way, one after the other."""
    tally, pids, protocol = Tally(way), _pids(service), way.partition(" ")[0]
    models = [(model.name, first_row(model)) for model in (setting.model, setting.other)]
    share = setting.requests // len(WAYS)
    with _sender(service, way) as send:
        for number in range(share):
            random = Random(f"{SEED} {way} {number}")
            spared = ENDS_IT_BY if way == "http" and len(tally.crashes) >= MOST_CRASHES else ()
            draft = valid(*random.choice(models), binary=random.random() < 0.5)
            mutation = random.choice(
                [each for each in MUTATIONS if protocol in each.protocols and each.name not in spared]
            )
            mutation.apply(random, draft)
            status, reason = send(draft)
            tally.add(number, status, reason, mutation=mutation.name, may_pass=protocol in mutation.may_pass)
            suspect = status in (NO_ANSWER, "UNAVAILABLE", "500", "502", "503", "INTERNAL")
            look = suspect or number % LOOK_EVERY == 0 or number == share - 1
            if look and _has_ended(service, pids, dying=status == NO_ANSWER):
                tally.crashes.append(f"{mutation.name} (request {number})")
                service.wait_for_the_end()
                service.bring_back()
                pids = _pids(service)
    return tally


def _has_ended(service: Service, pids: set[int], *, dying: bool) -> bool:
    """Whether a process of the server ended.

    A dying server closes its connections before its process is gone: wait until it is, or until the server answers.
    """
    until = time.monotonic() + (LONGEST_S if dying else 0)
    while _pids(service) == pids:
        if time.monotonic() >= until or _is_ready(service):
            return False
        time.sleep(0.02)
    return True


def _is_ready(service: Service) -> bool:
    with closing(http.client.HTTPConnection("127.0.0.1", service.ports["http"], timeout=LONGEST_S)) as connection:
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def _pids(service: Service) -> set[int]:
    return {each.pid for each in service.processes() if name_of(each) not in ("", "nginx")}


def _rows(tally: Tally) -> Iterator[Row]:
    yield Row(
        what=f"{tally.sent} malformed requests over {tally.way}",
        asked="refused (4xx), none a 5xx",
        seen=f"{tally.refused} refused, {tally.taken} valid by chance, {tally.wrong.total()} answered wrongly, "
        f"{tally.known.total()} wrong in a known way",
        holds=not tally.wrong,
    )
    for (name, status), count in sorted(tally.wrong.items()):
        seen = f"{count} times {status}: {tally.reasons[name, status]}"
        yield Row(what=f"        {name}", asked="refused", seen=seen, holds=False)
    for (status, reason), count in sorted(tally.known.items()):
        yield Row(what=f"        known: {status}", seen=f"{count} times: {reason}")
    expected = tally.known.total() and tally.known[NO_ANSWER, ENDS_IT] == len(tally.crashes)
    crashes = f"{len(tally.crashes)} times: {'; '.join(tally.crashes[:3])}" if tally.crashes else "the same as before"
    holds = not tally.crashes or (None if expected else False)
    yield Row(what="    processes of the server", asked="none ends", seen=crashes, holds=holds)


# -- sending -------------------------------------------------------------------------------------


@contextmanager
def _sender(service: Service, way: Way) -> Iterator[Send]:
    gateway = service.gateway if way.endswith("gateway") else None
    ca_cert = None if gateway is None else gateway.folder / "ca.crt"
    headers = {} if gateway is None else {"authorization": f"Bearer {gateway.key}"}
    if way.startswith("http"):
        url = ("127.0.0.1", service.ports["http"]) if gateway is None else ("localhost", gateway.port)
        context = None if ca_cert is None else ssl.create_default_context(cafile=str(ca_cert))
        yield lambda draft: _send_http(draft, url, context, headers)
    else:
        with ExitStack() as stack:
            if gateway is None or ca_cert is None:
                channel = stack.enter_context(grpc.insecure_channel(service.grpc_url))
            else:
                credentials = grpc.ssl_channel_credentials(ca_cert.read_bytes())
                channel = stack.enter_context(grpc.secure_channel(f"localhost:{gateway.port}", credentials))
            call = channel.unary_unary(METHOD)
            yield lambda draft: _send_grpc(draft, call, tuple(headers.items()))


def _send_grpc(draft: Draft, call: Any, metadata: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    try:
        call(draft.over_grpc(), timeout=LONGEST_S, metadata=metadata, wait_for_ready=True)
    except grpc.RpcError as error:
        status = error.code().name
        return NO_ANSWER if status == "DEADLINE_EXCEEDED" else status, error.details() or ""
    return "OK", ""


def _send_http(
    draft: Draft, url: tuple[str, int], context: ssl.SSLContext | None, key: dict[str, str]
) -> tuple[str, str]:
    if context is None:
        connection = http.client.HTTPConnection(*url, timeout=LONGEST_S)
    else:
        connection = http.client.HTTPSConnection(*url, timeout=LONGEST_S, context=context)
    method, path, headers, body = draft.over_http()
    with closing(connection):
        try:
            connection.request(method, path, body, headers | key)
            response = connection.getresponse()
            return str(response.status), response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return NO_ANSWER, repr(error)
