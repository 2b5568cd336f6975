"""How a server is called with one row a request, and where the answer is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.bench.peers.load import Sender, http

Request = Mapping[str, Any]
"""Inputs by name, without the batch dimension: lists of numbers, or a text."""
KEYS = ("name", "datatype", "shape", "data")


@dataclass(frozen=True)
class Served:
    """A server under test: how it gets the requests, and where the output is in an answer."""

    sender: Sender
    output: Callable[[Any], Any]

    async def answers(self, count: int) -> np.ndarray:
        """The outputs of the first `count` requests, one at a time; raises ValueError if one is refused."""
        async with self.sender() as send:
            found = [await send(number) for number in range(count)]
        if refused := sum(answer is None for answer in found):
            raise ValueError(f"{refused} of {count} single requests were refused")
        return np.array([self.output(answer) for answer in found])


def kserve(url: str, requests: Sequence[Request], output: str, **parameters: str | float) -> Served:
    """KServe v2 with JSON, and the same parameters in each request."""

    def tensor(name: str, value: Any) -> dict[str, Any]:
        found = (name, "BYTES", [1, 1], [value]) if isinstance(value, str) else (name, "INT64", [1, len(value)], value)
        return dict(zip(KEYS, found, strict=True))

    outputs, more = [{"name": output}], {"parameters": parameters} if parameters else {}
    bodies = [
        {"inputs": [tensor(name, value) for name, value in request.items()], "outputs": outputs, **more}
        for request in requests
    ]

    def data(answer: bytes) -> Any:
        return next(each["data"] for each in json.loads(answer)["outputs"] if each["name"] == output)

    return Served(http(url, bodies), data)


def openai(url: str, requests: Sequence[Request]) -> Served:
    """/v1/embeddings."""
    bodies = [{"model": "minilm", "input": request["text"]} for request in requests]
    return Served(http(url, bodies), lambda answer: json.loads(answer)["data"][0]["embedding"])


def plain(url: str, requests: Sequence[Request], output: str) -> Served:
    """One JSON object a request."""
    return Served(http(url, requests), lambda answer: json.loads(answer)[output])


def listed(url: str, requests: Sequence[Request], output: str) -> Served:
    """A list of one object a request, for servers that batch lists."""
    bodies = [{"requests": [request]} for request in requests]
    return Served(http(url, bodies), lambda answer: json.loads(answer)[0][output])


def cosines(found: np.ndarray, want: np.ndarray) -> np.ndarray:
    """The cosine of each row of `found` with that of `want`."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(want, axis=1)
    return (found * want).sum(axis=1) / np.maximum(lengths, 1e-9)
