"""Sends texts to an OpenAI route: `POST /v1/embeddings`, or pairs to `POST /rerank`.

Contract: a client whose `send` makes one attempt. `prepare` takes a row of texts and needs no metadata of the server.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from deepseek_client import PreparedRequest
from deepseek_client.concurrency import run
from deepseek_client.http.transport import HttpTransport
from deepseek_client.metadata import Inputs
from deepseek_client.transport import Deadline

from deepseek.spec import TEXT
from loadtests.load.wire.client import WireClient


class RouteClient(WireClient):
    """A client of one route, given as host:port/path."""

    def __init__(self, route: str, **options: Any) -> None:
        place, _, path = route.partition("/")
        super().__init__(place, "http", **options)
        self._path = f"/{path}"

    def prepare(self, model: str, inputs: Inputs, **_: Any) -> PreparedRequest:
        """The body that the route takes for a row (n, 1) of texts, or (1, 2) of a query and a text."""
        rows = np.asarray(inputs[TEXT]).tolist()
        is_pair = len(rows[0]) == 2
        asked = {"query": rows[0][0], "texts": [rows[0][1]]} if is_pair else {"input": [text for (text,) in rows]}
        body = json.dumps({"model": model, **asked}).encode()
        return PreparedRequest(model=model, version="", request_id="", outputs=(), parts=(body,), tensors=())

    def send(
        self, request: PreparedRequest, *, timeout_s: float | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, np.ndarray]:
        """Makes one attempt; the answer is not decoded. Raises InferenceError unless its status is 200."""
        transport = self._core.transport
        assert isinstance(transport, HttpTransport)
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s)
        run(transport.post(self._path, request.parts[0], deadline))
        return {}
