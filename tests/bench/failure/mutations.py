"""Malformed requests of the KServe v2 protocol: valid ones, each changed by one of many mutations.

Contract: a mutation that `breaks` makes a request that no server may take; one that `bends` may leave it valid by
chance. Which one is applied, and how, comes from the `random.Random` that is handed in alone. `mutations_http` and
`mutations_grpc` have those of the protocols.

Example:
    random, draft = Random(7), valid_http("minilm", row, binary=True)
    mutation = random.choice(HTTP)
    mutation.apply(random, draft)
    method, path, headers, body = draft.encoded()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

D = TypeVar("D")

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES", "BF16",
)  # fmt: skip
SIZES = (-1, -(2**31), -(2**63), 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class Mutation(Generic[D]):
    """One way to make a request wrong."""

    name: str
    apply: Callable[[Random, D], None]
    may_pass: bool


class Mutations(list[Mutation[D]]):
    """Those of one protocol; its methods register functions whose names are the mutations'."""

    def breaks(self, apply: Callable[[Random, D], None]) -> Callable[[Random, D], None]:
        self.append(Mutation(name=apply.__name__.replace("_", " "), apply=apply, may_pass=False))
        return apply

    def bends(self, apply: Callable[[Random, D], None]) -> Callable[[Random, D], None]:
        self.append(Mutation(name=apply.__name__.replace("_", " "), apply=apply, may_pass=True))
        return apply
