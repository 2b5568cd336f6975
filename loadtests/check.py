"""What can be known to be wrong with a load test before any load: the settings, the inputs, the server.

Contract: raises `InputError` in one line; else gives what the server says of the model.

Example:
    served = check(settings, DeploymentSpec.of_model("recommender"))
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepseek_client import (
    ConnectionLost,
    DeadlineExceeded,
    InferenceClient,
    InferenceError,
    ModelMetadata,
    ServerBusy,
    ServerError,
)

from deepseek.spec import BATCH, DeploymentSpec, InputError
from loadtests.inputs import read_inputs
from loadtests.results import IN_FLIGHT, Settings

TRIES = 5  # a server that breaks half of its connections is let through in all but a few of a hundred cases
MOST_REQUESTS = 1_000_000_000  # a slip of the hand rather than a plan; a week at 1000/s is 605 million


def check(settings: Settings, spec: DeploymentSpec) -> ModelMetadata:
    """Everything that can be known to be wrong before any load; returns what the server says of the model."""
    _check_numbers(settings)
    rows = read_inputs(Path(settings.inputs), spec.axes[BATCH].min)
    for row in rows:
        if row.keys() != spec.inputs.keys():
            raise InputError(f"{settings.inputs}: holds {_listed(row)}, deploy.toml has {_listed(spec.inputs)}")
    try:
        with InferenceClient(
            settings.url, settings.protocol, timeout_s=settings.timeout_s, retries=TRIES, **settings.access
        ) as client:
            if not client.ready():
                raise InputError(f"the server at {settings.url} is not ready; wait for it, or see its log")
            if not client.ready(settings.model):
                raise InputError(f"{settings.model} is not ready at {settings.url}; is it in the model repository?")
            served = client.metadata(settings.model)
            for row in rows:
                client.prepare(settings.model, row)
            ask_once(client, settings, rows[0])
    except InferenceError as error:
        raise InputError(str(error)) from None
    return served


def ask_once(client: InferenceClient, settings: Settings, row: dict[str, Any]) -> None:
    """Whether it answers at all: what a server refuses, or fails now and then, is to be measured."""
    until_s = time.monotonic() + settings.timeout_s
    for left in reversed(range(TRIES)):
        try:
            with suppress(ServerBusy):
                client.infer(settings.model, row)
            return
        except (ConnectionLost, DeadlineExceeded, ServerError):
            if not left or time.monotonic() > until_s:
                raise


def check_duration(duration_s: float) -> None:
    """InputError where it is no length of a run."""
    if not 0 < duration_s < math.inf:
        raise InputError(f"--duration-s {duration_s:g}: it must be more than 0")
    if duration_s % 1:  # a second is what counts are kept by
        raise InputError(f"--duration-s {duration_s:g}: it must be a whole number")


def _check_numbers(settings: Settings) -> None:
    if [settings.rate_rps, settings.shape, settings.users].count(None) != 2:
        raise InputError(
            "give --rate or --shape (open loop) or --users (closed loop), one of them; slo.rate_rps is the default rate"
        )
    check_duration(settings.duration_s)
    for name in ("rate_rps", "users", "timeout_s", "max_in_flight", "workers"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.removesuffix('_rps').replace('_', '-')} {value:g}: it must be more than 0")
    if settings.seed < 0:
        raise InputError(f"--seed {settings.seed}: it must be 0 or more")
    if not 0 <= settings.warmup_s < math.inf:
        raise InputError(f"--warmup-s {settings.warmup_s:g}: it must be 0 or more")
    if settings.open_loop:
        planned = sum(segment.arrivals for segment in settings.segments)
        if not 1 <= planned <= MOST_REQUESTS:
            what = f"--rate {settings.rate_rps:g} for {settings.duration_s:g} s"
            raise InputError(
                f"{what if settings.shape is None else f'--shape {settings.shape}'} plans {planned} requests; "
                f"1 to {MOST_REQUESTS} are possible"
            )
    elif settings.users is not None and settings.mix is None and settings.users < settings.workers:
        raise InputError(f"--users {settings.users} for --workers {settings.workers}: each worker needs one or more")
    elif settings.users is not None and settings.users > (most := settings.max_in_flight or IN_FLIGHT):
        raise InputError(f"--users {settings.users}: at most {most}; --max-in-flight raises it")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
