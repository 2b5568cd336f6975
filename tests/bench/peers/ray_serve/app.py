"""Ray Serve with dynamic batching and a replica for each core."""

import os
import sys
import time

import ray
from graph import CORES, DELAY_S, MAX_BATCH, Graph
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=CORES, max_ongoing_requests=2 * MAX_BATCH, ray_actor_options={"num_cpus": 1})
class Peer:
    def __init__(self):
        self.graph = Graph()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=DELAY_S)
    async def predict(self, requests):
        return self.graph.answers(requests)

    async def __call__(self, request: Request):
        if request.method == "GET":
            return "ready"
        return await self.predict(await request.json())


if __name__ == "__main__":
    ray.init(num_cpus=CORES, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=os.environ["SCRATCH"])
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Peer.bind())
    while True:
        time.sleep(3600)
