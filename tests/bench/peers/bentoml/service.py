"""BentoML with adaptive batching and a worker for each core: `bentoml serve service:Peer`."""

from typing import Any

import bentoml
from graph import CORES, MAX_BATCH, Graph


@bentoml.service(workers=CORES)
class Peer:
    def __init__(self) -> None:
        self.graph = Graph()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60000)
    def predict(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.graph.answers(requests)
