"""Checks a load test before any load: the settings, the inputs, the server.

Contract: raises a one-line `InputError`, or returns the server's metadata of the model.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepseek_client import (
    DeadlineExceeded,
    InferenceClient,
    InferenceError,
    ModelMetadata,
    ServerBusy,
    ServerError,
)

from deepseek.spec import TEXT, DeploymentSpec, InputError
from loadtests.load.inputs import Row, how_to_fix, named, rows_of
from loadtests.load.wire.route import RouteClient
from loadtests.results.settings import IN_FLIGHT, ROUTES, LoadSettings

TRIES = 5  # enough for a server that breaks half of its connections
MOST_REQUESTS = 50_000_000  # each process holds their planned times, 0.4 GB; ten days at 50/s are 43 million


def check(settings: LoadSettings, spec: DeploymentSpec, only: Sequence[int] | None = None) -> ModelMetadata:
    """Checks settings, inputs and server; returns the server's metadata of the model, InputError otherwise.

    `only` are the rows of the inputs that will be sent, if not those that `read_rows` draws.
    """
    check_numbers(settings)
    rows = list(checked_rows(settings, spec, only).values())
    try:
        options = {"timeout_s": settings.timeout_s, "retries": TRIES, "idempotent": True, **settings.access}
        with InferenceClient(settings.url, settings.protocol, **options) as client:
            # The model is asked first: while Triton unloads an old version of any model, it calls the server not ready.
            if not client.ready(settings.model):
                if not client.ready():
                    raise InputError(f"the server at {settings.url} is not ready; wait for it or read its log")
                raise InputError(
                    f"{settings.model} is not ready at {settings.url}; is it in the model repository? A server "
                    "that was started before follows it only with POLL_S=2"
                )
            served = client.metadata(settings.model)
            for row in rows:
                client.prepare(settings.model, row)
            if settings.route is None:
                with suppress(ServerBusy, ServerError, DeadlineExceeded):  # the load test measures these
                    client.infer(settings.model, rows[0])
            else:
                _check_route(settings, settings.route, rows[0])
    except InferenceError as error:
        raise InputError(str(error)) from None
    return served


def checked_rows(settings: LoadSettings, spec: DeploymentSpec, only: Sequence[int] | None = None) -> dict[int, Row]:
    """The rows as they are sent, by number; InputError if the model or the OpenAI route does not take them."""
    rows = rows_of(Path(settings.inputs), spec, only, on_route=settings.route is not None)
    for row in rows.values():
        texts = row.keys() == {TEXT} and (TEXT not in spec.inputs or settings.route is not None)
        if texts and (spec.text is None or row[TEXT].shape[1:] != (1 + spec.text.pairs,)):
            seen = "pairs of texts" if row[TEXT].shape[1:] == (2,) else "texts"
            takes = 'has no [text], and not one input with dtype = "string"'
            if spec.text is not None:
                takes = "has pairs = true: give a .tsv file" if spec.text.pairs else "has no pairs: give a .txt file"
            raise InputError(f"{settings.inputs}: has {seen}, but deploy.toml of {settings.model} {takes}")
        if row.keys() not in (spec.inputs.keys(), {TEXT}):
            differ = f"contains {_listed(row)}, deploy.toml has {_listed(spec.inputs)}"
            raise InputError(f"{settings.inputs}: {differ}; {how_to_fix(Path(settings.inputs))}")
        if settings.route is not None:
            _check_texts(settings, row)
    return named(rows, spec) if settings.names else rows


def _check_texts(settings: LoadSettings, row: Row) -> None:
    texts = ROUTES[settings.over]
    if row.keys() != {TEXT} or row[TEXT].shape[1:] != (texts,):
        kind = "texts, such as texts.txt" if texts == 1 else "pairs of texts, such as pairs.tsv"
        raise InputError(f"--route {settings.over}: {settings.inputs} has {_listed(row)}; give --inputs with {kind}")
    if not row[TEXT].all():
        raise InputError(f"{settings.inputs}: has an empty text, which {settings.over} refuses; remove the pair")


def _check_route(settings: LoadSettings, route: str, row: Row) -> None:
    """Sends a row to the OpenAI route; raises InputError if the route does not take it, or is not there."""
    with RouteClient(route, timeout_s=settings.timeout_s, **settings.access) as client:
        try:
            client.send(client.prepare(settings.model, row))
        except (ServerBusy, DeadlineExceeded):
            return  # the load test measures these
        except InferenceError as error:
            raise InputError(f"{error} (--route calls {route}; make serve has the routes on port 8003)") from None


def check_numbers(settings: LoadSettings) -> None:
    """Checks options that depend on each other; the command line checks the others."""
    if [settings.rate_rps, settings.shape, settings.replay, settings.users].count(None) != 3:
        raise InputError(
            "give one of --rate, --shape and --replay (open loop) or --users (closed loop); slo.rate_rps is the "
            "default rate"
        )
    if settings.open_loop:
        planned = sum(segment.area for segment in settings.segments)
        warmup = settings.segments[0].rate_rps * settings.warmup_s
        if planned + warmup > MOST_REQUESTS or not any(segment.arrivals for segment in settings.segments):
            what = "--replay" if settings.replay else f"--shape {settings.shape}"
            what = f"--rate {settings.rate_rps:g} for {settings.duration_s:g} s" if settings.rate_rps else what
            also = f", and {warmup:.10g} to warm up" if warmup > planned else ""
            raise InputError(f"{what} plans {planned:.10g} requests{also}; allowed: 1 to {MOST_REQUESTS}")
    elif settings.users is not None and settings.mix is None and settings.users < settings.workers:
        raise InputError(f"--users {settings.users} for --workers {settings.workers}: each worker needs at least one")
    elif settings.users is not None and settings.users > (most := settings.max_in_flight or IN_FLIGHT):
        raise InputError(f"--users {settings.users}: at most {most} are allowed; raise --max-in-flight")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
