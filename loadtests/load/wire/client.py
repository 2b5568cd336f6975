"""`InferenceClient` over the load generator's own connections.

Contract: with TLS it uses the client's connections. `send` makes one attempt and keeps no counts; everything else is
the client's. For processes that gevent has patched, such as Locust's.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
from deepseek_client import InferenceClient, PreparedRequest
from deepseek_client.client import address_of
from deepseek_client.concurrency import run
from deepseek_client.grpc.transport import GrpcTransport
from deepseek_client.http.pool import BlockingPool
from deepseek_client.http.transport import HttpTransport
from deepseek_client.options import ClientOptions
from deepseek_client.transport import NO_HEADERS, Deadline, Transport

from loadtests.load.wire.grpc_channel import GreenChannel
from loadtests.load.wire.http_connection import GreenConnection


class WireClient(InferenceClient):
    def _transport(self, url: str, options: ClientOptions) -> Transport:
        if options.speaks_tls:
            return super()._transport(url, options)
        if options.protocol == "grpc":
            return GrpcTransport(url, GreenChannel(url))
        return HttpTransport(url, BlockingPool(partial(GreenConnection.open, *address_of(url))), options)

    def send(
        self, request: PreparedRequest, *, timeout_s: float | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, np.ndarray]:
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s)
        return run(self._core.transport.send(request, deadline, headers or NO_HEADERS))
