"""Thousands of malformed requests on every way: each is refused as the caller's fault, and the service goes on.

Contract: the same seed sends the same requests; one that is answered wrongly is named by its mutation and its number,
and one that ends a process is kept in the folder. `KNOWN` are answers that are not as they should be and are not ours to
change, each with its reason; they are shown, and do not count.
"""

from __future__ import annotations

import http.client
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
import numpy as np

from tests.bench.failure.mutations import Mutation
from tests.bench.failure.mutations_grpc import GRPC, valid_grpc
from tests.bench.failure.mutations_http import HTTP, valid_http
from tests.bench.failure.setting import WAYS, Model, Row, Service, Setting, Way, first_row, name_of

SEED = 1
LONGEST_S = 20.0  # for one answer
MOST_CRASHES = 3  # after so many of a known kind, no more of its requests are sent: each costs a start of the server
LOOK_EVERY = 100  # requests between two looks at the processes
METHOD = "/inference.GRPCInferenceService/ModelInfer"
REFUSALS = {
    "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "UNIMPLEMENTED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
}  # fmt: skip
NO_ANSWER = "no answer"

Send = Callable[[Random, tuple[str, ...]], tuple[Mutation[Any], bytes, str, str]]
"""One request, of any mutation but some: its mutation, its bytes, what came of it (a status) and the reason that was given."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A wrong answer that is documented."""

    ways: tuple[Way, ...]
    status: str
    mutations: tuple[str, ...] = ()
    """None: any."""
    says: tuple[str, ...] = ()
    """One of these is in the reason given; none: whatever it is."""
    reason: str

    def fits(self, way: Way, mutation: str, status: str, reason: str) -> bool:
        """Whether an answer is one of these."""
        named = not self.mutations or mutation in self.mutations
        said = not self.says or any(each in reason for each in self.says)
        return way in self.ways and status == self.status and named and said


ENDS_IT = "Triton 2.51 ends at JSON whose sizes are too large for the memory; the gateway refuses it"
COUNTS_ROWS = (
    "Triton counts rows in 32 bits and does not compare a count of 0 with those of other inputs; the data decide"
)
ENDS_IT_BY = ("sizes whose product overflows", "a size that cannot be", "nested far too deep")
KNOWN: tuple[Known, ...] = (
    Known(
        ways=("http",),
        status="500",
        says=("Unable to parse", "failed to parse", "failed to get request params", "unable to parse"),
        reason="Triton 2.51 says so of JSON that it cannot read; the gateway refuses it with 400",
    ),
    Known(
        ways=("http",),
        status="501",
        says=("Unsupported compression type", "correlation ID"),
        reason="Triton says so of what it does not have; the gateway refuses it with 415 or 400",
    ),
    Known(
        ways=("http",),
        status=NO_ANSWER,
        mutations=ENDS_IT_BY,
        reason=ENDS_IT,
    ),
    Known(
        ways=("grpc",),
        status="INTERNAL",
        says=("Unable to parse request",),
        reason="gRPC's own library says so of bytes that are no message; the gateway makes it INVALID_ARGUMENT",
    ),
    Known(
        ways=("grpc", "grpc by gateway"),
        status="OK",
        mutations=("another number of raw contents",),
        reason="Triton leaves surplus contents alone, and answers what the inputs ask",
    ),
    Known(
        ways=("grpc", "grpc by gateway"),
        status="OK",
        mutations=("a size of nothing", "a size that cannot be"),
        reason=COUNTS_ROWS,
    ),
    Known(
        ways=("http",),
        status="200",
        mutations=("a size of nothing",),
        reason=COUNTS_ROWS,
    ),
)


@dataclass
class Tally:
    """What came of the requests of one way."""

    way: Way
    sent: int = 0
    refused: int = 0
    taken: int = 0
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Mutation and status."""
    known: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Status and the reason that is documented."""
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    crashes: list[str] = field(default_factory=list)

    def add(self, number: int, mutation: Mutation[Any], status: str, reason: str) -> None:
        """Judges an answer."""
        self.sent += 1
        if status in REFUSALS or (status.isdigit() and 400 <= int(status) < 500):
            self.refused += 1
        elif status in ("OK", "200") and mutation.may_pass:
            self.taken += 1
        elif known := next((each for each in KNOWN if each.fits(self.way, mutation.name, status, reason)), None):
            self.known[status, known.reason] += 1
        else:
            self.wrong[mutation.name, status] += 1
            self.reasons.setdefault((mutation.name, status), f"request {number}: {' '.join(reason.split())[:160]}")


def malformed_requests(setting: Setting) -> list[Row]:
    """On every way, a share each; to both models in turn."""
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
            seen="the same" if same else "others",
            holds=same,
        ),
    ]


def _answer(service: Service, model: Model) -> dict[str, np.ndarray]:
    with service.client() as client:
        return client.infer(model.name, first_row(model))


