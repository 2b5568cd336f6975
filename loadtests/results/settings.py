"""The settings of a load test."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from deepseek.spec import Target
from loadtests.results.schedule import Segment, segments_of

# For workers to read and encode their inputs after they have joined, on a busy machine.
LONGEST_PREPARATION_S = 60.0
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ROUTES = {"/v1/embeddings": 1, "/rerank": 2}
"""The OpenAI routes that a load test can call, and the texts of a row."""
IN_FLIGHT = 512  # unanswered requests of a worker, unless the SLO and the rate need more


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Recorded traffic, as `make loadtest REPLAY=` sends it."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)
    file: str
    sha256: str
    speed: float
    """The recorded times are divided by it."""
    requests: int
    """Of this model."""
    peak_rps: float
    """Requests of this model in the busiest second."""


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Determines a run.

    Exactly one of `rate_rps`, `shape`, `replay` (all three open loop) and `users` (closed loop) is given.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)
    model: str
    models: str
    target: Target
    protocol: Literal["grpc", "http"]
    url: str
    inputs: str
    """The .npz file of real inputs, or the file of texts."""
    names: bool = False
    """Sends the names of the inputs' items instead of their ids, to a model with `[vocabulary]`."""
    route: str | None = None
    """host:port/path of the OpenAI route that gets the requests; None: KServe v2 at `url`."""
    metrics: str | None = None
    """host:port of the server's metrics, which has the padding of texts; None: not read."""
    rate_rps: Positive | None = None
    shape: str | None = None
    """Changing rates, in the syntax of `schedule.segments_of`."""
    users: AtLeastOne | None = None
    replay: Replay | None = None
    arrivals: Literal["constant", "poisson"] = "poisson"
    """Of a replay: only those of the warm-up, at the mean rate."""
    seed: int = 0
    warmup_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    duration_s: Positive = 20.0
    timeout_s: Positive = 5.0
    """Deadline of a request; a later answer counts as an error."""
    max_in_flight: AtLeastOne | None = None
    """Open loop: unanswered requests of a worker; a request due beyond them is dropped and counts as an error. None:
    `measure` computes the number from the SLO and the rate."""
    workers: AtLeastOne = 1
    """Sending processes."""
    priority: bool = False
    """Real-time priority for the workers, if the system allows it."""
    looks: AtLeastOne = 1
    """How often the run could have been judged and ended; the verdict corrects its confidence for it."""
    tls: bool = False
    ca_cert: str | None = None
    """Authority of the gateway's certificate; turns TLS on. The key comes from $DEEPSEEK_API_KEY and is never saved."""
    mix: str | None = None
    """The mix that this run was a part of, in the syntax of `loadtests.results.mixes`."""

    @property
    def access(self) -> dict[str, Any]:
        """The client's options: answers of any size, TLS, the API key."""
        options: dict[str, Any] = {"max_response_bytes": None}
        if self.tls or self.ca_cert:
            key = os.environ.get("DEEPSEEK_API_KEY") or None
            options |= {"tls": True, "ca_cert": self.ca_cert, "api_key": key}
        return options

    @property
    def over(self) -> str:
        """The protocol, or the OpenAI route."""
        return self.protocol if self.route is None else f"/{self.route.partition('/')[2]}"

    @property
    def place(self) -> str:
        """host:port that gets the requests."""
        return self.url if self.route is None else self.route.partition("/")[0]

    @property
    def load(self) -> str:
        """The load in words."""
        if not self.open_loop:
            return f"{self.users} users (closed loop)"
        if self.replay is not None:
            name, rate_rps = Path(self.replay.file).name, self.segments[0].rate_rps
            return f"replay of {name} at speed {self.replay.speed:g}, {rate_rps:.4g} requests/s on average (open loop)"
        rate = f"{self.rate_rps:g}" if self.shape is None else self.shape
        return f"{rate} requests/s, {self.arrivals.capitalize()} arrivals (open loop)"

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent on a fixed schedule rather than after an answer."""
        return self.rate_rps is not None or self.shape is not None or self.replay is not None

    @property
    def rates_rps(self) -> list[float]:
        """The steady rates of an open loop, ascending."""
        return sorted({each.rate_rps for each in self.segments if each.end_rps in (None, each.rate_rps)})

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of an open loop, in order; empty for a closed loop. A replay is one, at its mean rate."""
        if self.replay is not None:
            return (Segment(duration_s=self.duration_s, rate_rps=self.replay.requests / self.duration_s),)
        if self.shape is not None:
            return segments_of(self.shape)
        return () if self.rate_rps is None else (Segment(duration_s=self.duration_s, rate_rps=self.rate_rps),)
