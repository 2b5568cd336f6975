"""Our client beside bare tritonclient."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from deepseek_client import InferenceClient
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http

from export.artifact import Row
from serving.embedded import EmbeddedServer
from tests.bench.setting import Bench, seconds


def client(bench: Bench) -> None:
    """p50 of our client over that of bare tritonclient, one call after the other."""
    row = bench.rows["recommender"][0]
    with bench.server(bench.repository("recommender")) as server:
        for protocol, bare in (("grpc", _bare_grpc(server, row)), ("http", _bare_http(server, row))):
            url = server.grpc_url if protocol == "grpc" else server.http_url
            with InferenceClient(url, protocol) as ours:  # type: ignore[arg-type]
                ratios = []
                for _ in range(max(10, bench.pairs)):
                    own = _p50(lambda: ours.infer("recommender", row))
                    ratios.append(own / _p50(bare))
            bench.record(f"client p50 over bare tritonclient, {protocol}", ratios, "goal: at most 1.1")


def _p50(call: Callable[[], object]) -> float:
    return statistics.median(seconds(call) for _ in range(200))


def _bare_grpc(server: EmbeddedServer, row: Row) -> Callable[[], object]:
    client = triton_grpc.InferenceServerClient(server.grpc_url)

    def call() -> object:
        tensor = triton_grpc.InferInput("item_ids", row["item_ids"].shape, "INT64")
        tensor.set_data_from_numpy(row["item_ids"])
        result = client.infer("recommender", [tensor])
        return result.as_numpy("items"), result.as_numpy("scores")

    return call


def _bare_http(server: EmbeddedServer, row: Row) -> Callable[[], object]:
    client = triton_http.InferenceServerClient(server.http_url)

    def call() -> object:
        tensor = triton_http.InferInput("item_ids", row["item_ids"].shape, "INT64")
        tensor.set_data_from_numpy(row["item_ids"])
        result = client.infer("recommender", [tensor])
        return result.as_numpy("items"), result.as_numpy("scores")

    return call