def _sent(setting: Setting, service: Service, way: Way) -> Tally:
    """Sends them one after the other."""
    tally, pids, last = Tally(way), _pids(service), b""
    share = setting.requests // len(WAYS)
    with _sender(setting, service, way) as send:
        for number in range(share):
            random = Random(f"{SEED} {way} {number}")
            spared = ENDS_IT_BY if way == "http" and len(tally.crashes) >= MOST_CRASHES else ()
            mutation, last, status, reason = send(random, spared)
            tally.add(number, mutation, status, reason)
            suspect = status in (NO_ANSWER, "UNAVAILABLE", "500", "502", "503", "INTERNAL")
            if (suspect or number % LOOK_EVERY == 0 or number == share - 1) and _pids(service) != pids:
                tally.crashes.append(f"{mutation.name} (request {number})")
                service.wait_for_the_end()
                (setting.folder / f"crash {way} {number}").write_bytes(last)
                service.bring_back()
                pids = _pids(service)
    return tally


def _pids(service: Service) -> set[int]:
    return {each.pid for each in service.processes() if name_of(each) not in ("", "nginx")}


def _rows(tally: Tally) -> Iterator[Row]:
    yield Row(
        what=f"{tally.sent} malformed requests over {tally.way}",
        asked="refused (4xx), none a 5xx",
        seen=f"{tally.refused} refused, {tally.taken} valid by chance, {tally.wrong.total()} answered wrongly, "
        f"{tally.known.total()} of a known kind",
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
def _sender(setting: Setting, service: Service, way: Way) -> Iterator[Send]:
    rows = {model.name: first_row(model) for model in (setting.model, setting.other)}
    by_gateway = way.endswith("gateway")
    if way.startswith("grpc"):
        with _channel(service, by_gateway=by_gateway) as channel:
            metadata = (("authorization", f"Bearer {service.gateway.key}"),) if by_gateway else ()
            call = channel.unary_unary(METHOD, lambda data: data, lambda data: data)
            yield lambda random, spared: _send_grpc(call, metadata, rows, random)
    else:
        caller = _HttpCaller(service, by_gateway=by_gateway)
        yield lambda random, spared: _send_http(caller, rows, random, spared)
        caller.close()


@contextmanager
def _channel(service: Service, *, by_gateway: bool) -> Iterator[grpc.Channel]:
    if by_gateway:
        credentials = grpc.ssl_channel_credentials((service.gateway.folder / "ca.crt").read_bytes())
        with grpc.secure_channel(f"localhost:{service.gateway.port}", credentials) as channel:
            yield channel
    else:
        with grpc.insecure_channel(service.grpc_url) as channel:
            yield channel


def _send_grpc(
    call: Any, metadata: tuple[tuple[str, str], ...], rows: dict[str, dict[str, np.ndarray]], random: Random
) -> tuple[Mutation[Any], bytes, str, str]:
    model = random.choice(sorted(rows))
    draft, mutation = valid_grpc(model, rows[model], raw=random.random() < 0.5), random.choice(GRPC)
    mutation.apply(random, draft)
    message = draft.encoded()
    try:
        call(message, timeout=LONGEST_S, metadata=metadata, wait_for_ready=True)
    except grpc.RpcError as error:
        status = error.code().name
        return mutation, message, NO_ANSWER if status == "DEADLINE_EXCEEDED" else status, error.details() or ""
    return mutation, message, "OK", ""


class _HttpCaller:
    """One connection, made anew where it was closed."""

    def __init__(self, service: Service, *, by_gateway: bool) -> None:
        self._service, self._by_gateway = service, by_gateway
        self._connection: http.client.HTTPConnection | None = None

    def _open(self) -> http.client.HTTPConnection:
        if not self._by_gateway:
            return http.client.HTTPConnection("127.0.0.1", self._service.ports["http"], timeout=LONGEST_S)
        gateway = self._service.gateway
        context = ssl.create_default_context(cafile=str(gateway.folder / "ca.crt"))
        return http.client.HTTPSConnection("localhost", gateway.port, timeout=LONGEST_S, context=context)

    def call(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[str, str]:
        """Status and body; a connection that was closed is no answer, unless it had been idle."""
        if self._by_gateway:
            headers = {**headers, "Authorization": f"Bearer {self._service.gateway.key}"}
        for is_new in (self._connection is None, True):
            connection = self._connection = self._connection or self._open()
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return str(response.status), response.read().decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if is_new:
                    return NO_ANSWER, repr(error)
        raise AssertionError

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _send_http(
    caller: _HttpCaller, rows: dict[str, dict[str, np.ndarray]], random: Random, spared: tuple[str, ...]
) -> tuple[Mutation[Any], bytes, str, str]:
    model = random.choice(sorted(rows))
    draft = valid_http(model, rows[model], binary=random.random() < 0.5)
    mutation = random.choice([each for each in HTTP if each.name not in spared])
    mutation.apply(random, draft)
    method, path, headers, body = draft.encoded()
    status, reason = caller.call(method, path, headers, body)
    head = f"{method} {path}\n" + "".join(f"{name}: {value}\n" for name, value in headers.items())
    return mutation, f"{head}\n".encode() + body, status, reason
